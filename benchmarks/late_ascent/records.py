"""Records of finished runs, with one file for each setup, method and seed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.late_ascent.plan import SETUPS, TUNING_SEEDS, Arm, Values
from benchmarks.late_ascent.runs import place_of, train_arm
from benchmarks.machine import RESULTS
from benchmarks.seed_runs import SeedRuns

FOLDER = RESULTS / "late-ascent"
Stage = Literal["bases", "late", "second"]


@dataclass(frozen=True)
class Unit:
    """The runs of one seed, which share the phase before the deferral.

    Attributes:
        setup: name of the setup.
        method: method, ``LOSS-RULE``.
        seed: seed of the runs.
        stage: ``bases`` for trials of the phase before the deferral, ``second`` for the second run of a seed,
            else ``late``.
    """

    setup: str
    method: str
    seed: int
    stage: Stage = "late"

    @property
    def path(self) -> Path:
        """Path of the file with the records."""
        return FOLDER / self.setup / self.method / f"{self.stage}-seed-{self.seed}.json"

    def runs(self, cache: Path) -> Path:
        """Return the folder of the trained networks in ``cache``."""
        return cache / self.setup / self.method / self.path.stem

    def records(self) -> dict[str, Any]:
        """Return the records by name of the arm."""
        return SeedRuns(self.path).records()

    def train(self, arms: list[Arm], base: Values, cache: Path, *, networks: bool = False) -> None:
        """Train the arms that have no record; see :meth:`SeedRuns.train`.

        Args:
            arms: arms to train. The base comes before the arms that branch off from it.
            base: learning rate and weight decay of the phase before the deferral.
            cache: folder for the runs.
            networks: whether to train arms again whose network is not in ``cache``.
        """
        folder = self.runs(cache)
        tested = self.seed not in TUNING_SEEDS

        def train(arm: Arm) -> dict[str, Any]:
            setup = SETUPS[self.setup]
            return train_arm(setup, self.method, arm, self.seed, base, folder, tested=tested)

        def is_trained(arm: Arm) -> bool:
            return (place_of(arm, folder) / "result.json").is_file()

        SeedRuns(self.path).train(arms, train, is_trained, networks=networks)
