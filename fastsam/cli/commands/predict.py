"""fastsam predict."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Literal

from tyro.conf import Positional, arg

from fastsam.cli.output import check_output
from fastsam.files import write_atomically
from fastsam.longtail.errors import UsageError
from fastsam.longtail.trained import TrainedRun, predict_files
from fastsam.longtail.trained.prediction_text import WRITERS


@dataclass(frozen=True)
class PredictCommand:
    """Predict the classes of image files with a trained network."""

    run_folder: Positional[Annotated[Path, arg(metavar="RUN")]]
    """Folder of a run of `fastsam train`, or the file of a kept checkpoint."""
    paths: Positional[Annotated[tuple[Path, ...], arg(metavar="PATH ...")]]
    """Image files, and folders, which are searched recursively."""
    out: Path | None = None
    """File for the predictions, NAME.csv or NAME.json; default: standard output."""
    format: Literal["csv", "json"] | None = None
    """Format of the predictions; default: that of the suffix of --out, else csv."""
    top: int | None = None
    """Write the K most probable classes of each image; default: the probability of every class."""
    batch_size: int = 64
    """Images that the network is given at once."""
    workers: int = 0
    """Processes that read images; 0 reads in the main process."""
    corrupt: Literal["stop", "skip"] = "stop"
    """At an image that cannot be read: stop, or skip it with a notice."""
    device: str = "cpu"
    """Device: cpu, cuda, cuda:1, ..."""
    uncalibrated: bool = False
    """Leave out the calibration of `fastsam calibrate`, which is applied where the run has one."""
    data_root: str | None = None
    """Folder with the data set; only checkpoints of older versions need it."""

    def run(self) -> None:
        """Predict and write while the images are read."""
        write = WRITERS[self._format()]
        check_output(self.out, inputs=self.paths)
        run = TrainedRun.load(
            self.run_folder,
            device=self.device,
            data_root=self.data_root,
            calibrated=not self.uncalibrated,
        )
        found = predict_files(
            run,
            self.paths,
            batch_size=self.batch_size,
            workers=self.workers,
            corrupt=self.corrupt,
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
                f"--out {self.out} says no format: name a file that ends in "
                f"{' or '.join(f'.{name}' for name in WRITERS)}, or pass --format"
            )
        return suffix


def _write(file: IO[bytes], parts: Iterable[str]) -> None:
    for part in parts:
        file.write(part.encode())


def command(arguments: Sequence[str]) -> type[PredictCommand]:
    """The command, which has the same options for all arguments."""
    return PredictCommand
