"""Curvature of single classes at the deferral and at the end of training, measured with one fixed operator.

The operator is the Hessian of unweighted cross-entropy over the first 256 training images of a class (or all,
if there are fewer), without augmentation. With batch normalization the curvature depends on the scale of the
weights, and a negative eigenvalue indicates a saddle point only where the gradient is small. Therefore loss,
gradient norm and weight norm are recorded too.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.late_ascent.plan import Arm, Setup
from benchmarks.late_ascent.records import FOLDER, Unit
from benchmarks.late_ascent.runs import place_of
from fastsam import spectral_density
from fastsam.curvature.operators.base import ResolutionError
from fastsam.files import write_text
from fastsam.longtail.build import build_network
from fastsam.longtail.data import LongTailData
from fastsam.longtail.trained import TrainedRun
from fastsam.threads import cpu_threads

IMAGES = 256
STEPS = 40
CLASSES_OF_A_GROUP = 3


def spectra_path(unit: Unit) -> Path:
    """Return the path of a seed's spectra."""
    return FOLDER / unit.setup / unit.method / f"spectra-seed-{unit.seed}.json"


def measure_curvature(setup: Setup, unit: Unit, arms: dict[str, Arm], cache: Path) -> None:
    """Measure the spectra of a seed and write them.

    Args:
        setup: the setup.
        unit: a unit whose networks are in ``cache``.
        arms: trained arms by their keys in the record, ``sgd`` and ``sam``.
        cache: folder of the runs.
    """
    folder = unit.runs(cache)
    places = {"switch": folder / "base" / f"epoch-{setup.defer}.pt"}
    places |= {name: place_of(arm, folder) for name, arm in arms.items()}
    with cpu_threads(1):
        record = {name: class_spectra(TrainedRun.load(place)) for name, place in places.items()}
        record["initialization"] = _initial_gradients(TrainedRun.load(places["switch"]))
    write_text(spectra_path(unit), json.dumps(record, indent=1) + "\n")


def head_and_tail(data: LongTailData) -> dict[str, list[int]]:
    """Return the labels of the three largest and the three smallest classes."""
    by_count = np.argsort(-data.counts, kind="stable").tolist()
    return {"head": by_count[:CLASSES_OF_A_GROUP], "tail": by_count[-CLASSES_OF_A_GROUP:]}


def class_spectra(run: TrainedRun) -> dict[str, Any]:
    """Return the spectra of the head and the tail classes of a trained network."""
    data = run.data()
    return {
        group: {str(label): _spectrum(run.network, *_class_batch(data, label)) for label in labels}
        for group, labels in head_and_tail(data).items()
    }


def _spectrum(network: nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, Any]:
    measured = partial(
        spectral_density,
        *(network, nn.CrossEntropyLoss(), (inputs, targets)),
        steps=STEPS,
        probes=2,
        progress=False,
    )
    precision = "float32"
    try:
        found = measured()
    except ResolutionError:  # a class that the network fits almost exactly, at a loss of about 1e-7
        precision = "float64"
        found = measured(dtype=torch.float64)
    return {
        "images": len(targets),
        "precision": precision,
        "lambda_min": found.lambda_min,
        "lambda_min_residual": found.lambda_min_residual,
        "lambda_max": found.lambda_max,
        "lambda_max_residual": found.lambda_max_residual,
        "trace": found.trace,
        "trace_stderr": found.trace_stderr,
        "loss": found.loss,
        "gradient_norm": found.gradient_norm,
        "weight_norm": found.weight_norm,
    }


def _initial_gradients(run: TrainedRun) -> dict[str, float]:
    """Return the gradient norm of each class at the initial weights.

    Gradients are computed in training mode, because there are no running statistics yet.
    """
    config, data = run.checkpoint.config, run.data()
    network = build_network(config, data.num_classes, data.test.channels)
    norms = {}
    for label in (label for group in head_and_tail(data).values() for label in group):
        inputs, targets = _class_batch(data, label)
        loss = nn.functional.cross_entropy(run.logit_scale * network(inputs), targets)
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        norms[str(label)] = float(torch.cat([g.flatten() for g in gradients]).norm())
    return norms


def _class_batch(data: LongTailData, label: int) -> tuple[Tensor, Tensor]:
    """Return the first training images of a class, without augmentation."""
    members = np.flatnonzero(data.train.targets == label)[:IMAGES]
    (batch,) = data.train.batches([members], None, torch.device("cpu"))
    return batch.inputs, batch.targets
