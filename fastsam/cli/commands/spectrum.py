"""fastsam spectrum."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tyro.conf import Positional

from fastsam.cli.output import show
from fastsam.files import locked, write_text
from fastsam.longtail.build import load_configured
from fastsam.longtail.checkpoint import Checkpoint
from fastsam.longtail.landscape import landscape
from fastsam.longtail.runtime import chosen_device
from fastsam.longtail.training import check_free


@dataclass(frozen=True)
class SpectrumCommand:
    """Hessian spectrum of the loss of single classes at a trained network's weights."""

    checkpoint: Positional[Path]
    """checkpoint.pt, or the folder of the run."""
    classes: tuple[int | Literal["all"], ...] = (0, 9)
    """Labels of the classes; `all` for the images of every class together."""
    split: str = "train"
    """Dataset split: train, validation or test."""
    loss: str = "ce"
    """Cross-entropy without weights (ce), or the loss of the last epoch (as-trained)."""
    augment: str = "none"
    """none: clean images; K: K fixed augmented copies of each image; redrawn: a new augmentation at
    every product, which is no fixed operator and serves only for comparison."""
    steps: int = 80
    """Lanczos steps."""
    probes: int = 1
    """Random start vectors."""
    seed: int = 0
    """Seed of probes and draws."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of weights, images and products; a class that is fitted perfectly needs float64."""
    device: str = "cpu"
    """Device: cpu, cuda, cuda:1, ..."""
    data_root: str | None = None
    """Folder with the data, if it is not where it was at the training."""
    out: Path | None = None
    """Folder for the spectra as JSON and a figure of them."""
    overwrite: bool = False
    """The folder may hold files already."""
    quiet: bool = False
    """No progress bar."""

    def run(self) -> None:
        """Compute, print and, if asked, write the spectra."""
        if self.out is not None:
            check_free(self.out, allowed=self.overwrite, flags="--overwrite")
        with nullcontext() if self.out is None else locked(self.out):
            self._compute()

    def _compute(self) -> None:
        from fastsam.report import spectrum_table
        from fastsam.report.figures import spectra_panels

        device = chosen_device(self.device)
        checkpoint = Checkpoint.load(self.checkpoint)
        config = checkpoint.config
        if self.data_root is not None:
            config = config.replace(data_root=self.data_root)
        spectra = landscape(
            checkpoint.build_model().to(device),
            load_configured(config, progress=not self.quiet),
            checkpoint,
            self.classes,
            split=self.split,
            loss=self.loss,
            augment=self.augment,
            steps=self.steps,
            probes=self.probes,
            seed=self.seed,
            dtype=getattr(torch, self.dtype),
            progress=not self.quiet,
        )
        for item in spectra:
            show(item.subject.title)
        show(spectrum_table(spectra))
        if self.out is not None:
            for item in spectra:
                item.save(self.out)
            write_text(self.out / "spectra.svg", spectra_panels(spectra))
            print(f"spectra: {self.out}")


def command(arguments: Sequence[str]) -> type[SpectrumCommand]:
    """The command, which has the same options for all arguments."""
    return SpectrumCommand
