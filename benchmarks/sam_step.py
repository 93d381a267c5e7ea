"""The optimizer part of a SAM step (everything outside forward and backward), compared with baselines."""

from __future__ import annotations

import gc
import importlib.util
import itertools
import math
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks import footprint, peers
from benchmarks.machine import copy_bandwidth, save
from benchmarks.shapes import CASES, SWEEP, Shapes
from benchmarks.timing import Ratio, interleaved
from fastsam.threads import cpu_threads

STEPS_TO_AGREE = 5
OURS = ("fastsam", "fastsam, no check", "fastsam, captured")
TOLERANCES = {"float32": (1e-5, 1e-6), "bfloat16": (2.0**-5, 2.0**-8)}
"""Relative and absolute tolerance of the weights after these steps: in bfloat16 implementations that round
between operations differ by some units in the last place."""
WORKING_BYTES = 28
"""Temporary memory in bytes per parameter, needed by one contestant at a time, mostly to compare two copies
of the weights."""

Contestants = dict[str, peers.Peer]


@dataclass(frozen=True, kw_only=True)
class SamStep:
    """Time the fused SAM step against pure-PyTorch implementations, after checking that they agree.

    All contestants are timed alternately. Ratios are medians over rounds of paired ratios, with 95 %
    intervals. If the contestants do not fit in memory together, each baseline is timed alternately with
    fastsam only. Its ratio then refers to fastsam's time in this pair, and fastsam's own row comes from the
    first pair.
    """

    cases: tuple[str, ...] = ("resnet32", "resnet18", "vit-s16", "gpt2")
    """Shapes to time, by name (see benchmarks/shapes.py); "sweep" for tensors x elements, "all" for all."""
    bases: tuple[Literal["SGD", "Adam", "AdamW"], ...] = ("SGD", "Adam", "AdamW")
    """Base optimizers to time."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights, gradients and state."""
    threads: tuple[int, ...] = (1, 2)
    """Numbers of CPU threads; ignored on a GPU."""
    reference: Path | None = None
    """Path of the reference implementation sam.py, to time it too."""
    compile: bool = False
    """Also time the foreach implementation with torch.compile."""
    rounds: int = 21
    """Samples of each contestant."""
    calls: int | None = None
    """Back-to-back steps per sample; None for as many as take about 50 ms."""
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    """Device."""
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
        threads = self.threads if device.type == "cpu" else (torch.get_num_threads(),)
        rows: list[dict[str, Any]] = []
        for count in threads:
            with cpu_threads(count):
                bandwidth = copy_bandwidth(device)
                for name, base in itertools.product(names, self.bases):
                    row = self._row(name, base, device, bandwidth)
                    if row is not None:
                        rows.append({"threads": count, **row})
                        self._write(rows)  # after each row, in case the benchmark is interrupted
        for peer, summary in _summary(rows).items():
            print(
                f"{peer}: median slowdown over {summary['rows']} rows {summary['median']:.2f}x, smallest "
                f"{summary['smallest']:.2f}x at {summary['where']}"
            )

    def _write(self, rows: list[dict[str, Any]]) -> None:
        """Write the rows so far, with those of the sweep in a separate file, if results are saved."""
        if not self.save and self.out is None:
            return
        models = [row for row in rows if row["case"] not in SWEEP]
        sweep = [row for row in rows if row["case"] in SWEEP]
        suffix = "" if self.dtype == "float32" else f"-{self.dtype}"
        for kind, some in (("sam_step", models), ("sam_sweep", sweep)):
            if some:
                content = {"rows": some, "summary": _summary(some)}
                save(kind + suffix, content, device=self.device, folder=self.out)

    def _contestants(self, device: torch.device) -> Contestants:
        contestants: Contestants = {
            "fastsam": peers.fused,
            "fastsam, no check": peers.fused_unchecked,
            **({"fastsam, captured": peers.captured} if device.type == "cuda" else {}),
            "careful foreach": peers.careful,
            "foreach": peers.foreach,
            "plain PyTorch": peers.plain,
        }
        if self.compile:
            contestants["foreach, compiled"] = peers.compiled_foreach
        if self.reference is not None:
            contestants["reference file"] = peers.reference_file(self.reference)
        if importlib.util.find_spec("pytorch_optimizer") is not None:
            contestants["pytorch_optimizer"] = peers.pytorch_optimizer
        contestants[peers.FLOOR] = peers.floor
        return contestants

    def _row(
        self, name: str, base: str, device: torch.device, bandwidth: float
    ) -> dict[str, Any] | None:
        """Time one case with one base optimizer; return None if not even two contestants fit in memory."""
        shapes = CASES[name]
        elements = sum(map(math.prod, shapes))
        of = peers.BASES[base]
        contests = _contests(self._contestants(device), elements, of, _room(device))
        if not contests:
            print(f"{name}: skipped, because two contestants do not fit in memory")
            return None
        rows: dict[str, dict[str, Any]] = {}
        for contestants in contests:
            for peer, row in self._contest(name, of, contestants, device).items():
                rows.setdefault(peer, row)
            self._free(device)
        place = f"{torch.get_num_threads()} threads" if device.type == "cpu" else device.type
        print(
            f"\n{name}, {base}: {len(shapes)} tensors, {elements:,} parameters, {self.dtype}, {place}"
        )
        if len(contests) > 1:
            print("  timed in pairs with fastsam, because they do not fit in memory together")
        print(
            f"  {'':20s} {'us':>11s} {'CPU us':>11s} {'ratio, 95 % interval':>26s} bandwidth launches  bytes"
        )
        for peer, row in rows.items():
            share = ""
            moved = peers.bytes_per_parameter(peer, of, getattr(torch, self.dtype))
            if moved is not None:
                row["bytes_per_parameter"] = moved
                row["share_of_copy_bandwidth"] = moved * elements / row["median"] / bandwidth
                share = f"{row['share_of_copy_bandwidth']:.0%}"
            ratio = row["ratio"]
            interval = f"{ratio['median']:.2f}x [{ratio['lower']:.2f}, {ratio['upper']:.2f}]"
            print(
                f"  {peer:20s} {row['median'] * 1e6:11.1f} {row['cpu_median'] * 1e6:11.1f} {interval:>26s}"
                f" {share:>9s} {row['launches']:8d} {row['peak_bytes_per_parameter']:6.1f}"
            )
        return {
            "case": name,
            "base": base,
            "dtype": self.dtype,
            "tensors": len(shapes),
            "parameters": elements,
            "copy_bytes_per_second": bandwidth,
            "timed_together": max(map(len, contests)),
            "peers": rows,
        }

    def _contest(
        self, name: str, base: peers.Base, contestants: Contestants, device: torch.device
    ) -> dict[str, dict[str, Any]]:
        """Check that the contestants agree, and time them alternately; return a row for each."""
        shapes = CASES[name]
        elements = sum(map(math.prod, shapes))
        steps: dict[str, Callable[[], object]] = {}
        rows: dict[str, dict[str, Any]] = {}
        expected: list[Tensor] | None = None
        for peer, make in contestants.items():
            parameters = parameters_of(shapes, device, getattr(torch, self.dtype))

            def begin(
                peer: str = peer, make: peers.Peer = make, parameters: list[Tensor] = parameters
            ) -> None:
                steps[peer] = make(parameters, base)
                for _ in range(STEPS_TO_AGREE):
                    steps[peer]()

            try:
                peak = footprint.peak_bytes(begin, device)
            except Exception as error:  # for instance a missing compiler: time the others
                if peer == "fastsam":
                    raise
                print(
                    f"{name}: skipped {peer}: {f'{type(error).__name__}: {error}'.splitlines()[0]}"
                )
                steps.pop(peer, None)
                continue
            rows[peer] = {
                "launches": footprint.launches(steps[peer], device),
                "peak_bytes_per_parameter": peak / elements,
            }
            if peer == peers.FLOOR:
                continue
            weights = [p.detach().clone() for p in parameters]
            if expected is None:
                expected = weights
            rtol, atol = TOLERANCES[self.dtype]
            for weight, other in zip(weights, expected, strict=True):
                torch.testing.assert_close(weight, other, rtol=rtol, atol=atol)
        timings = interleaved(steps, rounds=self.rounds, calls=self.calls, device=device)
        ours = timings["fastsam"]
        for peer, timing in timings.items():
            rows[peer] |= {
                **timing.as_dict(),
                "ratio": Ratio.of(timing.wall, ours.wall).as_dict(),
                "cpu_ratio": Ratio.of(timing.cpu, ours.cpu).as_dict(),
            }
        return rows

    def _free(self, device: torch.device) -> None:
        """Free the memory of contestants in compiled code, reference cycles and PyTorch's cache."""
        if self.compile:
            torch.compiler.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return median and smallest ratio of every baseline over all rows, and the rows where it was faster."""
    ratios: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        where = f"{row['case']}, {row['base']}, {row['threads']} threads"
        for peer, entry in row["peers"].items():
            if peer not in (*OURS, peers.FLOOR):
                ratios.setdefault(peer, {})[where] = entry["ratio"]
    return {
        peer: {
            "rows": len(found),
            "median": statistics.median(ratio["median"] for ratio in found.values()),
            "smallest": min(ratio["median"] for ratio in found.values()),
            "where": min(found, key=lambda where: found[where]["median"]),
            "faster_beyond_interval": [
                where for where, ratio in found.items() if ratio["upper"] < 1.0
            ],
        }
        for peer, found in ratios.items()
    }


def parameters_of(
    shapes: Shapes, device: torch.device, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Create weights and gradients, the same for every contestant."""
    generator = torch.Generator(device).manual_seed(0)
    parameters: list[Tensor] = []
    for shape in shapes:
        weight, gradient = (
            torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2)
        )
        parameter = torch.nn.Parameter(weight)
        parameter.grad = gradient
        parameters.append(parameter)
    return parameters


def _contests(
    contestants: Contestants, elements: int, base: peers.Base, room: float
) -> list[Contestants]:
    """Return all contestants together if they fit in ``room`` bytes, else pairs with fastsam."""
    held = 4 * (3 + base.state)  # weights, gradients, backup and the base optimizer's state
    room_per_parameter = room / elements - WORKING_BYTES
    if room_per_parameter >= len(contestants) * held:
        return [contestants]
    if room_per_parameter < 2 * held:
        return []
    (ours, fused), *others = contestants.items()
    return [{ours: fused, peer: make} for peer, make in others]


def _room(device: torch.device) -> float:
    """Return the memory in bytes that a case may use."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return 0.7 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
