"""The command ``fastsam predict``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Literal

from tyro.conf import Positional, arg

from fastsam.cli.output import check_output
from fastsam.files import write_atomically
from fastsam.longtail.data.preprocessing import Views
from fastsam.longtail.errors import UsageError
from fastsam.longtail.trained import TrainedRun, predict_files
from fastsam.longtail.trained.prediction_text import WRITERS
from fastsam.text import notice


@dataclass(frozen=True)
class PredictCommand:
    """Predict the classes of image files with a trained network."""

    run_folder: Positional[Annotated[Path, arg(metavar="RUN")]]
    """Folder of a run of `fastsam train`, or a checkpoint file in it."""
    paths: Positional[
        Annotated[tuple[Path, ...], arg(metavar="PATH ...", help_behavior_hint="(required)")]
    ]
    """Image files, or folders that are searched recursively for image files."""
    out: Annotated[
        Path | None, arg(metavar="FILE", help_behavior_hint="(default: standard output)")
    ] = None
    """Output file, NAME.csv or NAME.json."""
    format: Annotated[
        Literal["csv", "json"] | None,
        arg(metavar="csv|json", help_behavior_hint="(default: suffix of --out, else csv)"),
    ] = None
    """Output format."""
    top: Annotated[
        int | None, arg(metavar="K", help_behavior_hint="(default: probabilities of all classes)")
    ] = None
    """Write only the K most probable classes of each image."""
    batch_size: int = 64
    """Images per batch."""
    workers: int = 0
    """Worker processes that read images; 0 reads in the main process."""
    evaluation_views: Views = 1
    """Crops of each image whose logits are averaged: 1, or 5 (center and corners of a larger image)."""
    corrupt: Literal["stop", "skip"] = "stop"
    """What to do with an unreadable image: stop with an error, or skip it with a warning."""
    device: str = "cpu"
    """Device: cpu, cuda, cuda:1, ..."""
    uncalibrated: bool = False
    """Ignore the run's calibration by `fastsam calibrate`."""
    data_root: Annotated[str | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """Folder with the data set. Only checkpoints of older versions need it."""

    def run(self) -> None:
        """Predict the images and write each prediction as soon as it is computed."""
        write = WRITERS[self._format()]
        check_output(self.out, inputs=self.paths)
        run = TrainedRun.load(
            self.run_folder,
            device=self.device,
            data_root=self.data_root,
            calibrated=not self.uncalibrated,
        )
        if not run.finished:
            notice(f"weights: {run.weights}")
        found = predict_files(
            run,
            self.paths,
            batch_size=self.batch_size,
            workers=self.workers,
            corrupt=self.corrupt,
            views=self.evaluation_views,
        )
        parts = write(found, run.class_names, self.top)
        if self.out is None:
            sys.stdout.writelines(parts)
            sys.stdout.flush()
        else:
            write_atomically(self.out, lambda file: _write(file, parts))

    def _format(self) -> str:
        if self.format is not None:
            return self.format
        if self.out is None:
            return "csv"
        suffix = self.out.suffix.lower().removeprefix(".")
        if suffix not in WRITERS:
            raise UsageError(
                f"cannot infer the format from --out {self.out}; expected a file name that ends in "
                f"{' or '.join(f'.{name}' for name in WRITERS)}. Rename it or pass --format"
            )
        return suffix


def _write(file: IO[bytes], parts: Iterable[str]) -> None:
    for part in parts:
        file.write(part.encode())


def command(arguments: Sequence[str]) -> type[PredictCommand]:
    """Return the command; its options do not depend on ``arguments``."""
    return PredictCommand
