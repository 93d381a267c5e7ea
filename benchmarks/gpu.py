"""The cases of gpu_suite.sh with their settings, for machines without tyro.

``python -m benchmarks.gpu CASE`` writes results to the folder in the environment variable OUT as soon as they
exist. PEERS is a folder with ``sam.py``, the reference implementation of SAM, and packages to compare with.
FASHION is a folder with the archives of Fashion-MNIST. ``SIZES=small`` runs every case with tiny sizes on the
CPU, to rehearse it without a GPU.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from benchmarks.data_path import DataPath
from benchmarks.eigenpairs import EigenpairRuns
from benchmarks.epoch import EpochTime
from benchmarks.estimators import Estimators
from benchmarks.late_ascent.full_size import FullSize
from benchmarks.late_phase import LatePhase
from benchmarks.machine import refuse_fallback
from benchmarks.sam_step import SamStep
from benchmarks.spectrum import Spectra
from benchmarks.throughput import Throughput
from benchmarks.tracking import Tracking
from benchmarks.train_step import TrainStep
from fastsam.longtail.data.subset import longtail_counts

OUT = Path(os.environ.get("OUT", "build/gpu"))


def _folder(variable: str) -> Path | None:
    return Path(os.environ[variable]) if os.environ.get(variable) else None


PEERS, FASHION = _folder("PEERS"), _folder("FASHION")


class Run(Protocol):
    """A benchmark with its settings."""

    def run(self) -> None:
        """Measure, print and save."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the cases. Those of a GPU fit four minutes a case on an H200."""

    device: str
    shapes: tuple[str, ...]
    compiled_shapes: tuple[str, ...]
    sam: dict[str, Any]
    small_network: str
    large_network: str
    train_rounds: int
    late: dict[str, Any]
    small_spectrum: dict[str, Any]
    large_spectrum: dict[str, Any]
    sweep_parameters: int
    classes: dict[str, Any]
    eigenpairs: dict[str, Any]
    estimators: dict[str, Any]
    tracking: dict[str, Any]
    epoch: dict[str, Any]
    data_path: dict[str, Any]
    throughput: dict[str, Any]
    experiment: dict[str, Any]


FULL = Sizes(
    device="cuda",
    shapes=("resnet32", "resnet50", "vit-b16", "one-25M"),
    compiled_shapes=("resnet32", "resnet50", "one-25M"),
    sam={"rounds": 6, "calls": 200},
    small_network="resnet32",
    large_network="resnet50",
    train_rounds=6,
    late={
        "cases": ("resnet32", "one-25M"),
        "rounds": 11,
        "runs": 7,
        "model": "resnet32",
        "batch_size": 128,
        "steps": 200,
    },
    small_spectrum={"model": "resnet32", "steps": 100, "batch_size": 128, "rounds": 2},
    large_spectrum={
        "model": "resnet50",
        "pixels": 224,
        "steps": 50,
        "batch_size": 64,
        "rounds": 1,
    },
    sweep_parameters=25_000_000,
    classes={
        "counts": tuple(longtail_counts(5000, 10, 100.0).tolist()),
        "steps": 40,
        "batch_size": 256,
        "rounds": 1,
    },
    eigenpairs={"model": "resnet32", "images": 128, "rounds": 2},
    estimators={"seeds": 20},
    tracking={},
    epoch={"workers": 8},
    data_path={"rounds": 5},
    throughput={},
    experiment={},
)

SMALL = Sizes(
    device="cpu",
    shapes=("95x1e1", "1x1e5"),
    compiled_shapes=("95x1e1",),
    sam={"rounds": 6, "calls": 2, "threads": (1,)},
    small_network="resnet8",
    large_network="resnet8",
    train_rounds=1,
    late={
        "cases": ("1x1e3",),
        "threads": (1,),
        "rounds": 6,
        "runs": 2,
        "model": "resnet8",
        "batch_size": 2,
        "steps": 10,
    },
    small_spectrum={"model": "resnet8", "steps": 40, "batch_size": 2, "rounds": 1, "pixels": 8},
    large_spectrum={"model": "resnet8", "steps": 40, "batch_size": 1, "rounds": 1, "pixels": 16},
    sweep_parameters=10_000,
    classes={
        "model": "resnet8",
        "counts": (3, 2),
        "steps": 3,
        "batch_size": 2,
        "rounds": 1,
        "pixels": 8,
    },
    eigenpairs={"images": 2, "rounds": 1, "counts": (1,)},
    estimators={"seeds": 2, "epochs": 1, "samples": 100},
    tracking={"steps": 3, "batch_size": 16},
    epoch={"n_max": 100, "model": "resnet8", "workers": 1, "epochs": 1},
    # 32 images take far longer than the 10 ms in which the system counts CPU time.
    data_path={"images": 4, "batch_size": 32, "batches": 1, "rounds": 1},
    throughput={
        "optimizers": ("sam",),
        "n_max": 100,
        "model": "resnet8",
        "file_model": "resnet8",
        "images": 16,
        "different": 4,
        "size": 32,
        "file_batch_size": 8,
        "workers": 1,
        "precision": "float32",
        "epochs": 2,
    },
    experiment={"n_max": 100, "model": "resnet8", "epochs": 5},
)


def _sam(sizes: Sizes, **settings: Any) -> SamStep:
    reference = PEERS / "sam.py" if PEERS is not None else None
    if reference is None or not reference.is_file():
        print("skipping the reference implementation: PEERS contains no sam.py")
        reference = None
    options = {"bases": ("SGD", "AdamW"), "cases": sizes.shapes, **sizes.sam, **settings}
    return SamStep(reference=reference, device=sizes.device, out=OUT, **options)


def sam_step(sizes: Sizes) -> Iterator[Run]:
    """Time everything outside forward and backward, in float32."""
    yield _sam(sizes)


def sam_bfloat16(sizes: Sizes) -> Iterator[Run]:
    """Time the same with weights, gradients and state in bfloat16."""
    yield _sam(sizes, dtype="bfloat16")


def sam_compiled(sizes: Sizes) -> Iterator[Run]:
    """Time the same against ``torch.compile``, whose compilation takes minutes."""
    yield _sam(sizes, cases=sizes.compiled_shapes, bases=("SGD",), compile=True)


def profile(sizes: Sizes) -> Iterator[Run]:
    """Run a few steps on one large tensor, for a profiler."""
    yield SamStep(cases=sizes.shapes[-1:], bases=("SGD",), rounds=1, device=sizes.device)


def _steps(sizes: Sizes, network: str, *ways: Any) -> TrainStep:
    return TrainStep(
        cases=(network,),
        optimizers=("sgd", "sam"),
        ways=ways,
        rounds=sizes.train_rounds,
        device=sizes.device,
        out=OUT,
    )


def train_small(sizes: Sizes) -> Iterator[Run]:
    """Time whole training steps of ResNet-32: captured, eager, the trainer's, and a typical script's."""
    yield _steps(sizes, sizes.small_network, "captured", "eager", "trainer", "script")


def train_large(sizes: Sizes) -> Iterator[Run]:
    """Time whole training steps of ResNet-50, likewise."""
    yield _steps(sizes, sizes.large_network, "captured", "eager", "trainer", "script")


def train_compiled(sizes: Sizes) -> Iterator[Run]:
    """Time captured and compiled steps of ResNet-32; the compilation takes a minute."""
    yield _steps(sizes, sizes.small_network, "captured", "compiled", "script")


def late(sizes: Sizes) -> Iterator[Run]:
    """Time steps without an ascent, and runs that ascend in their last fifth against SGD."""
    yield LatePhase(device=sizes.device, out=OUT, **sizes.late)


def _spectra(sizes: Sizes, settings: dict[str, Any], **more: Any) -> Spectra:
    return Spectra(
        peers=PEERS,
        only=("pyhessian", "curvlinops"),
        device=sizes.device,
        out=OUT,
        **settings,
        **more,
    )


def spectrum_small(sizes: Sizes) -> Iterator[Run]:
    """Measure spectra of ResNet-32 on batches of CIFAR's size, and the sweeps of a large basis."""
    run = _spectra(sizes, sizes.small_spectrum, sweep_parameters=sizes.sweep_parameters)
    for part in ("density", "sweeps", "correctness", "products"):
        yield replace(run, part=part)


def spectrum_large(sizes: Sizes) -> Iterator[Run]:
    """Measure spectra of ResNet-50 on batches of ImageNet's size."""
    yield _spectra(sizes, sizes.large_spectrum, part="density")


def spectrum_probes(sizes: Sizes) -> Iterator[Run]:
    """Measure spectra of ResNet-32 with four probes, and extremes, trace and density together."""
    run = _spectra(sizes, sizes.small_spectrum)
    yield replace(run, part="density", probes=4)
    yield replace(run, part="everything", only=("pyhessian",))


def classes(sizes: Sizes) -> Iterator[Run]:
    """Measure all ten classes of CIFAR-10-LT's size, imbalance 100, without peers."""
    yield Spectra(part="classes", device=sizes.device, out=OUT, **sizes.classes)


def eigenpairs(sizes: Sizes) -> Iterator[Run]:
    """Compare eigenpairs of a network's Hessian with ARPACK."""
    yield EigenpairRuns(dimension=0, peers=PEERS, device=sizes.device, out=OUT, **sizes.eigenpairs)


def estimators(sizes: Sizes) -> Iterator[Run]:
    """Measure the error of stochastic estimators against explicit matrices."""
    yield Estimators(device=sizes.device, out=OUT, **sizes.estimators)


def tracking(sizes: Sizes) -> Iterator[Run]:
    """Measure the overhead and the error of curvature tracking."""
    yield Tracking(device=sizes.device, out=OUT, **sizes.tracking)


def epoch(sizes: Sizes) -> Iterator[Run]:
    """Time an epoch of ResNet-32 at the size of CIFAR-10-LT."""
    yield EpochTime(device=sizes.device, out=OUT, **sizes.epoch)


def data_path(sizes: Sizes) -> Iterator[Run]:
    """Time the workers, and the part of the data path that runs on the device."""
    yield DataPath(device=sizes.device, out=OUT, **sizes.data_path)


def throughput(sizes: Sizes) -> Iterator[Run]:
    """Measure the trainer's images per second and its waiting for data."""
    yield Throughput(device=sizes.device, data_root=FASHION, out=OUT, **sizes.throughput)


def experiment(sizes: Sizes) -> Iterator[Run]:
    """Train SGD and SAM in the late phase, with the tuned settings, on the 5,000-image set."""
    yield FullSize(device=sizes.device, data_root=FASHION, out=OUT, **sizes.experiment)


CASES: dict[str, Callable[[Sizes], Iterator[Run]]] = {
    case.__name__: case
    for case in (
        sam_step,
        sam_bfloat16,
        sam_compiled,
        profile,
        train_small,
        train_large,
        train_compiled,
        late,
        spectrum_small,
        spectrum_large,
        spectrum_probes,
        classes,
        eigenpairs,
        estimators,
        tracking,
        epoch,
        data_path,
        throughput,
        experiment,
    )
}


_FLOAT32 = ("spectrum", "classes", "eigenpairs", "tracking", "experiment")
"""Cases that measure curvature, and so must not round factors to TF32."""


def main(case: str, size: Literal["full", "small"]) -> None:
    """Run a case."""
    sizes = {"full": FULL, "small": SMALL}[size]
    refuse_fallback(sizes.device)
    # Peers and fastsam compute in float32 alike; the extremes of a spectrum must agree to 2 %.
    torch.backends.cudnn.allow_tf32 = not case.startswith(_FLOAT32)
    for run in CASES[case](sizes):
        run.run()


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in CASES:
        raise SystemExit(
            f"usage: python -m benchmarks.gpu CASE, where CASE is one of {', '.join(CASES)}"
        )
    chosen = os.environ.get("SIZES", "full")
    if chosen not in ("full", "small"):
        raise SystemExit(f"SIZES is {chosen!r}; expected full or small")
    main(sys.argv[1], "small" if chosen == "small" else "full")
