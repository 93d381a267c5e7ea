"""The records of finished runs: one file for each setup, method and seed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.late_ascent.plan import SETUPS, TUNING_SEEDS, Arm, Values
from benchmarks.late_ascent.runs import train_arm
from benchmarks.machine import RESULTS, environment
from fastsam.files import write_text

FOLDER = RESULTS / "late-ascent"


@dataclass(frozen=True)
class Unit:
    """The runs of one seed, which share the phase before the deferral.

    Attributes:
        setup: name of the setup.
        method: loss and rule.
        seed: the seed.
        stage: ``bases`` for the trials of the phase before, else ``late``.
    """

    setup: str
    method: str
    seed: int
    stage: str = "late"

    @property
    def path(self) -> Path:
        """The file of the records."""
        return FOLDER / self.setup / self.method / f"{self.stage}-seed-{self.seed}.json"

    def runs(self, cache: Path) -> Path:
        """The folder of the trained networks in ``cache``."""
        return cache / self.setup / self.method / self.path.stem

    def records(self) -> dict[str, Any]:
        """Return the records by the name of the arm."""
        return json.loads(self.path.read_text())["runs"] if self.path.is_file() else {}

    def train(self, arms: list[Arm], base: Values, cache: Path) -> None:
        """Train the arms that have no record yet, and write each record as soon as there is one.

        Branches are compared in pairs, so all of them must continue the same weights: where those were
        trained again and differ, on another processor for instance, the records of branches are dropped.

        Args:
            arms: what to train; those that branch follow the one that they branch from.
            base: learning rate and weight decay of the phase before.
            cache: folder for the runs.
        """
        folder = self.runs(cache)
        for arm in arms:
            known = self.records()
            if arm.name in known and not self._is_needed(arm, arms, known, folder):
                continue
            print(f"{self.setup} {self.method} seed {self.seed}: {arm.name}", flush=True)
            record = train_arm(
                SETUPS[self.setup],
                self.method,
                arm,
                self.seed,
                base,
                folder,
                tested=self.seed not in TUNING_SEEDS,
            )
            record["environment"] = environment(torch.device("cpu"))
            if arm.branched:
                parents = {name: entry["parent"] for name, entry in known.items()}
                known = {
                    name: entry
                    for name, entry in known.items()
                    if parents[name] in (None, record["parent"])
                }
            known[arm.name] = record
            write_text(self.path, json.dumps({"runs": known}, indent=1) + "\n")

    def _is_needed(self, arm: Arm, arms: list[Arm], known: dict[str, Any], folder: Path) -> bool:
        """Whether an arm is trained again because its checkpoint, from which others branch, is not there."""
        missing = any(other.branched and other.name not in known for other in arms)
        return arm.name == "base" and missing and not (folder / "base").is_dir()
