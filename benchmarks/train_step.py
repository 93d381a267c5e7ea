"""A whole training step: captured as a CUDA graph, eager, and as in typical training scripts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from benchmarks.machine import save
from benchmarks.timing import Ratio, Timing, interleaved
from fastsam import SAM, capture_step
from fastsam.distributed import World
from fastsam.longtail import recipe
from fastsam.longtail.build import build_objective
from fastsam.longtail.data import Batch as ImageBatch
from fastsam.longtail.models import Classifier, build_model
from fastsam.longtail.precision import Precision
from fastsam.longtail.training import Engine, Stepper
from fastsam.optim.plain import PlainSAM

SETTINGS: dict[str, Any] = {"momentum": 0.9, "weight_decay": 2e-4}
LR, RHO = 1e-3, 0.05
STEPS_TO_AGREE = 3
DISAGREEMENT = {None: 0.05, torch.bfloat16: 0.2}
"""Largest distance between two implementations, relative to the distance trained, by dtype of the passes.

Measured for three steps of SAM on ResNet-50, with 16 images of 64 pixels on a CPU. A change of the initial
weights in their last bit moves the result by 0.03 in float32 and by 0.15 in bfloat16. Half of rho moves it by
0.24, twice rho by 0.37, no ascent by 0.38."""
DAMPED = 0.1
"""Weight of the last BatchNorm of a bottleneck block.

With weight 1, a change of the initial weights in their last bit moves the result of three steps by 0.75 with
SGD and by 0.96 with SAM (same images, float32), so that two implementations could not be compared."""

Way = Literal["captured", "compiled", "eager", "trainer", "script"]

Batch = tuple[Tensor, Tensor]
Step = Callable[[Batch], object]
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
MakeStep = Callable[[nn.Module, Batch, torch.dtype | None], Step]


@dataclass(frozen=True)
class Workload:
    """A network and its batch.

    Attributes:
        model: name in ``fastsam.longtail.models``.
        classes: number of classes.
        batch_size: images per batch.
        image_size: height and width of the images in pixels.
        calls: back-to-back steps per sample on a GPU.
        autocast: dtype of the passes; None for float32.
    """

    model: str
    classes: int
    batch_size: int
    image_size: int
    calls: int = 200
    autocast: torch.dtype | None = None


WORKLOADS = {
    "resnet32": Workload("resnet32", classes=10, batch_size=128, image_size=32),
    "resnet50": Workload("resnet50", 1000, 256, image_size=224, calls=20, autocast=torch.bfloat16),
    "resnet8": Workload("resnet8", classes=10, batch_size=32, image_size=16),
}
"""ResNet-32 as for CIFAR-LT, ResNet-50 as for ImageNet-LT, and a small network for quick tests on a CPU."""


@dataclass(frozen=True, kw_only=True)
class TrainStep:
    """Time whole training steps of SGD, SAM and ASAM, and check that implementations agree.

    ``captured`` is :func:`fastsam.capture_step`, ``eager`` is the same without a graph, ``compiled`` is
    eager with ``torch.compile`` of the network, ``trainer`` is the step of :class:`fastsam.longtail.Trainer`,
    and ``script`` is a loop as in the paper's code: SAM tensor by tensor, with loss and accuracy read by the
    host in every step.
    """

    cases: tuple[str, ...] = ("resnet32",)
    """Workloads, by name."""
    optimizers: tuple[Literal["sgd", "sam", "asam"], ...] = ("sgd", "sam", "asam")
    """Optimizers of the captured, compiled and eager steps; trainer and script take SAM."""
    ways: tuple[Way, ...] = ("captured", "eager", "trainer", "script")
    """Implementations to time."""
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    """Device. On the CPU there is no captured step."""
    rounds: int = 7
    """Samples of each contestant."""
    save: bool = False
    """Write the results to benchmarks/results/."""
    out: Path | None = None
    """Write the results to this folder instead."""

    def run(self) -> None:
        """Time the cases, print the results, and save them."""
        unknown = set(self.cases) - set(WORKLOADS)
        if unknown:
            raise SystemExit(
                f"unknown case {sorted(unknown)}; expected some of {sorted(WORKLOADS)}"
            )
        results: dict[str, Any] = {}
        for name in self.cases:
            results[name] = self._case(name, WORKLOADS[name])
            if self.save or self.out is not None:  # after each case, in case of an interruption
                content = {"cases": results}
                print(f"wrote {save('train_step', content, device=self.device, folder=self.out)}")
        differing = [
            f"{contestant} of {name} ({result['relative_disagreement'][contestant]:.1%} of the way trained)"
            for name, result in results.items()
            for contestant in result["disagreeing"]
        ]
        if differing:
            raise AssertionError(
                f"other steps than the first of their kind: {', '.join(differing)}"
            )

    def _case(self, name: str, workload: Workload) -> dict[str, Any]:
        device = torch.device(self.device)
        start = build_model(workload.model, workload.classes).to(device)
        for block in start.modules():
            if isinstance(block, Bottleneck):
                nn.init.constant_(block.bn3.weight, DAMPED)
        if workload.autocast is not None:
            start = start.to(memory_format=torch.channels_last)
        batch = _random_batch(workload, device)
        steps: dict[str, Step] = {}
        left_out: dict[str, str] = {}
        weights: dict[str, list[Tensor]] = {}
        for contestant, make in self._contestants(device).items():
            model = copy.deepcopy(start)
            try:
                step = make(model, batch, workload.autocast)
                for _ in range(STEPS_TO_AGREE):
                    step(batch)
            except torch.OutOfMemoryError:
                left_out[contestant] = "it does not fit in memory beside the others"
            except Exception as error:  # for instance a missing compiler
                if "compiled" not in contestant:
                    raise
                left_out[contestant] = f"{type(error).__name__}: {error}".splitlines()[0]
            if contestant in left_out:
                print(f"{name}: skipped {contestant}: {left_out[contestant]}")
                continue
            steps[contestant] = step
            weights[contestant] = [p.detach().clone() for p in model.parameters()]
        disagreement = _disagreement(weights, list(start.parameters()))
        timings = interleaved(
            {key: _bound(step, batch) for key, step in steps.items()},
            rounds=self.rounds,
            seconds_per_sample=1.0,
            calls=workload.calls if device.type == "cuda" else None,
            device=device,
        )
        print(f"\n{name}: batch {workload.batch_size}, {workload.image_size} pixels, on {device}")
        rows = {
            key: self._row(timing, steps[key], batch, device, captured="captured" in key)
            for key, timing in timings.items()
        }
        for key, row in rows.items():
            row["images_per_second"] = workload.batch_size / row["median"]
            if "sam script" in timings:
                ratio = Ratio.of(timings["sam script"].wall, timings[key].wall)
                row["script_takes_times"] = ratio.as_dict()
        for key, row in rows.items():
            nodes = (
                f"  {row['nodes']} nodes, idle {row['idle_per_node'] * 1e6:.2f} us each"
                if "nodes" in row
                else ""
            )
            print(
                f"  {key:16s} {row['median'] * 1e3:10.3f} ms {row['images_per_second']:10.0f} images/s{nodes}"
            )
        return {
            "workload": {**vars(workload), "autocast": str(workload.autocast)},
            "relative_disagreement": disagreement,
            "disagreeing": [
                contestant
                for contestant, distance in disagreement.items()
                if not distance < DISAGREEMENT[workload.autocast]
            ],
            "left_out": left_out,
            "contestants": rows,
        }

    def _contestants(self, device: torch.device) -> dict[str, MakeStep]:
        of: dict[str, MakeOptimizer] = {
            "sgd": lambda model: torch.optim.SGD(
                model.parameters(), lr=torch.tensor(LR, device=device), fused=True, **SETTINGS
            ),
            "sam": lambda model: SAM(
                model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, **SETTINGS
            ),
            "asam": lambda model: SAM(
                model.parameters(), torch.optim.SGD, rho=RHO, adaptive=True, lr=LR, **SETTINGS
            ),
        }
        # Captured steps come first, because each needs its own memory; if it runs out, later ones are
        # skipped.
        ways: dict[Way, dict[str, MakeStep]] = {
            "captured": {f"{k} captured": _capturing(of[k]) for k in self.optimizers},
            "eager": {f"{k} eager": _eager(of[k]) for k in self.optimizers},
            "compiled": {f"{k} compiled": _compiled(of[k]) for k in self.optimizers},
            "trainer": {"sam trainer": _trainer},
            "script": {"sam script": _script},
        }
        if device.type != "cuda":
            del ways["captured"]
        return {
            name: make
            for way, made in ways.items()
            if way in self.ways
            for name, make in made.items()
        }

    def _row(
        self, timing: Timing, step: Step, batch: Batch, device: torch.device, *, captured: bool
    ) -> dict[str, Any]:
        row: dict[str, Any] = timing.as_dict()
        if captured:
            nodes, busy = _device_work(step, batch, device)
            row |= {
                "nodes": nodes,
                "device_busy": busy,
                "idle_per_node": (timing.median - busy) / max(nodes, 1),
            }
        return row


def _capturing(make: MakeOptimizer) -> MakeStep:
    return lambda model, batch, autocast: capture_step(
        model, nn.functional.cross_entropy, make(model), batch, autocast=autocast
    )


def _eager(make: MakeOptimizer) -> MakeStep:
    """Return a step with the two-pass calls of users, without reading values on the host."""

    def prepared(model: nn.Module, batch: Batch, autocast: torch.dtype | None) -> Step:
        optimizer = make(model)

        def backward(batch: Batch) -> None:
            _loss_and_logits(model, batch, autocast)[0].backward()  # type: ignore[no-untyped-call]

        def step(batch: Batch) -> None:
            backward(batch)
            if isinstance(optimizer, SAM):
                optimizer.first_step(zero_grad=True)
                backward(batch)
                optimizer.second_step(zero_grad=True)
            else:
                optimizer.step()
                optimizer.zero_grad()

        return step

    return prepared


def _compiled(make: MakeOptimizer) -> MakeStep:
    def prepared(model: nn.Module, batch: Batch, autocast: torch.dtype | None) -> Step:
        compiled: Any = torch.compile(model)
        return _eager(make)(compiled, batch, autocast)

    return prepared


def _trainer(model: nn.Module, batch: Batch, autocast: torch.dtype | None) -> Step:
    """Return a step of :class:`fastsam.longtail.Trainer`, without reading and totals."""
    if not isinstance(model, Classifier):
        raise TypeError("expected a network of fastsam.longtail.models")
    device, classes = batch[0].device, int(batch[1].max()) + 1
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, **SETTINGS)
    objective = build_objective(
        recipe("digits-lt", "ce", "sam").config(), np.ones(classes, np.int64), device=device
    )
    precision: Precision = "float32" if autocast is None else "bfloat16"
    stepper = Stepper(Engine(model, World()), optimizer, objective, seed=0, precision=precision)
    indices = torch.arange(len(batch[1]), device=device)

    def step(batch: Batch) -> None:
        inputs, targets = batch
        next(stepper.steps([ImageBatch((inputs,), targets, indices)], epoch=1))

    return step


def _script(model: nn.Module, batch: Batch, autocast: torch.dtype | None) -> Step:
    """Return a step as in typical scripts: SAM tensor by tensor, with loss and accuracy logged each time."""
    optimizer = PlainSAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, **SETTINGS)
    logged: list[float] = []

    def step(batch: Batch) -> None:
        for finish in (optimizer.first_step, optimizer.second_step):
            loss, logits = _loss_and_logits(model, batch, autocast)
            loss.backward()  # type: ignore[no-untyped-call]
            finish(zero_grad=True)
        right = (logits.argmax(dim=1) == batch[1]).float().mean()
        logged[:] = [loss.item(), right.item()]

    return step


def _loss_and_logits(
    model: nn.Module, batch: Batch, autocast: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    inputs, targets = batch
    with torch.autocast(inputs.device.type, dtype=autocast, enabled=autocast is not None):
        logits: Tensor = model(inputs)
        return nn.functional.cross_entropy(logits, targets), logits


def _random_batch(workload: Workload, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(0)
    shape = (workload.batch_size, 3, workload.image_size, workload.image_size)
    inputs = torch.randn(shape, generator=generator).to(device)
    if workload.autocast is not None:
        inputs = inputs.to(memory_format=torch.channels_last)
    targets = torch.randint(workload.classes, (workload.batch_size,), generator=generator)
    return inputs, targets.to(device)


def _bound(step: Step, batch: Batch) -> Callable[[], object]:
    return lambda: step(batch)


def _disagreement(weights: dict[str, list[Tensor]], start: list[Tensor]) -> dict[str, float]:
    """Return the distance of each contestant from the first of its kind, relative to the distance trained."""
    found: dict[str, float] = {}
    first: dict[str, list[Tensor]] = {}
    for name, values in weights.items():
        kind = name.partition(" ")[0]
        expected = first.setdefault(kind, values)
        way = _distance(expected, start)
        found[name] = _distance(values, expected) / way
    return found


def _distance(left: list[Tensor], right: list[Tensor]) -> float:
    parts = [
        (a.detach().double() - b.detach().double()).square().sum()
        for a, b in zip(left, right, strict=True)
    ]
    return float(torch.stack(parts).sum().sqrt())


def _device_work(step: Step, batch: Batch, device: torch.device) -> tuple[int, float]:
    """Count the kernels and copies of one step, and the seconds that the device is busy with them."""
    repeats = 5
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            step(batch)
        torch.cuda.synchronize(device)
    durations = [
        event.device_time  # microseconds
        for event in profile.events()
        if event.device_type.name == "CUDA"
    ]
    return round(len(durations) / repeats), sum(durations) * 1e-6 / repeats
