"""The optimizer part of a SAM step, everything outside forward and backward, against its peers."""

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
OURS = ("fastsam", "fastsam, no check")
WORKING_BYTES = 28
"""Bytes per parameter that one contestant at a time takes beyond what it holds, most of it to compare two
copies of the weights."""

Contestants = dict[str, peers.Peer]


@dataclass(frozen=True, kw_only=True)
class SamStep:
    """Time the fused SAM step against pure-PyTorch ones, after checking that they agree.

    All contestants are timed in turn, and a ratio is the median over rounds of paired ratios with its 95 %
    interval. Where the contestants do not fit in memory together, each peer is timed in turn with fastsam
    alone: its ratio is to fastsam's time beside it, and fastsam's own row is of the first pair.
    """

    cases: tuple[str, ...] = ("resnet32", "resnet18", "vit-s16", "gpt2")
    """Shapes to time, by name (see benchmarks/shapes.py); "sweep" for tensors x elements, "all" for all."""
    bases: tuple[Literal["SGD", "Adam", "AdamW"], ...] = ("SGD", "Adam", "AdamW")
    """Base optimizers to time."""
    threads: tuple[int, ...] = (1, 2)
    """Numbers of CPU threads to time with; ignored on a GPU."""
    reference: Path | None = None
    """A file with the reference implementation's class SAM, timed as a peer."""
    compile: bool = False
    """Time the foreach version under torch.compile too."""
    rounds: int = 21
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
        threads = self.threads if device.type == "cpu" else (torch.get_num_threads(),)
        rows: list[dict[str, Any]] = []
        for count in threads:
            with cpu_threads(count):
                bandwidth = copy_bandwidth(device)
                for name, base in itertools.product(names, self.bases):
                    row = self._row(name, base, device, bandwidth)
                    if row is not None:
                        rows.append({"threads": count, **row})
                        self._write(rows)  # a run that is cut short keeps what it has
        for peer, summary in _summary(rows).items():
            print(
                f"over {summary['rows']} rows, {peer} took {summary['median']:.2f} times as long "
                f"(at least {summary['smallest']:.2f}, {summary['where']})"
            )

    def _write(self, rows: list[dict[str, Any]]) -> None:
        """Write the rows so far, those of the sweep apart, if anything is to be kept."""
        if not self.save and self.out is None:
            return
        models = [row for row in rows if row["case"] not in SWEEP]
        sweep = [row for row in rows if row["case"] in SWEEP]
        for kind, some in (("sam_step", models), ("sam_sweep", sweep)):
            if some:
                content = {"rows": some, "summary": _summary(some)}
                save(kind, content, device=self.device, folder=self.out)

    def _contestants(self) -> Contestants:
        contestants: Contestants = {
            "fastsam": peers.fused,
            "fastsam, no check": peers.fused_unchecked,
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
        """One case with one base optimizer; None where not even two contestants fit in memory."""
        shapes = CASES[name]
        elements = sum(map(math.prod, shapes))
        of = peers.BASES[base]
        contests = _contests(self._contestants(), elements, of, _room(device))
        if not contests:
            print(f"{name}: left out, not even two contestants fit in memory")
            return None
        rows: dict[str, dict[str, Any]] = {}
        for contestants in contests:
            for peer, row in self._contest(name, of, contestants, device).items():
                rows.setdefault(peer, row)
            self._free(device)
        place = f"{torch.get_num_threads()} threads" if device.type == "cpu" else device.type
        print(f"\n{name}, {base}: {len(shapes)} tensors, {elements:,} parameters, {place}")
        if len(contests) > 1:
            print("  in pairs with fastsam: they do not fit in memory together")
        print(
            f"  {'':20s} {'us':>11s} {'CPU us':>11s} {'ratio, 95 % interval':>26s} bandwidth launches  bytes"
        )
        for peer, row in rows.items():
            share = ""
            moved = peers.bytes_per_parameter(peer, of)
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
            "tensors": len(shapes),
            "parameters": elements,
            "copy_bytes_per_second": bandwidth,
            "timed_together": max(map(len, contests)),
            "peers": rows,
        }

    def _contest(
        self, name: str, base: peers.Base, contestants: Contestants, device: torch.device
    ) -> dict[str, dict[str, Any]]:
        """Checks that the contestants agree, then times them in turn; a row for each, fastsam first."""
        shapes = CASES[name]
        elements = sum(map(math.prod, shapes))
        steps: dict[str, Callable[[], object]] = {}
        rows: dict[str, dict[str, Any]] = {}
        expected: list[Tensor] | None = None
        for peer, make in contestants.items():
            parameters = parameters_of(shapes, device)

            def begin(
                peer: str = peer, make: peers.Peer = make, parameters: list[Tensor] = parameters
            ) -> None:
                steps[peer] = make(parameters, base)
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
            if peer == peers.FLOOR:
                continue
            weights = [p.detach().clone() for p in parameters]
            if expected is None:
                expected = weights
            for weight, other in zip(weights, expected, strict=True):
                torch.testing.assert_close(weight, other, rtol=1e-5, atol=1e-6)
        timings = interleaved(steps, rounds=self.rounds, device=device)
        ours = timings["fastsam"]
        for peer, timing in timings.items():
            rows[peer] |= {
                **timing.as_dict(),
                "ratio": Ratio.of(timing.wall, ours.wall).as_dict(),
                "cpu_ratio": Ratio.of(timing.cpu, ours.cpu).as_dict(),
            }
        return rows

    def _free(self, device: torch.device) -> None:
        """Gives back what contestants held: in compiled code, in cycles, and in PyTorch's cache."""
        if self.compile:
            torch.compiler.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For every peer the median and the smallest ratio over all rows, and where a peer was faster."""
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


def parameters_of(shapes: Shapes, device: torch.device) -> list[Tensor]:
    """The same weights and gradients for every peer."""
    generator = torch.Generator(device).manual_seed(0)
    parameters: list[Tensor] = []
    for shape in shapes:
        weight = torch.randn(shape, generator=generator, device=device)
        parameter = torch.nn.Parameter(weight)
        parameter.grad = torch.randn(shape, generator=generator, device=device)
        parameters.append(parameter)
    return parameters


def _contests(
    contestants: Contestants, elements: int, base: peers.Base, room: float
) -> list[Contestants]:
    """All contestants at once where they fit in ``room`` bytes, else fastsam with one peer at a time."""
    held = 4 * (3 + base.state)  # weights, gradients, backup and the base optimizer's state
    room_per_parameter = room / elements - WORKING_BYTES
    if room_per_parameter >= len(contestants) * held:
        return [contestants]
    if room_per_parameter < 2 * held:
        return []
    (ours, fused), *others = contestants.items()
    return [{ours: fused, peer: make} for peer, make in others]


def _room(device: torch.device) -> float:
    """Bytes of memory that a case may take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return 0.7 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
