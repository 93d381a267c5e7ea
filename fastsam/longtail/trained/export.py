"""Export of a trained run: a model file for other programs, with labels and a model card."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastsam.files import locked, write_bytes, write_text
from fastsam.longtail.errors import UsageError
from fastsam.longtail.registry import Registry, RunPart
from fastsam.longtail.trained.card import is_card, model_card
from fastsam.longtail.trained.run import TrainedRun
from fastsam.longtail.training import RunFolder, check_free

CARD, LABELS = "README.md", "labels.json"


@dataclass(frozen=True, kw_only=True)
class ExportFormat(RunPart):
    """A format of model files.

    Attributes:
        build: ``build(run)`` returns the content of the model file.
        file: name of the model file.
        usage: ``usage(run)`` describes in Markdown the content of the file and how to load it.
    """

    build: Callable[[TrainedRun], bytes]
    file: str
    usage: Callable[[TrainedRun], str]


FORMATS: Registry[ExportFormat] = Registry("export format", "fastsam.longtail.trained.formats")
register_format = FORMATS.add


def export_run(
    run: TrainedRun, folder: str | Path, *, format: str = "torch", overwrite: bool = False
) -> Path:
    """Export a trained run: a model file, ``labels.json`` and a model card, ``README.md``.

    Nothing is written if the model cannot be converted. Each file is written atomically.

    Args:
        run: the trained run.
        folder: output folder; created if it does not exist.
        format: one of :data:`FORMATS`: ``torch``, ``onnx`` or ``safetensors``.
        overwrite: replace the files of an earlier export in the folder.

    Returns:
        Path of the model file.

    Raises:
        UsageError: if the format is unknown, or the folder is not empty and ``overwrite`` is not set or its
            files are not those of an earlier export.
        DataError: if the format requires the preprocessing of the run and it is unknown, or the run's
            ``result.json`` is damaged.
        LongTailError: if the network cannot be converted to this format.
        ImportError: if a package of the extra ``export`` is missing.
        FolderBusyError: if another process writes to the folder.
        OSError: if a file cannot be written.

    Example:
        >>> import tempfile
        >>> from fastsam.longtail import Trainer, recipe
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = Trainer(recipe("digits-lt", "ce", "sgd", epochs=1).config(), out=folder / "run").fit()
        >>> path = export_run(TrainedRun.load(folder / "run"), folder / "model", format="safetensors")
        >>> sorted(file.name for file in path.parent.iterdir())
        ['README.md', 'labels.json', 'model.safetensors']
    """
    chosen, folder = FORMATS[format], Path(folder)
    _check(folder, overwrite=overwrite)
    content = chosen.build(run)
    card = model_card(run, file=chosen.file, usage=chosen.usage(run))
    with locked(folder):
        _check(
            folder, overwrite=overwrite
        )  # another process may have written before the lock was taken
        write_bytes(folder / chosen.file, content)
        write_text(folder / LABELS, json.dumps(list(run.class_names), indent=0) + "\n")
        write_text(folder / CARD, card)
        for other in FORMATS.values():
            if other.file != chosen.file:
                (folder / other.file).unlink(missing_ok=True)
    return folder / chosen.file


def _check(folder: Path, *, overwrite: bool) -> None:
    """Check that a folder is empty, or contains an earlier export that may be overwritten.

    Raises:
        UsageError: if the folder has other content, or must not be overwritten.
    """
    check_free(folder, allowed=overwrite, flags="--overwrite")
    names = {CARD, LABELS, *(part.file for part in FORMATS.values())}
    present = [folder / name for name in sorted(names) if (folder / name).exists()]
    card = folder / CARD
    if present and not (card.is_file() and is_card(card.read_text("utf-8", "replace"))):
        raise UsageError(
            f"{present[0]} was not written by `fastsam export`; choose another --out or move the file"
        )
    if RunFolder(folder).checkpoints():
        raise UsageError(f"{folder} is the folder of a run; choose another --out")
