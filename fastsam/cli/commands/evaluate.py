"""fastsam evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from fastsam.cli.options import given, named_parts, settings_of_data, with_settings
from fastsam.cli.output import check_output, show
from fastsam.longtail.classes import TargetPrior
from fastsam.longtail.data import load_dataset
from fastsam.longtail.trained import TrainedRun, evaluate_run


@dataclass(frozen=True)
class EvaluateCommand:
    """Evaluate a trained run: every score with a bootstrap interval, and the accuracy of each class."""

    run_folder: Positional[Annotated[Path, arg(metavar="RUN")]]
    """Folder of a run of `fastsam train`, or the file of a kept checkpoint."""
    data: Annotated[str | None, arg(metavar="NAME")] = None
    """Another data set with the same classes; its settings are options too. By default the run's own."""
    split: Literal["test", "validation", "train"] = "test"
    """Dataset split; training images are read without augmentation."""
    prior: TargetPrior = "as-is"
    """Test distribution of the classes: as-is (that of the images), uniform, trained (that of the training
    images), or reversed (the rarest class becomes the most frequent)."""
    bootstrap: int = 1000
    """Bootstrap samples for the intervals, at least 20; 0 for none."""
    level: float = 0.95
    """Share of the bootstrap samples inside an interval."""
    classes: int = 100
    """The table of classes is left out where there are more classes than this; --out has all."""
    uncalibrated: bool = False
    """Leave out the calibration of `fastsam calibrate`, which is applied where the run has one."""
    device: str = "cpu"
    """Device: cpu, cuda, cuda:1, ..."""
    out: Path | None = None
    """File for all of it as JSON, the confusion matrix included."""
    quiet: bool = False
    """No progress bar."""

    def run(self) -> None:
        """Compute, print and, if asked, write the evaluation."""
        check_output(self.out)
        from fastsam.report import class_table, confusion_table, score_table

        settings = {name: v for name, v in given(self).items() if name in settings_of_data([])}
        run = TrainedRun.load(
            self.run_folder,
            device=self.device,
            data_root=settings.get("data_root"),
            calibrated=not self.uncalibrated,
        )
        data = None
        if self.data is not None:
            data = load_dataset(self.data, progress=not self.quiet, **settings)
        evaluation = evaluate_run(
            run,
            data=data,
            split=self.split,
            prior=self.prior,
            bootstrap=self.bootstrap,
            level=self.level,
            progress=not self.quiet,
        )
        show(f"weights: {evaluation.rule}; calibration: {evaluation.calibration}")
        for table in (score_table, class_table, confusion_table):
            if table is not class_table or len(run.counts) <= self.classes:
                show(f"{table(evaluation)}\n")
        if self.out is not None:
            evaluation.save(self.out)
            print(f"evaluation: {self.out}")


def command(arguments: Sequence[str]) -> Any:
    """The command, with options for the settings of the data set that the arguments name."""
    named = named_parts(arguments).get("data")
    settings = settings_of_data([named] if named else [])
    return with_settings(
        EvaluateCommand, settings if named else {"data_root": settings["data_root"]}
    )
