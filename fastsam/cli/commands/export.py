"""fastsam export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from fastsam.cli.output import show
from fastsam.longtail.trained import TrainedRun, export_run
from fastsam.longtail.trained.export import FORMATS


def _formats() -> str:
    return "; ".join(f"{name}: {part.summary}" for name, part in FORMATS.items())


@dataclass(frozen=True, kw_only=True)
class ExportCommand:
    """Write a trained network as a model file, with its labels and a model card."""

    run_folder: Positional[Annotated[Path, arg(metavar="RUN")]]
    """Folder of a run of `fastsam train`, or the file of a kept checkpoint."""
    out: Path
    """Folder for the files."""
    format: Annotated[str, arg(help=f"format of the model file; {_formats()}", metavar="NAME")] = (
        "torch"
    )
    overwrite: bool = False
    """The folder may hold files already; those of an earlier export are replaced."""
    device: str = "cpu"
    """Device that a torch program computes on: cpu, cuda, cuda:1, ..."""
    uncalibrated: bool = False
    """Leave out the calibration of `fastsam calibrate`, which is applied where the run has one."""
    data_root: str | None = None
    """Folder with the data set; only checkpoints of older versions need it."""

    def run(self) -> None:
        """Write the files."""
        run = TrainedRun.load(
            self.run_folder,
            device=self.device,
            data_root=self.data_root,
            calibrated=not self.uncalibrated,
        )
        path = export_run(run, self.out, format=self.format, overwrite=self.overwrite)
        show(f"exported: {path}")


def command(arguments: Sequence[str]) -> type[ExportCommand]:
    """The command, which has the same options for all arguments."""
    return ExportCommand
