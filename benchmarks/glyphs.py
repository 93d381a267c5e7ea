"""How hard glyphs are: simple classifiers, a balanced set, a long tail, ten times the images."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import save
from fastsam.files import write_text
from fastsam.longtail import Trainer, recipe
from fastsam.longtail.data.dataset import TensorImages
from fastsam.longtail.data.glyphs import GlyphSpec, load_glyphs_lt

TEST = 200
"""Test images of each class of ten; a tenth of that of a hundred."""
BATCH = 64


@dataclass(frozen=True)
class Training:
    """One network on one cut of the data.

    Attributes:
        method: ``loss[-rule]``.
        imbalance: largest over smallest class count.
        times: training images, in multiples of the base set's.
        epochs: epochs, in multiples of the balanced training's.
        model: network.
        channels_last: channels together in memory; faster here where there are many of them.
    """

    method: str = "ce"
    imbalance: float = 1.0
    times: int = 1
    epochs: float = 1.0
    model: str = "resnet8"
    channels_last: bool = False


TRAININGS = {
    "balanced": Training(),
    # A quarter of the images, twice the epochs.
    "ce at 100": Training(imbalance=100.0, epochs=2.0),
    "ce-drw at 100": Training(method="ce-drw", imbalance=100.0, epochs=2.0),
    # Twice the channels, and 7.5 times the steps of "balanced".
    "wider, ten times the images": Training(
        times=10, epochs=0.75, model="resnet8-w32", channels_last=True
    ),
    # The network of CIFAR-LT: hours on a CPU, unless it is cut short.
    "balanced, resnet32": Training(model="resnet32", channels_last=True),
}
"""Trainings, by the name of the part."""
USUAL = ("simple", "balanced", "ce at 100", "ce-drw at 100", "wider, ten times the images")
"""Parts that run if none are named."""


@dataclass(frozen=True)
class Glyphs:
    """Accuracy on glyphs of what is said in each part, one seed, last epoch.

    Trainings have the recipe's schedule in proportion to their epochs.
    """

    classes: int = 10
    """10 or 100."""
    per_class: int = 500
    """Training images of each class (of the largest one where there is a tail)."""
    epochs: int = 24
    """Epochs of the balanced training."""
    parts: tuple[str, ...] = USUAL
    """Parts to run; finished ones are not run again."""
    cache: Path = Path("runs/glyphs")
    """Finished parts are kept here."""
    save: bool = False
    """Write the results to benchmarks/results/."""

    def run(self) -> None:
        """Run what is not in the cache, print, and save if asked."""
        results = {name: self._part(name) for name in self.parts}
        for name, result in results.items():
            print(name, json.dumps(result, ensure_ascii=False))
        if self.save:
            settings = {
                "data": f"glyphs{self.classes}",
                "per_class": self.per_class,
                "test_per_class": self._spec(1).test,
                "epochs_balanced": self.epochs,
                "batch_size": BATCH,
                "checkpoint": "last epoch",
                "seed": 0,
            }
            case = f"glyphs{self.classes}-{self.per_class}-{self.epochs}"
            print(f"wrote {save(case, {**settings, 'parts': results})}")

    def _spec(self, times: int) -> GlyphSpec:
        return GlyphSpec(
            num_classes=self.classes,
            train=self.per_class * times,
            validation=0,
            test=TEST * 10 // self.classes,
        )

    def _part(self, name: str) -> dict[str, Any]:
        file = self.cache / f"{self.classes}-{self.per_class}-{self.epochs} {name}.json"
        if file.is_file():
            kept: dict[str, Any] = json.loads(file.read_text())
            return kept
        result = self._simple() if name == "simple" else self._train(TRAININGS[name])
        write_text(file, json.dumps(result))
        return result

    def _simple(self) -> dict[str, Any]:
        """Nearest neighbour and a linear model on pixels, balanced set."""
        data = load_glyphs_lt(self._spec(1), imbalance=1.0)
        x, y = _pixels(data.train)
        queries, wanted = _pixels(data.test)
        nearest = torch.cat(
            [y[torch.cdist(part, x).argmin(dim=1)] for part in torch.split(queries, 500)]
        )
        # Ridge regression on one-hot classes; the best of some strengths on the test set bounds it.
        gram = x.T @ x
        linear = {}
        for strength in (1e1, 1e2, 1e3, 1e4):
            targets = torch.nn.functional.one_hot(y, self.classes).float()
            weights = torch.linalg.solve(gram + strength * torch.eye(len(gram)), x.T @ targets)
            linear[strength] = _percent((queries @ weights).argmax(dim=1) == wanted)
        return {"1-nn": _percent(nearest == wanted), "linear, best": max(linear.values())}

    def _train(self, training: Training) -> dict[str, Any]:
        data = load_glyphs_lt(self._spec(training.times), imbalance=training.imbalance)
        config = recipe(
            f"glyphs{self.classes}-lt",
            training.method,
            "sgd",
            model=training.model,
            imbalance=training.imbalance,
            epochs=max(round(self.epochs * training.epochs), 1),
            batch_size=BATCH,
            channels_last=training.channels_last,
            threads=torch.get_num_threads(),
        ).config()
        result = Trainer(config, data=data).fit()
        if result.unseen is None:
            raise AssertionError("glyphs have a second test set")
        return {
            "model": config.model,
            "epochs": config.epochs,
            "training_images": len(data.train),
            "accuracy": result.test.accuracy,
            "groups": result.test.groups,
            "per_class": result.test.per_class,
            "train_accuracy": result.history[-1].train_accuracy,
            "unseen_faces": result.unseen.accuracy,
            "seconds": result.seconds,
        }


def _pixels(images: Any) -> tuple[Tensor, Tensor]:
    """Normalised pixels as rows, and classes."""
    if not isinstance(images, TensorImages):
        raise AssertionError("glyphs are kept in memory")
    order = [np.arange(len(images))]
    batch = next(
        iter(images.batches(order, augment=False, seed=0, epoch=0, device=torch.device("cpu")))
    )
    return batch.inputs.flatten(1), batch.targets


def _percent(right: Tensor) -> float:
    return 100.0 * float(right.double().mean())
