"""fastsam demo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Demo:
    """Train with SGD and with SAM on handwritten digits, compare, write report.html.

    Takes a minute or two on one CPU core and downloads nothing.
    """

    out: Path = Path("demo")
    """Folder for runs, spectra and report."""
    seed: int = 0
    """Seed of the training."""
    epochs: int | None = None
    """Epochs of each training; by default those of the recipe."""
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
            epochs=self.epochs,
            overwrite=self.overwrite,
            progress=not self.quiet,
        )


def command(arguments: Sequence[str]) -> type[Demo]:
    """The command, which has the same options for all arguments."""
    return Demo
