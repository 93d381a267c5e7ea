"""The command ``fastsam evaluate``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from fastsam.cli.options import (
    given,
    named_parts,
    recipe_of_data,
    settings_of_data,
    with_settings,
)
from fastsam.cli.output import check_output, show
from fastsam.longtail.classes import TargetPrior
from fastsam.longtail.data import load_dataset
from fastsam.longtail.data.preprocessing import Views
from fastsam.longtail.trained import TrainedRun, evaluate_run


@dataclass(frozen=True)
class EvaluateCommand:
    """Evaluate a trained run: scores with bootstrap intervals, and the accuracy of each class."""

    run_folder: Positional[Annotated[Path, arg(metavar="RUN")]]
    """Folder of a run of `fastsam train`, or a checkpoint file in it."""
    data: Annotated[
        str | None, arg(metavar="NAME", help_behavior_hint="(default: data set of the run)")
    ] = None
    """Data set with the classes of the run. --data also enables the options of that data set."""
    data_root: Annotated[
        str | None,
        arg(
            metavar="DIR",
            help_behavior_hint="(default: the folder used in training; for --data: ./data)",
        ),
    ] = None
    """Folder with the data."""
    split: Literal["test", "validation", "train"] = "test"
    """Dataset split; training images are read without augmentation."""
    prior: Annotated[
        TargetPrior,
        arg(
            help="Class distribution to evaluate for: as-is (of the evaluated images), uniform, "
            "trained (of the training images), or reversed (the rarest class becomes the most frequent).",
        ),
    ] = "as-is"
    bootstrap: int = 1000
    """Number of bootstrap samples, at least 20; 0 computes no intervals."""
    level: float = 0.95
    """Confidence level of the intervals."""
    evaluation_views: Views = 1
    """Crops of each image whose logits are averaged: 1, or 5 (center and corners of a larger image)."""
    classes: int = 100
    """Print accuracies by class if there are at most INT classes. The file of --out always has them."""
    uncalibrated: bool = False
    """Ignore the run's calibration by `fastsam calibrate`."""
    device: str = "cpu"
    """Device: cpu, cuda, cuda:1, ..."""
    out: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """JSON file for the evaluation, including the confusion matrix."""
    quiet: bool = False
    """Hide the progress bar."""

    def run(self) -> None:
        """Compute the evaluation, print it, and write it to ``out`` if set."""
        check_output(self.out)
        from fastsam.report import class_table, confusion_table, score_table

        settings = {name: v for name, v in given(self).items() if name in settings_of_data([])}
        run = TrainedRun.load(
            self.run_folder,
            device=self.device,
            data_root=self.data_root if self.data is None else None,
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
            views=self.evaluation_views,
            progress=not self.quiet,
        )
        if self.out is not None:
            evaluation.save(self.out)  # first: the output may be a pipe that its reader closes
        views = "" if evaluation.views == 1 else f"; logits averaged over {evaluation.views} views"
        show(f"weights: {run.weights}; calibration: {evaluation.calibration}{views}")
        for table in (score_table, class_table, confusion_table):
            if table is not class_table or len(run.counts) <= self.classes:
                show(f"{table(evaluation)}\n")
        if self.out is not None:
            print(f"evaluation: {self.out}")


def command(arguments: Sequence[str]) -> Any:
    """Return the command, with options for the settings of the data set in ``arguments``."""
    named = [part for name, part in named_parts(arguments).items() if name == "data"]
    settings = settings_of_data(named) if named else {}
    return with_settings(
        EvaluateCommand,
        {name: item for name, item in settings.items() if name != "data_root"},
        recipe=recipe_of_data(named),
    )
