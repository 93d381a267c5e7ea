"""The targets of gpu_suite.sh beside the measured numbers, from the folder of its results.

``python -m benchmarks.gpu_targets FOLDER`` prints them and writes ``FOLDER/targets.json``. It needs neither a
GPU nor torch.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

CORRECTNESS = ("tests", "nccl", "trainer", "memcheck", "racecheck", "synccheck")
LARGE = 25_000_000
"""Number of parameters from which a step is compared with the copy bandwidth."""
SHARES = {"SGD": 0.85, "AdamW": 0.80}
"""Smallest shares of the copy bandwidth."""
REFERENCE = {"resnet32": 15.0, "resnet50": 8.0}
"""How many times the step of the reference implementation takes at least."""
FOREACH = {"resnet32": 3.0}
"""How many times the fastest step of multi-tensor operations takes at least."""
PLAIN = ("foreach", "careful foreach")
"""The contestants with multi-tensor operations."""
SCRIPT, LATE = 5.0, 1.25
PYHESSIAN = {"spectrum_small": 3.0, "spectrum_large": 2.0}
EXTREMES = 0.02
"""Largest difference of an extreme eigenvalue from that of a peer, relative to the largest eigenvalue."""


@dataclass(frozen=True)
class Target:
    """A measured number and its target.

    Attributes:
        name: what is measured.
        value: the number; a text for a stage; None if it was not measured.
        bound: the bound.
        sense: whether the bound is the smallest or the largest allowed number; ``is`` for texts.
    """

    name: str
    value: float | str | None
    bound: float | str
    sense: Literal[">=", "<=", "is"] = ">="

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None if nothing was measured."""
        if self.value is None:
            return None
        if isinstance(self.value, str) or isinstance(self.bound, str):
            return self.value == self.bound
        return self.value >= self.bound if self.sense == ">=" else self.value <= self.bound

    def line(self) -> str:
        """Return the row of the table."""
        value = f"{self.value:.3f}" if isinstance(self.value, float) else str(self.value or "-")
        verdict = {True: "met", False: "MISSED", None: "not measured"}[self.met]
        return f"{self.name:62s} {value:>10s}  {self.sense} {self.bound!s:6s} {verdict}"


def targets(folder: Path) -> list[Target]:
    """Return all targets, with the numbers in the folder of the suite."""
    return [
        *_correctness(folder),
        *_sam(folder / "sam_step" / "sam_step-cuda.json", "float32"),
        *_sam(folder / "sam_bfloat16" / "sam_step-bfloat16-cuda.json", "bfloat16"),
        *_steps(folder),
        *_spectra(folder),
    ]


def _correctness(folder: Path) -> Iterator[Target]:
    for stage in CORRECTNESS:
        status, log = folder / stage / "status", folder / stage / "log"
        if not status.is_file() or not log.is_file():
            yield Target(stage, None, "ok", "is")
            continue
        outcome = status.read_text().split()[1]
        # Tests are skipped where torch finds no GPU.
        if outcome == "ok" and not re.search(r"\b[1-9]\d* passed", log.read_text(errors="replace")):
            outcome = "none ran"
        yield Target(stage, outcome, "ok", "is")


def _sam(path: Path, dtype: str) -> Iterator[Target]:
    rows = _read(path).get("rows", [])
    if not rows:
        yield Target(f"SAM step, {dtype}", None, SHARES["SGD"])
    for row in rows:
        case, base, found = row["case"], row["base"], row["peers"]
        for ours in ("fastsam", "fastsam, captured"):
            if ours not in found:
                continue
            label = f"{case}, {base}, {dtype}, {ours}"
            if row["parameters"] >= LARGE:
                share = found[ours]["share_of_copy_bandwidth"]
                yield Target(f"{label}: share of copy", share, SHARES.get(base, 0.8))
            if base != "SGD" or dtype != "float32":
                continue
            time = found[ours]["median"]
            if case in REFERENCE:
                other = found.get("reference file", {}).get("median")
                ratio = None if other is None else other / time
                yield Target(f"{label}: reference takes times", ratio, REFERENCE[case])
            if case in FOREACH:
                # A contestant that raised was skipped.
                others = [found[peer]["median"] for peer in PLAIN if peer in found]
                ratio = min(others) / time if others else None
                yield Target(f"{label}: foreach takes times", ratio, FOREACH[case])


def _steps(folder: Path) -> Iterator[Target]:
    cases = _read(folder / "train_small" / "train_step-cuda.json").get("cases", {})
    captured = cases.get("resnet32", {}).get("contestants", {}).get("sam captured", {})
    yield Target(
        "resnet32, batch 128: script takes times captured SAM",
        captured.get("script_takes_times", {}).get("median"),
        SCRIPT,
    )
    ratios = _read(folder / "late" / "late_phase-cuda.json").get("runs", {}).get("ratios", {})
    for way in ("captured", "eager"):
        yield Target(
            f"resnet32, {way}: ascents in the last fifth, times SGD",
            ratios.get(way, {}).get("median"),
            LATE,
            "<=",
        )


def _spectra(folder: Path) -> Iterator[Target]:
    for stage, bound in PYHESSIAN.items():
        path = folder / stage / "spectrum-density-cuda.json"
        rows: dict[str, Any] = _read(path).get("density", {})
        for peer in ("pyhessian, loader", "pyhessian, one batch"):
            yield Target(
                f"{stage}: {peer}: takes times", rows.get(peer, {}).get("times_fastsam"), bound
            )
        others = [row["answers"] for name, row in rows.items() if name != "fastsam"]
        for extreme in ("lambda_min", "lambda_max"):
            difference = None
            if others:
                ours = rows["fastsam"]["answers"]
                scale = abs(ours["lambda_max"])
                difference = max(abs(other[extreme] - ours[extreme]) / scale for other in others)
            yield Target(f"{stage}: {extreme} differs by", difference, EXTREMES, "<=")


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return content


def main(folder: Path) -> None:
    """Print the targets of a folder and write them."""
    found = targets(folder)
    print("\n".join(target.line() for target in found))
    rows = [{**asdict(target), "met": target.met} for target in found]
    (folder / "targets.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        raise SystemExit(
            "usage: python -m benchmarks.gpu_targets FOLDER, the folder OUT of gpu_suite.sh"
        )
    main(Path(sys.argv[1]))
