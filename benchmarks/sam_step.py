"""The optimizer part of a SAM step, everything outside forward and backward, against its peers."""

from __future__ import annotations

import gc
import importlib.util
import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import footprint, peers
from benchmarks.machine import copy_bandwidth, save
from benchmarks.shapes import CASES, SWEEP, Shapes
from benchmarks.timing import interleaved

STEPS_TO_AGREE = 5
FLOOR = "fused SGD alone"
OURS = ("fastsam", "fastsam, no check")
HELD_BYTES, WORKING_BYTES = 16, 28
"""Bytes per parameter: each contestant's weights, gradients, momentum and backup, and what comes on top for
one of them at a time, most of it to compare two copies of the weights."""

Contestants = dict[str, Callable[[Sequence[Tensor]], peers.Step]]


@dataclass(frozen=True, kw_only=True)
class SamStep:
    """Times the fused SAM step against pure-PyTorch ones, after checking that they agree.

    All of them are timed in turn. Where they do not fit in memory together, each peer is timed in turn with
    fastsam alone: its ratio is to fastsam's time beside it, and fastsam's own row is of the first pair.
    """

    cases: tuple[str, ...] = ("resnet32", "one-25M")
    """Shapes to time, by name (see benchmarks/shapes.py); "sweep" for tensors x elements, "all" for all."""
    reference: Path | None = None
    """A file with the reference implementation's class SAM, timed as a peer."""
    compile: bool = False
    """Time the foreach version under torch.compile too."""
    rounds: int = 15
    """Samples of each peer."""
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    """Where to run."""
    save: bool = False
    """Write the results to benchmarks/results/."""
    out: Path | None = None
    """Write the results to this folder instead."""

    def run(self) -> None:
        device = torch.device(self.device)
        groups = {"all": tuple(CASES), "sweep": SWEEP}
        names = dict.fromkeys(name for case in self.cases for name in groups.get(case, (case,)))
        unknown = set(names) - set(CASES)
        if unknown:
            valid = sorted([*CASES, *groups])
            raise SystemExit(f"unknown case {sorted(unknown)}; expected some of {valid}")
        bandwidth = copy_bandwidth(device)
        results: dict[str, Any] = {}
        for name in names:
            contests = _contests(self._contestants(), CASES[name], _room(device))
            if not contests:
                print(f"{name}: left out, not even two contestants fit in memory")
                continue
            results[name] = self._case(name, contests, device, bandwidth)
            self._write(results, bandwidth)  # a run that is cut short keeps what it has
        summary = _summary(results)
        for peer, row in summary.items():
            print(
                f"over {row['cases']} cases, {peer} took {row['median']:.2f} times as long "
                f"(at least {row['smallest']:.2f}, {row['where']})"
            )

    def _write(self, results: dict[str, Any], bandwidth: float) -> None:
        """Write the cases so far, those of the sweep apart, if anything is to be kept."""
        if not self.save and self.out is None:
            return
        models = {name: case for name, case in results.items() if name not in SWEEP}
        sweep = {name: case for name, case in results.items() if name in SWEEP}
        for kind, cases in (("sam_step", models), ("sam_sweep", sweep)):
            if cases:
                content = {"copy_bytes_per_second": bandwidth, "cases": cases}
                content |= {"summary": _summary(sweep)} if cases is sweep else {}
                print(f"wrote {save(kind, content, device=self.device, folder=self.out)}")

    def _contestants(self) -> Contestants:
        contestants: Contestants = {
            "fastsam": peers.fused,
            "fastsam, no check": peers.fused_unchecked,
            "plain PyTorch": peers.plain,
            "foreach + fused SGD": peers.foreach,
        }
        if self.compile:
            contestants["foreach, compiled"] = peers.compiled_foreach
        if self.reference is not None:
            contestants["reference file"] = peers.reference_file(self.reference)
        if importlib.util.find_spec("pytorch_optimizer") is not None:
            contestants["pytorch_optimizer"] = peers.pytorch_optimizer
        contestants[FLOOR] = peers.floor
        return contestants

    def _case(
        self, name: str, contests: list[Contestants], device: torch.device, bandwidth: float
    ) -> dict[str, Any]:
        shapes = CASES[name]
        elements = sum(map(math.prod, shapes))
        rows: dict[str, dict[str, Any]] = {}
        for contestants in contests:
            for peer, row in self._contest(name, contestants, device).items():
                rows.setdefault(peer, row)
            self._free(device)
        print(f"\n{name}: {len(shapes)} tensors, {elements:,} parameters on {device}")
        if len(contests) > 1:
            print("  in pairs with fastsam: they do not fit in memory together")
        print(f"  {'':22s} {'us':>12s} {'quartiles':>24s}   ratio  bandwidth  launches  bytes")
        for peer, row in rows.items():
            share = ""
            moved = peers.BYTES_PER_PARAMETER.get(peer)
            if moved is not None:
                row["bytes_per_parameter"] = moved
                row["share_of_copy_bandwidth"] = moved * elements / row["median"] / bandwidth
                share = f"{row['share_of_copy_bandwidth']:.0%}"
            quartiles = f"[{row['lower_quartile'] * 1e6:.1f}, {row['upper_quartile'] * 1e6:.1f}]"
            print(
                f"  {peer:22s} {row['median'] * 1e6:12.1f} {quartiles:>24s} {row['ratio']:6.2f}x"
                f" {share:>10s} {row['launches']:9d} {row['peak_bytes_per_parameter']:6.1f}"
            )
        return {
            "tensors": len(shapes),
            "parameters": elements,
            "timed_together": max(map(len, contests)),
            "peers": rows,
        }

    def _contest(
        self, name: str, contestants: Contestants, device: torch.device
    ) -> dict[str, dict[str, Any]]:
        """Checks that the contestants agree, then times them in turn; a row for each, fastsam first."""
        shapes = CASES[name]
        elements = sum(map(math.prod, shapes))
        steps: dict[str, Callable[[], object]] = {}
        rows: dict[str, dict[str, Any]] = {}
        expected: list[Tensor] | None = None
        for peer, make in contestants.items():
            parameters = _parameters(shapes, device)

            def begin(peer: str = peer, make: Any = make, parameters: Any = parameters) -> None:
                steps[peer] = make(parameters)
                for _ in range(STEPS_TO_AGREE):
                    steps[peer]()

            try:
                peak = footprint.peak_bytes(begin, device)
            except Exception as error:  # a compiler that is missing, say: the others can be timed
                if peer in OURS:
                    raise
                print(
                    f"{name}: {peer} left out: {f'{type(error).__name__}: {error}'.splitlines()[0]}"
                )
                steps.pop(peer, None)
                continue
            rows[peer] = {
                "launches": footprint.launches(steps[peer], device),
                "peak_bytes_per_parameter": peak / elements,
            }
            if peer == FLOOR:
                continue
            weights = [p.detach().clone() for p in parameters]
            if expected is None:
                expected = weights
            for weight, other in zip(weights, expected, strict=True):
                torch.testing.assert_close(weight, other, rtol=1e-5, atol=1e-6)
        timings = interleaved(steps, rounds=self.rounds, device=device)
        for peer, timing in timings.items():
            ratio = timing.median / timings["fastsam"].median
            rows[peer] |= timing.as_dict() | {"ratio": ratio}
        return rows

    def _free(self, device: torch.device) -> None:
        """Gives back what contestants held: in compiled code, in cycles, and in PyTorch's cache."""
        if self.compile:
            torch.compiler.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _summary(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """For every peer the median and the smallest ratio over the cases of the sweep."""
    ratios: dict[str, dict[str, float]] = {}
    for name, case in results.items():
        for peer, row in case["peers"].items():
            if name in SWEEP and peer not in (*OURS, FLOOR):
                ratios.setdefault(peer, {})[name] = row["ratio"]
    return {
        peer: {
            "cases": len(of_case),
            "median": statistics.median(of_case.values()),
            "smallest": min(of_case.values()),
            "where": min(of_case, key=lambda name: of_case[name]),
        }
        for peer, of_case in ratios.items()
    }


def _parameters(shapes: Shapes, device: torch.device) -> list[Tensor]:
    """The same weights and gradients for every peer."""
    generator = torch.Generator(device).manual_seed(0)
    parameters: list[Tensor] = []
    for shape in shapes:
        weight = torch.randn(shape, generator=generator, device=device)
        parameter = torch.nn.Parameter(weight)
        parameter.grad = torch.randn(shape, generator=generator, device=device)
        parameters.append(parameter)
    return parameters


def _contests(contestants: Contestants, shapes: Shapes, room: float) -> list[Contestants]:
    """All contestants at once where they fit in ``room`` bytes, else fastsam with one peer at a time."""
    room_per_parameter = room / sum(map(math.prod, shapes)) - WORKING_BYTES
    if room_per_parameter >= len(contestants) * HELD_BYTES:
        return [contestants]
    if room_per_parameter < 2 * HELD_BYTES:
        return []
    (ours, fused), *others = contestants.items()
    return [{ours: fused, peer: make} for peer, make in others]


def _room(device: torch.device) -> float:
    """Bytes of memory that a case may take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return 0.7 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
