"""Overhead of SAM in steps without an ascent, and of a whole run with ascents only in a late phase."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.machine import save
from benchmarks.sam_step import STEPS_TO_AGREE, parameters_of
from benchmarks.shapes import CASES
from benchmarks.timing import Ratio, interleaved
from fastsam import SAM, capture_step
from fastsam.longtail.models import build_model
from fastsam.threads import cpu_threads

STEP_BARS = {"fastsam": 1.35, "fastsam, no check": 1.10}
"""Limit on the ratio of a step without an ascent to torch's fused base (upper end of the 95 % interval)."""
SHARE = 0.2
"""Fraction of a run's steps, at its end, that have an ascent."""
RUN_BAR = 1.05 * (1 + SHARE)
"""Limit on the ratio of CPU times of such a run: one more pass in these steps, plus 5 %."""


@dataclass(frozen=True, kw_only=True)
class LatePhase:
    """Time SAM steps without an ascent against torch's fused base, and a late phase against SGD.

    The optimizer part of a step is timed alternately with torch's, after checking that both agree. Ratios are
    medians over rounds with 95 % intervals. They are compared with a prediction from bytes moved: an update
    moves as many bytes as torch's, and the finiteness check reads every gradient once more. Whole runs
    alternate: on a CPU step by step, by CPU time; on a GPU run by run, by wall time, with eager and with
    captured steps.
    """

    cases: tuple[str, ...] = ("resnet32", "vit-s16")
    """Shapes to time, by name (see benchmarks/shapes.py); empty to skip this part."""
    bases: tuple[Literal["SGD", "Adam", "AdamW"], ...] = ("SGD", "AdamW")
    """Base optimizers to time."""
    threads: tuple[int, ...] = (1, 2)
    """Numbers of CPU threads for the optimizer part; ignored on a GPU."""
    rounds: int = 41
    """Samples of each contestant."""
    runs: int = 6
    """Number of whole runs to time; 0 to skip this part."""
    model: str = "resnet20"
    """Network of the whole runs, on images of 32 x 32 pixels; one thread on a CPU."""
    batch_size: int = 8
    """Images per batch."""
    steps: int = 200
    """Steps per run."""
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    """Device."""
    save: bool = False
    """Write the results to benchmarks/results/."""
    out: Path | None = None
    """Write the results to this folder instead."""

    def run(self) -> None:
        """Run both parts, print the results, and save them."""
        results: dict[str, Any] = {}
        results["steps"] = []
        on_cpu = torch.device(self.device).type == "cpu"
        all_threads = self.threads if on_cpu else (torch.get_num_threads(),)
        for threads, name, base in itertools.product(all_threads, self.cases, self.bases):
            with cpu_threads(threads):
                results["steps"] += self._steps(name, base, threads)
        self._save(results)  # the runs may end in an error
        if self.runs and on_cpu:
            with cpu_threads(1):
                results["run"] = self._runs()
        elif self.runs:
            results["runs"] = self._runs_on_gpu()
        self._save(results)

    def _save(self, results: dict[str, Any]) -> None:
        if self.save or self.out is not None:
            print(f"wrote {save('late_phase', results, device=self.device, folder=self.out)}")

    def _steps(self, name: str, base: str, threads: int) -> list[dict[str, Any]]:
        """Time the optimizer part of a step without an ascent, with and without the finiteness check."""
        of = peers.BASES[base]
        contestants: dict[str, peers.Peer] = {
            peers.FLOOR: peers.floor,
            "fastsam": peers.without_ascent,
            "fastsam, no check": peers.without_ascent_unchecked,
        }
        steps: dict[str, Callable[[], object]] = {}
        expected: list[Tensor] = []
        for peer, make in contestants.items():
            parameters = parameters_of(CASES[name], torch.device(self.device))
            steps[peer] = make(parameters, of)
            for _ in range(STEPS_TO_AGREE):
                steps[peer]()
            weights = [p.detach().clone() for p in parameters]
            expected = expected or weights
            for weight, other in zip(weights, expected, strict=True):
                torch.testing.assert_close(weight, other, rtol=1e-5, atol=1e-6)
        timings = interleaved(steps, rounds=self.rounds, device=torch.device(self.device))
        floor = timings[peers.FLOOR]
        rows = []
        for peer, bar in STEP_BARS.items():
            timing = timings[peer]
            ratio = Ratio.of(timing.wall, floor.wall)
            more = 4 if peer == "fastsam" else 0
            rows.append(
                {
                    "case": name,
                    "base": base,
                    "parameters": sum(map(math.prod, CASES[name])),
                    "threads": threads,
                    "peer": peer,
                    **timing.as_dict(),
                    "fused_base": floor.as_dict(),
                    "ratio": ratio.as_dict(),
                    "cpu_ratio": Ratio.of(timing.cpu, floor.cpu).as_dict(),
                    "ratio_of_bytes": 1 + more / of.update_bytes,
                    "bar": bar,
                    "met": ratio.upper <= bar,
                }
            )
            print(
                f"{name:9s} {base:5s} {threads} threads  {peer:18s} {timing.median * 1e6:8.1f} us, torch "
                f"{floor.median * 1e6:8.1f} us: {_interval(ratio)}, bytes {1 + more / of.update_bytes:.2f}, "
                f"bar {bar:.2f} {_verdict(ratio.upper <= bar)}"
            )
        return rows

    def _runs(self) -> dict[str, Any]:
        """Measure the CPU time of whole runs of SGD, and of SAM with a late phase."""
        start = build_model(self.model, 10)
        seconds: dict[str, list[float]] = {"sgd": [], "late phase": []}
        for _ in range(self.runs):
            models = [copy.deepcopy(start) for _ in seconds]
            settings: dict[str, Any] = {"lr": 0.01, "momentum": 0.9, "weight_decay": 2e-4}
            first = self.steps - round(SHARE * self.steps)
            sgd = torch.optim.SGD(models[0].parameters(), fused=True, **settings)
            sam = SAM(models[1].parameters(), torch.optim.SGD, rho=0.05, start=first, **settings)
            steps = [_step_of(model, each) for model, each in zip(models, (sgd, sam), strict=True)]
            taken = [0.0, 0.0]
            for n in range(self.steps):
                batch = self._batch(n)
                for which in (0, 1) if n % 2 else (1, 0):
                    began = time.process_time()
                    steps[which](batch)
                    taken[which] += time.process_time() - began
                if n + 1 == min(STEPS_TO_AGREE, first):
                    _require_agreement(*models)
            for values, value in zip(seconds.values(), taken, strict=True):
                values.append(value)
        ratio = Ratio.of(tuple(seconds["late phase"]), tuple(seconds["sgd"]))
        met = ratio.upper <= RUN_BAR
        print(
            f"{self.model}, batch {self.batch_size}: {self.steps} steps, the last {SHARE:.0%} with an "
            f"ascent: {_interval(ratio)} of SGD's CPU time, bar {RUN_BAR:.2f} {_verdict(met)}"
        )
        return {
            "model": self.model,
            "batch_size": self.batch_size,
            "steps": self.steps,
            "share": SHARE,
            "cpu_seconds": seconds,
            "cpu_ratio": ratio.as_dict(),
            "bar": RUN_BAR,
            "met": met,
        }

    def _runs_on_gpu(self) -> dict[str, Any]:
        """Measure the wall time of whole runs of SGD, and of SAM with a late phase, eager and captured."""
        start = build_model(self.model, 10).to(self.device)
        data = [tuple(part.to(self.device) for part in self._batch(n)) for n in range(self.steps)]
        first = self.steps - round(SHARE * self.steps)
        seconds: dict[str, list[float]] = {}
        for _, way in itertools.product(range(self.runs), ("eager", "captured")):
            models = [copy.deepcopy(start) for _ in range(2)]
            settings: dict[str, Any] = {"momentum": 0.9, "weight_decay": 2e-4}
            lr = torch.tensor(0.01, device=self.device)
            optimizers = {
                "sgd": torch.optim.SGD(models[0].parameters(), fused=True, lr=lr, **settings),
                "late phase": SAM(
                    models[1].parameters(),
                    torch.optim.SGD,
                    rho=0.05,
                    start=first,
                    lr=0.01,
                    **settings,
                ),
            }
            for (name, optimizer), model in zip(optimizers.items(), models, strict=True):
                step: Callable[[Any], object] = _step_of(model, optimizer)
                if way == "captured":
                    step = capture_step(model, nn.functional.cross_entropy, optimizer, data[0])
                torch.cuda.synchronize()
                began = time.perf_counter()
                for n, batch in enumerate(data):
                    step(batch)
                    if n + 1 == min(STEPS_TO_AGREE, first):
                        weights = [p.detach().clone() for p in model.parameters()]
                torch.cuda.synchronize()
                seconds.setdefault(f"{name} {way}", []).append(time.perf_counter() - began)
                if name == "sgd":
                    expected = weights
            # With TF32 and captured steps the last bits differ, so the distance trained is the measure.
            trained = _distance(expected, start.parameters())
            apart = _distance(weights, expected)
            if not apart <= 0.05 * trained:
                raise RuntimeError(
                    f"after {min(STEPS_TO_AGREE, first)} steps the late phase is {apart:.2g} away from SGD, "
                    f"which is {trained:.2g} away from the initial weights"
                )
        ratios = {}
        for way in ("eager", "captured"):
            # The first run of each also initializes libraries.
            late, sgd = (tuple(seconds[f"{name} {way}"][1:]) for name in ("late phase", "sgd"))
            ratios[way] = Ratio.of(late, sgd).as_dict()
            print(
                f"{self.model}, batch {self.batch_size}, {way}: {self.steps} steps, the last {SHARE:.0%} "
                f"with an ascent: {ratios[way]['median']:.3f} of SGD's wall time"
            )
        return {
            "model": self.model,
            "batch_size": self.batch_size,
            "steps": self.steps,
            "share": SHARE,
            "seconds": seconds,
            "ratios": ratios,
        }

    def _batch(self, n: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(n)
        images = torch.randn(self.batch_size, 3, 32, 32, generator=generator)
        return images, torch.randint(10, (self.batch_size,), generator=generator)


def _step_of(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> Callable[[tuple[Tensor, Tensor]], None]:
    def backward(batch: tuple[Tensor, Tensor]) -> None:
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        loss.backward()  # type: ignore[no-untyped-call]

    def step(batch: tuple[Tensor, Tensor]) -> None:
        backward(batch)
        if isinstance(optimizer, SAM) and optimizer.ascent_due:
            optimizer.first_step(zero_grad=True)
            backward(batch)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _distance(weights: Iterable[Tensor], others: Iterable[Tensor]) -> float:
    """Return the Euclidean distance of two lists of tensors."""
    pairs = zip(weights, others, strict=True)
    return math.sqrt(sum(float((a.detach() - b.detach()).square().sum()) for a, b in pairs))


def _require_agreement(one: nn.Module, other: nn.Module) -> None:
    """Check that two networks agree. Call it early in a run, because rounding differences grow."""
    for weight, expected in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5)


def _interval(ratio: Ratio) -> str:
    return f"{ratio.median:.3f}x [{ratio.lower:.3f}, {ratio.upper:.3f}]"


def _verdict(met: bool) -> str:
    return "met" if met else "MISSED"
