"""The command: train the arms without a record, and report."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.longtail_methods.plan import GROUPS, SEEDS
from benchmarks.longtail_methods.runs import Unit
from benchmarks.longtail_methods.tables import tables
from benchmarks.processes import in_processes
from fastsam.threads import cpu_threads


@dataclass(frozen=True)
class LongtailMethods:
    """Compare mixing, second stages and calibrators on Fashion-MNIST, with SGD and with late SAM.

    Cross-entropy, mixup, CMO and ce-drw are trained with SGD. SAM branches off at 80 % of the epochs. cRT,
    LWS and DisAlign continue from cross-entropy, MiSLAS from mixup; tau-norm and logit adjustment change the
    classifier of cross-entropy. Records of finished runs are written to
    benchmarks/results/longtail-methods/, from which an interrupted command is resumed.
    """

    seeds: int = SEEDS
    """Number of seeds; they are 0, 1, ..."""
    groups: tuple[str, ...] = tuple(GROUPS)
    """Networks to train, with all that continues from them: ce, mixup, cmo or ce-drw."""
    jobs: int = 1
    """Number of concurrent runs, with one thread each."""
    minutes: float = float("inf")
    """Start no seed of a group after this many minutes. The same command resumes the benchmark."""
    cache: Path = Path("runs/longtail-methods")
    """Folder for checkpoints."""
    report: bool = False
    """Only report the records that exist."""

    def run(self) -> None:
        """Train the arms without a record, and print the tables."""
        left = [] if self.report else self._train()
        for name, table in tables().items():
            print(f"{name}:\n\n{table}", flush=True)
        if left:
            raise SystemExit(f"{len(left)} seeds are left; repeat the command to resume")

    def _train(self) -> list[Unit]:
        """Train, and return the units that are not finished."""
        deadline = time.monotonic() + 60 * self.minutes
        units = [Unit(GROUPS[name], seed) for seed in range(self.seeds) for name in self.groups]
        missing = [unit for unit in units if unit.is_missing()]
        in_processes(_train_unit, [(unit, self.cache, deadline) for unit in missing], self.jobs)
        return [unit for unit in missing if unit.is_missing()]


def _train_unit(unit: Unit, cache: Path, deadline: float) -> None:
    if time.monotonic() < deadline:
        with cpu_threads(1):
            unit.train(cache)
