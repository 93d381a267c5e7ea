"""The command ``fastsam export``."""

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
    return "; ".join(f"{name} ({part.summary})" for name, part in FORMATS.items())


@dataclass(frozen=True, kw_only=True)
class ExportCommand:
    """Export a trained network as a model file, with its class labels and a model card."""

    run_folder: Positional[Annotated[Path, arg(metavar="RUN")]]
    """Folder of a run of `fastsam train`, or a checkpoint file in it."""
    out: Path
    """Output folder."""
    format: Annotated[str, arg(help=f"Format of the model file: {_formats()}.", metavar="NAME")] = (
        "torch"
    )
    overwrite: bool = False
    """Allow a folder that is not empty; files of an earlier export are replaced."""
    device: str = "cpu"
    """Device of a torch program: cpu, cuda, cuda:1, ..."""
    uncalibrated: bool = False
    """Ignore the run's calibration by `fastsam calibrate`."""
    data_root: Annotated[str | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """Folder with the data set. Only checkpoints of older versions need it."""

    def run(self) -> None:
        """Export the network."""
        run = TrainedRun.load(
            self.run_folder,
            device=self.device,
            data_root=self.data_root,
            calibrated=not self.uncalibrated,
        )
        path = export_run(run, self.out, format=self.format, overwrite=self.overwrite)
        show(f"exported: {path}")


def command(arguments: Sequence[str]) -> type[ExportCommand]:
    """Return the command; its options do not depend on ``arguments``."""
    return ExportCommand
