"""Archives of a sharded network: a folder in which each rank writes its parts of the tensors.

``torch.distributed.checkpoint`` writes and reads the parts, so another number of ranks can read them. It does
not notice changed bits. Therefore a manifest has the SHA-256 of every file. It is written last: a folder
without it is incomplete.
"""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastsam.distributed import World, is_sharded
from fastsam.files import from_json, to_json, write_text
from fastsam.longtail.archive import read_archive, read_outline, write_archive
from fastsam.longtail.errors import DamagedError
from fastsam.longtail.sharding import map_tensors
from fastsam.text import one_line

MANIFEST = "manifest.json"
_WHOLE = "whole.pt"
"""Everything but the sharded tensors, in whose places it has tensors on the device ``meta``."""


def is_complete(folder: Path) -> bool:
    """Return whether a folder is an archive that was written to the end."""
    return (folder / MANIFEST).is_file()


def start_writing(
    folder: Path, content: Any, world: World, group: dist.ProcessGroup | None
) -> Callable[[], None]:
    """Copy the tensors to the CPU and start to write them. All ranks must call this together.

    Args:
        folder: the archive; a complete or incomplete one is replaced.
        content: tensors, sharded or not, and plain values in dicts and lists.
        world: the ranks.
        group: process group of all ranks for the CPU, which nothing else uses meanwhile.

    Returns:
        A function that waits for all ranks and completes the archive. Every rank must call it, on any thread,
        before the next archive.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import async_save

    shards: dict[str, Tensor] = {}

    def taken(tensor: Tensor) -> Tensor:
        if not is_sharded(tensor):
            return tensor.detach().to("cpu", copy=True)
        shards[str(len(shards))] = tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    whole = map_tensors(content, taken)
    if world.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    dist.barrier(group)
    saved = async_save(shards, storage_writer=FileSystemWriter(folder), process_group=group)

    def finish() -> None:
        try:
            saved.result()  # type: ignore[union-attr]
        except (
            CheckpointException
        ) as error:  # a BaseException, with the error of each rank that failed
            cause = next(iter(error.failures.values()))[0]
            raise OSError(f"cannot write {folder}: {one_line(cause)}") from error
        own = [*folder.glob(f"__{world.rank}_*.distcp")]
        if world.rank == 0:
            write_archive(folder / _WHOLE, whole)
            own += [folder / _WHOLE, folder / ".metadata"]
        sums: list[dict[str, str]] = [{} for _ in range(world.world_size)]
        dist.all_gather_object(sums, {path.name: _sha256(path) for path in own}, group=group)
        if world.rank == 0:
            files = {name: value for each in sums for name, value in each.items()}
            write_text(folder / MANIFEST, to_json({"files": files}))

    return finish


def read_sharded_archive(folder: Path) -> Any:
    """Verify every file of an archive and load it to the CPU, with whole tensors.

    The file ``.metadata`` is a pickle of PyTorch, which may execute code: read only archives that you trust.

    Raises:
        DamagedError: if a file is missing or changed.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with _damage_named(folder):
        _verify(folder)
        whole = read_archive(folder / _WHOLE)
        shards: dict[str, Any] = {}

        def placed(tensor: Tensor) -> Tensor:
            if tensor.device.type != "meta":
                return tensor
            value = torch.empty(tensor.shape, dtype=tensor.dtype)
            shards[str(len(shards))] = value
            return value

        content = map_tensors(whole, placed)
        with warnings.catch_warnings():
            # Every rank reads whole tensors by itself, on purpose.
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            load(shards, storage_reader=FileSystemReader(folder), no_dist=True)
    return content


def read_sharded_outline(folder: Path) -> Any:
    """Load an archive without the values of its tensors, which are on the device ``meta``.

    It reads and verifies a single file, which is small.

    Raises:
        DamagedError: if the file is missing or changed.
    """
    with _damage_named(folder):
        _verify(folder, _WHOLE)
        return read_outline(folder / _WHOLE)


def _verify(folder: Path, *names: str) -> None:
    """Raise ValueError if the SHA-256 of a file is wrong; of all files if none is named."""
    files = from_json((folder / MANIFEST).read_text("utf-8"))["files"]
    for name in names or files:
        if Path(name).name != name or _sha256(folder / name) != files[name]:
            raise ValueError(f"the SHA-256 of {name} is wrong")


@contextmanager
def _damage_named(folder: Path) -> Iterator[None]:
    """Convert the errors of a damaged archive to a :class:`DamagedError`."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except DamagedError:
        raise
    except (Exception, CheckpointException) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise DamagedError(
            f"cannot read {folder} as a checkpoint: it is incomplete or damaged ({reason}); restore the "
            "folder or train again"
        ) from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
