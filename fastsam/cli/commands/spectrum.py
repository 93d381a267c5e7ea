"""The command ``fastsam spectrum``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from tyro.conf import Positional, arg

from fastsam.cli.output import show
from fastsam.files import write_text
from fastsam.longtail.build import load_configured
from fastsam.longtail.checkpoint import Checkpoint
from fastsam.longtail.landscape import landscape, stored_spectra
from fastsam.longtail.runtime import chosen_device
from fastsam.longtail.training import check_free
from fastsam.stopping import StopRequest, stop_signals


@dataclass(frozen=True)
class SpectrumCommand:
    """Compute Hessian spectra of a trained network, for the loss of single classes or of all classes.

    The weights are those that `fastsam evaluate` scores: the best epoch of a run with --select, the average
    of a run with --ema, else the last epoch.

    The same command continues in --out after an interruption: it loads finished spectra, and continues an
    unfinished one from its Lanczos steps.
    """

    checkpoint: Annotated[Positional[Path], arg(metavar="RUN")]
    """Folder of a run of `fastsam train`, or a checkpoint file in it."""
    classes: Annotated[
        tuple[int | Literal["all"], ...] | None,
        arg(
            metavar="INT|all ...",
            help_behavior_hint="(default: the classes with the most and the fewest training images)",
        ),
    ] = None
    """Labels of the classes to measure, one spectrum each; `all` measures all classes together."""
    split: str = "train"
    """Dataset split: train, validation or test."""
    loss: str = "ce"
    """Loss: ce (cross-entropy without class weights) or as-trained (loss of the last epoch)."""
    augment: Annotated[
        str,
        arg(
            help="none: clean images; K: K fixed augmented copies of each image; redrawn: a new "
            "augmentation at every product (not a valid operator, for comparison only).",
            metavar="none|K|redrawn",
        ),
    ] = "none"
    steps: int = 80
    """Lanczos steps."""
    probes: int = 1
    """Number of random start vectors."""
    seed: int = 0
    """Seed of start vectors and augmentation."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of weights, images and products. Use float64 for a class that is fitted perfectly."""
    device: str = "cpu"
    """Device: cpu, cuda, cuda:1, ..."""
    data_root: Annotated[
        str | None, arg(metavar="DIR", help_behavior_hint="(default: as in training)")
    ] = None
    """Folder with the data."""
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """Output folder for the spectra as JSON and a figure of them; without it nothing is saved."""
    overwrite: bool = False
    """Allow an output folder that is not empty, and compute the spectra again that it already has."""
    quiet: bool = False
    """Hide the progress bar."""

    def run(self) -> None:
        """Compute the spectra, print them, and write them to ``out`` if set."""
        with stop_signals() as stop:
            self._compute(stop)

    def _compute(self, stop: StopRequest) -> None:
        from fastsam.report import spectrum_table
        from fastsam.report.figures import spectra_panels

        device = chosen_device(self.device)
        checkpoint = Checkpoint.load(self.checkpoint)
        checkpoint.check_whole(self.checkpoint)
        config = checkpoint.config
        if self.data_root is not None:
            config = config.replace(data_root=self.data_root)
        classes = _largest_and_smallest(checkpoint) if self.classes is None else self.classes
        classes = tuple(dict.fromkeys(classes))
        named = {"split": self.split, "loss": self.loss, "augment": self.augment}
        if self.out is not None:
            stored = stored_spectra(self.out, classes, **named)
            check_free(self.out, allowed=self.overwrite or bool(stored), flags="--overwrite")
            if stored and not self.overwrite:
                print(f"Continuing the spectra in {self.out}.")
        spectra = landscape(
            checkpoint.build_model(judged=True).to(device),
            load_configured(config, progress=not self.quiet),
            checkpoint,
            classes,
            **named,
            epoch=checkpoint.judged_epoch,
            steps=self.steps,
            probes=self.probes,
            seed=self.seed,
            dtype=getattr(torch, self.dtype),
            out=self.out,
            overwrite=self.overwrite,
            stop=stop,
            progress=not self.quiet,
        )
        for item in spectra:
            show(item.subject.title)
        show(spectrum_table(spectra))
        if self.out is not None:
            write_text(self.out / "spectra.svg", spectra_panels(spectra))
            print(f"spectra: {self.out}")


def _largest_and_smallest(checkpoint: Checkpoint) -> tuple[int, int]:
    """Return the classes with the most and the fewest training images; without counts, the outer labels."""
    counts = checkpoint.counts or range(checkpoint.num_classes, 0, -1)
    order = sorted(range(len(counts)), key=lambda label: -counts[label])
    return order[0], order[-1]


def command(arguments: Sequence[str]) -> type[SpectrumCommand]:
    """Return the command; its options do not depend on ``arguments``."""
    return SpectrumCommand
