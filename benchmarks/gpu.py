"""The cases of gpu_suite.sh with their settings, for machines without tyro.

``python -m benchmarks.gpu CASE`` writes the results to the folder in the environment variable OUT. The folder
in PEERS may contain ``sam.py``, the reference implementation of SAM, and packages to compare with.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks.data_path import DataPath
from benchmarks.epoch import EpochTime
from benchmarks.sam_step import SamStep
from benchmarks.spectrum import Spectra
from benchmarks.train_step import TrainStep
from fastsam.longtail.data.subset import longtail_counts

OUT = Path(os.environ.get("OUT", "build/gpu"))
PEERS = Path(os.environ["PEERS"]) if os.environ.get("PEERS") else None


def sam_step() -> None:
    """Time everything outside forward and backward, from small models to one tensor of 1e9 elements."""
    reference = PEERS / "sam.py" if PEERS is not None else None
    if reference is None or not reference.is_file():
        print("skipping the reference implementation: PEERS contains no sam.py")
        reference = None
    cases = ("resnet32", "resnet18", "vit-s16", "gpt2", "one-25M", "one-1e9")
    SamStep(cases=cases, reference=reference, compile=True, device="cuda", out=OUT).run()


def profile() -> None:
    """Run a few steps on one large tensor, for a profiler."""
    SamStep(cases=("one-25M",), bases=("SGD",), rounds=1, device="cuda").run()


def spectrum() -> None:
    """Measure spectra of ResNet-32: correctness, products, runs with one and four probes, and sweeps."""
    run = Spectra(
        peers=PEERS,
        only=("pyhessian",),
        batch_size=128,
        sweep_parameters=25_000_000,
        device="cuda",
        out=OUT,
    )
    for part in ("correctness", "products", "density", "everything", "sweeps"):
        replace(run, part=part).run()
    replace(run, part="density", probes=4).run()


def classes() -> None:
    """Measure all ten classes of CIFAR-10-LT's size, imbalance 100. Takes minutes, so without peers."""
    counts = tuple(longtail_counts(5000, 10, 100.0).tolist())
    Spectra(part="classes", counts=counts, batch_size=128, rounds=1, device="cuda", out=OUT).run()


def train_step() -> None:
    """Time training steps of ResNet-32 and ResNet-50: captured, eager, and as in typical scripts."""
    TrainStep(cases=("resnet32", "resnet50"), device="cuda", out=OUT).run()


def epoch() -> None:
    """Time an epoch of ResNet-32 at the size of CIFAR-10-LT."""
    EpochTime(device="cuda", out=OUT).run()


def data_path() -> None:
    """Time the workers, and the part of the data path that runs on the device."""
    DataPath(device="cuda", rounds=5, out=OUT).run()


CASES: dict[str, Callable[[], None]] = {
    case.__name__: case
    for case in (sam_step, profile, spectrum, classes, train_step, epoch, data_path)
}

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in CASES:
        raise SystemExit(
            f"usage: python -m benchmarks.gpu CASE, where CASE is one of {', '.join(CASES)}"
        )
    CASES[sys.argv[1]]()
