"""The pictures of docs/spectra/reading.md, from runs on digits with fixed seeds."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.machine import save
from fastsam.curvature import Spectrum
from fastsam.curvature.plots import plot_density, plot_spectra
from fastsam.files import write_bytes
from fastsam.longtail import Checkpoint, Trainer, recipe
from fastsam.longtail.data import LongTailData
from fastsam.longtail.landscape import landscape

FOLDER = Path(__file__).parents[1] / "docs" / "spectra"
HEAD, TAIL = 0, 9
DATA, METHOD, OPTIMIZERS = "digits-lt", "ce-drw", ("sgd", "sam")
STEPS = (5, 10, 20, 40, 80)


@dataclass(frozen=True)
class Figures:
    """Draw the pictures of docs/spectra/reading.md and keep their numbers in benchmarks/results/."""

    epochs: int = 60
    """Epochs of each run."""

    def run(self) -> None:
        """Train with SGD and SAM, compute the spectra, and write pictures and numbers."""
        import matplotlib

        matplotlib.use("Agg")
        runs = {name: Run.trained(name, epochs=self.epochs) for name in OPTIMIZERS}
        whole = {name: run.spectrum("all") for name, run in runs.items()}
        sgd = runs["sgd"]
        classes = {
            "class 0 (head)": sgd.spectrum(HEAD),
            "class 9 (tail)": sgd.spectrum(TAIL),
        }
        drawn = {
            "class 9, fixed": sgd.spectrum(TAIL, augment="2"),
            "class 9, re-drawn": sgd.spectrum(TAIL, augment="redrawn"),
        }
        _write("density", _density(whole["sgd"]))
        _write("classes", _panels(classes))
        _write("redrawn", _panels(drawn))
        _write("steps", _steps({steps: _prefix(whole["sgd"], steps) for steps in STEPS}))
        everything = {**{f"all, {name}": s for name, s in whole.items()}, **classes, **drawn}
        save("figures", {"data": DATA, "method": METHOD, "rows": _rows(everything)})


@dataclass(frozen=True)
class Run:
    """A trained run, in memory."""

    checkpoint: Checkpoint
    data: LongTailData

    @classmethod
    def trained(cls, optimizer: str, *, epochs: int) -> Run:
        """Train one run with the recipe's settings."""
        with tempfile.TemporaryDirectory() as folder:
            config = recipe(DATA, METHOD, optimizer, epochs=epochs, seed=0).config()
            trainer = Trainer(config, out=folder, progress=False)
            trainer.fit()
            return cls(Checkpoint.load(Path(folder) / "checkpoint.pt"), trainer.data)

    def spectrum(self, label: int | Literal["all"], *, augment: str = "none") -> Spectrum:
        """Return the spectrum of the training images of one class, or of all."""
        (found,) = landscape(
            self.checkpoint.build_model(),
            self.data,
            self.checkpoint,
            [label],
            augment=augment,
            steps=STEPS[-1],
            probes=4,
            progress=False,
        )
        return found.spectrum


def _prefix(spectrum: Spectrum, steps: int) -> Spectrum:
    """Return what the first steps of a run gave: those of a longer run are the same."""
    return replace(
        spectrum,
        alpha=spectrum.alpha[:, :steps],
        beta=spectrum.beta[:, :steps],
        order=np.minimum(spectrum.order, steps),
    )


def _density(spectrum: Spectrum) -> Any:
    """Draw one density with its three regions named."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6))
    plot_density([spectrum], axes=axes)
    for place, text, aligned, height in (
        (spectrum.lambda_min, "lambda_min", "left", 1e-6),
        (0.0, "bulk", "left", 1e-6),
        (spectrum.lambda_max, "lambda_max", "right", 1.0),
    ):
        axes.axvline(place, color="gray", linewidth=0.8, linestyle=":")
        axes.text(place, height, f" {text} ", ha=aligned, fontsize=9, color="dimgray")
    figure.tight_layout()
    return figure


def _panels(spectra: Mapping[str, Spectrum]) -> Any:
    """Draw two spectra side by side, wide enough for the labels of their axes."""
    figure = plot_spectra(spectra, columns=2)
    figure.set_size_inches(9, 3.2)
    figure.tight_layout()
    return figure


def _steps(spectra: Mapping[int, Spectrum]) -> Any:
    """Draw how extremes and mass bounds tighten with the number of steps."""
    from matplotlib import pyplot

    last = spectra[STEPS[-1]]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4))
    for name, marker in (("lambda_max", "o"), ("lambda_min", "s")):
        final = getattr(last, name)
        error = [abs(getattr(spectra[steps], name) - final) / abs(final) for steps in STEPS[:-1]]
        left.plot(STEPS[:-1], np.maximum(error, 1e-8), marker=marker, label=name)
    left.set(yscale="log", xlabel="Lanczos steps", title="relative distance to 80 steps")
    left.legend()
    threshold = 0.05 * last.lambda_min
    bounds = [spectra[steps].mass_below(threshold) for steps in STEPS]
    right.fill_between(
        STEPS, [b.lower for b in bounds], [b.upper for b in bounds], alpha=0.3, label="95 % bounds"
    )
    right.plot(STEPS, [b.value for b in bounds], marker="o", label="mass_below")
    right.set(
        xlabel="Lanczos steps", title=f"share of eigenvalues below {threshold:.3g}", ylim=(0, None)
    )
    right.legend()
    figure.tight_layout()
    return figure


def _rows(spectra: Mapping[str, Spectrum]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "lambda_min": spectrum.lambda_min,
            "lambda_min_residual": spectrum.lambda_min_residual,
            "lambda_max": spectrum.lambda_max,
            "lambda_max_residual": spectrum.lambda_max_residual,
            "ratio": spectrum.ratio,
            "trace": spectrum.trace,
            "trace_stderr": spectrum.trace_stderr,
            "loss": spectrum.loss,
            "gradient_norm": spectrum.gradient_norm,
            "weight_norm": spectrum.weight_norm,
        }
        for name, spectrum in spectra.items()
    ]


def _write(name: str, figure: Any) -> None:
    content = BytesIO()
    # Without metadata the file depends on the drawing alone.
    figure.savefig(content, format="png", dpi=110, metadata={"Software": None})
    write_bytes(FOLDER / f"{name}.png", content.getvalue())
