"""The command ``fastsam calibrate``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from fastsam.cli.output import show, table
from fastsam.files import locked
from fastsam.longtail.calibrators import CALIBRATORS
from fastsam.longtail.trained import Calibration, TrainedRun, calibrate_run
from fastsam.longtail.trained.calibrate import BEST
from fastsam.longtail.trained.calibration import calibration_path


@dataclass(frozen=True)
class CalibrateCommand:
    """Calibrate a trained classifier for rare classes and fit a temperature, on its validation images."""

    run_folder: Positional[Annotated[Path, arg(metavar="RUN")]]
    """Folder of a run of `fastsam train`, or a checkpoint file in it."""
    method: Annotated[
        str,
        arg(
            help=f"Calibrator: {', '.join(CALIBRATORS.names())}, or {BEST} (the one with the highest "
            "balanced accuracy on validation images).",
            metavar="NAME",
        ),
    ] = BEST
    force: bool = False
    """Accept classes with fewer than 5 validation images."""
    data_root: Annotated[
        str | None, arg(metavar="DIR", help_behavior_hint="(default: as in training)")
    ] = None
    """Folder with the data."""
    device: str = "cpu"
    """Device: cpu, cuda, cuda:1, ..."""
    quiet: bool = False
    """Hide the progress bar."""

    def run(self) -> None:
        """Calibrate, print the validation scores, and write the calibration beside the checkpoint."""
        run = TrainedRun.load(
            self.run_folder, device=self.device, data_root=self.data_root, calibrated=False
        )
        if not run.finished:
            show(f"weights: {run.weights}")
        path = calibration_path(self.run_folder)
        with locked(path.parent):
            found = calibrate_run(
                run, method=self.method, force=self.force, progress=not self.quiet
            )
            found.save(path)
        _show(found)
        tau = run.checkpoint.config.posthoc_tau
        if tau:
            print(
                f"the calibration replaces the run's post-hoc logit adjustment (posthoc_tau {tau:g})"
            )
        show(f"calibration: {path}")


def _show(found: Calibration) -> None:
    """Print the score of every calibrator, and the chosen one."""
    header = ("calibrator", "parameters", "balanced accuracy", "NLL", "temperature")
    rows = [
        (
            score.calibrator,
            score.described,
            f"{score.balanced:.2f}",
            f"{score.nll:.4f}",
            "-" if score.temperature is None else f"{score.temperature:.4g}",
        )
        for score in found.scores
    ]
    print(f"{found.images} validation images; best candidate of each calibrator:")
    show(table(header, rows))
    for name, reason in found.refused.items():
        show(f"skipped {name}: {reason}")
    chosen = next(score for score in found.scores if score.calibrator == found.calibrator)
    parameters = "" if chosen.described == "-" else f" ({chosen.described})"
    show(f"chosen: {chosen.calibrator}{parameters}, temperature {found.temperature:.4g}")
    if chosen.temperature is None:
        print(
            "the temperature is 1 because no finite temperature minimizes the NLL; this happens, for "
            "instance, if every validation image is classified correctly"
        )


def command(arguments: Sequence[str]) -> type[CalibrateCommand]:
    """Return the command; its options do not depend on ``arguments``."""
    return CalibrateCommand
