"""The command ``fastsam demo``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Demo:
    """Compare SGD and SAM on long-tailed handwritten digits over paired seeds.

    Each training method is evaluated as trained and after calibration, with 95 % intervals. The demo then
    measures Hessian spectra of a head and a tail class, and writes report.html. It takes three to four
    minutes on two CPU cores and downloads nothing.
    """

    out: Path = Path("demo")
    """Output folder for runs, spectra and report."""
    seed: int = 0
    """First seed. A seed determines the subset, the initial weights and the batches."""
    seeds: int = 6
    """Number of seeds; intervals need at least two."""
    epochs: int = 60
    """Epochs of each run, at least 10."""
    overwrite: bool = False
    """Replace the results of an earlier demo in the output folder."""
    quiet: bool = False
    """Hide progress bars."""

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
    """Return the command; its options do not depend on ``arguments``."""
    return Demo
