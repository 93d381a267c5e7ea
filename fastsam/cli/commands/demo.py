"""fastsam demo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Demo:
    """What helps rare classes? Compare SGD and SAM on long-tailed handwritten digits over paired seeds.

    Every way to train is judged as trained and after calibration, with 95 % intervals. Then come Hessian
    spectra of a head and a tail class, and report.html. Takes three to four minutes on two CPU cores and
    downloads nothing.
    """

    out: Path = Path("demo")
    """Folder for runs, spectra and report."""
    seed: int = 0
    """First seed of subset, weights and batches."""
    seeds: int = 6
    """Number of seeds; intervals need two."""
    epochs: int = 60
    """Epochs of each training."""
    overwrite: bool = False
    """Replace an earlier demo."""
    quiet: bool = False
    """No progress bars."""

    def run(self) -> None:
        """Run the demo."""
        from fastsam.demo import run_demo

        run_demo(
            self.out,
            seed=self.seed,
            seeds=self.seeds,
            epochs=self.epochs,
            overwrite=self.overwrite,
            progress=not self.quiet,
        )


def command(arguments: Sequence[str]) -> type[Demo]:
    """The command, which has the same options for all arguments."""
    return Demo
