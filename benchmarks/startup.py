"""CPU time of importing fastsam and of ``fastsam --help``, relative to ``import torch``."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import save

PUBLIC_NAMES = """
import fastsam
for name in fastsam.__all__:
    getattr(fastsam, name)
"""
HELP = """
import contextlib, io
from fastsam.__main__ import main
sys.argv[1:] = ["--help"]
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    main()
"""
TIMED = """
import sys, time
start = time.process_time()
import torch
middle = time.process_time()
{program}
print(middle - start, time.process_time() - middle)
"""


@dataclass(frozen=True, kw_only=True)
class Startup:
    """Measure the CPU time that a new process spends on importing torch, and then on fastsam."""

    rounds: int = 15
    """Number of processes for each program."""
    save: bool = False
    """Write the results to benchmarks/results/."""
    out: Path | None = None
    """Write the results to this folder instead."""

    def run(self) -> None:
        """Time the programs alternately, print the medians, and save them."""
        programs = {"every public name": PUBLIC_NAMES, "fastsam --help": HELP}
        for program in programs.values():
            cpu_seconds(program)  # writes the bytecode, as an installation does
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
        for _ in range(self.rounds):
            for name, program in programs.items():
                times[name].append(cpu_seconds(program))
        results = {}
        for name, pairs in times.items():
            torch, fastsam = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
            results[name] = {"torch": torch, "fastsam": fastsam}
            print(
                f"{name}: {fastsam:.2f} s of CPU time after {torch:.2f} s for torch: {fastsam / torch:+.0%}"
            )
        if self.save or self.out:
            save("startup", {"cpu_seconds": results}, folder=self.out)


def cpu_seconds(program: str) -> tuple[float, float]:
    """Return the CPU seconds of ``import torch`` and of the program after it, in one new process."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", TIMED.format(program=program)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    first, second = map(float, done.stdout.split())
    return first, second
