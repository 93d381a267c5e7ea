"""Records of finished runs, with one file for each setup, method and seed."""

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
        method: method, ``LOSS-RULE``.
        seed: seed of the runs.
        stage: ``bases`` for trials of the phase before the deferral, else ``late``.
    """

    setup: str
    method: str
    seed: int
    stage: str = "late"

    @property
    def path(self) -> Path:
        """Path of the file with the records."""
        return FOLDER / self.setup / self.method / f"{self.stage}-seed-{self.seed}.json"

    def runs(self, cache: Path) -> Path:
        """Return the folder of the trained networks in ``cache``."""
        return cache / self.setup / self.method / self.path.stem

    def records(self) -> dict[str, Any]:
        """Return the records by name of the arm."""
        return json.loads(self.path.read_text())["runs"] if self.path.is_file() else {}

    def train(self, arms: list[Arm], base: Values, cache: Path) -> None:
        """Train the arms that have no record, and write each record when its run is finished.

        Branches are compared in pairs, so all must start from the same weights. If the base was trained again
        with different weights, for instance on another processor, the records of old branches are removed.

        Args:
            arms: arms to train. The base comes before the arms that branch off from it.
            base: learning rate and weight decay of the phase before the deferral.
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
        """Return whether an arm must be trained again, because others branch from its missing checkpoint."""
        missing = any(other.branched and other.name not in known for other in arms)
        return arm.name == "base" and missing and not (folder / "base").is_dir()
