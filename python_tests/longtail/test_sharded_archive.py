"""Archives of sharded networks: what is read when only the settings of a run are needed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from fastsam.distributed import World
from fastsam.files import to_json, write_text
from fastsam.longtail.archive import write_archive
from fastsam.longtail.errors import DamagedError
from fastsam.longtail.sharded_archive import (
    MANIFEST,
    _sha256,
    read_sharded_archive,
    read_sharded_outline,
    start_writing,
)


@pytest.fixture
def world() -> Iterator[World]:
    """Return a world of one rank, in a process group of its own."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield World(0, 1)
    finally:
        dist.destroy_process_group()


def test_no_flipped_bit_is_accepted(world: World, tmp_path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    mesh = init_device_mesh("cpu", (1,))
    weight, buffer = torch.randn(50, 4), torch.randn(7)
    content = {"epoch": 3, "weight": distribute_tensor(weight, mesh, [Shard(0)]), "buffer": buffer}
    folder = tmp_path / "checkpoint.pt"
    start_writing(folder, content, world, None)()
    files = sorted(path for path in folder.iterdir() if path.is_file())
    assert {MANIFEST, "whole.pt", "__0_0.distcp"} <= {path.name for path in files}
    generator = np.random.default_rng(seed)
    for number in range(200):
        path = files[number % len(files)]
        whole = path.read_bytes()
        damaged, place = bytearray(whole), int(generator.integers(8 * len(whole)))
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(DamagedError):
            read_sharded_archive(folder)
        path.write_bytes(whole)
    found = read_sharded_archive(folder)
    assert found["epoch"] == 3
    assert torch.equal(found["weight"], weight)
    assert torch.equal(found["buffer"], buffer)


def test_an_outline_reads_and_verifies_one_small_file(tmp_path: Path) -> None:
    content = {
        "epoch": 3,
        "buffer": torch.arange(4),
        "weight": torch.empty(5, 2, device="meta"),  # in the place of a sharded one
    }
    whole = tmp_path / "whole.pt"
    write_archive(whole, content)
    # Another file of the archive, which an outline does not even open.
    sums = {"whole.pt": _sha256(whole), "__0_0.distcp": "0" * 64}
    write_text(tmp_path / MANIFEST, to_json({"files": sums}))
    outline = read_sharded_outline(tmp_path)
    assert outline["epoch"] == 3
    assert {outline[name].device.type for name in ("buffer", "weight")} == {"meta"}
    assert (outline["buffer"].shape, outline["weight"].shape) == ((4,), (5, 2))
    with pytest.raises(DamagedError, match="__0_0"):
        read_sharded_archive(tmp_path)
    damaged = bytearray(whole.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    whole.write_bytes(damaged)
    with pytest.raises(DamagedError, match=r"the SHA-256 of whole\.pt is wrong"):
        read_sharded_outline(tmp_path)
