"""Training of one arm, and its record."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.longtail_methods.plan import SETUP, Arm, Group, arms_of
from benchmarks.machine import RESULTS
from benchmarks.run_record import plain, record_of, trained
from benchmarks.seed_runs import SeedRuns
from fastsam.longtail import Result, fit_stages, recipe
from fastsam.longtail.calibrators import CALIBRATORS, TrainedHead
from fastsam.longtail.checkpoint import weights_hash
from fastsam.longtail.trained import TrainedRun, calibrate_run
from fastsam.longtail.training import Branch

FOLDER = RESULTS / "longtail-methods"
_SEED = "seed-"


@dataclass(frozen=True)
class Unit:
    """The arms of a group and a seed, most of which start from the same network.

    Attributes:
        group: the group.
        seed: seed of the runs.
    """

    group: Group
    seed: int

    @property
    def runs(self) -> SeedRuns:
        """The file with the records."""
        return SeedRuns(FOLDER / self.group.name / f"{_SEED}{self.seed}.json")

    def is_missing(self) -> bool:
        """Return whether an arm has no record."""
        return bool({arm.name for arm in arms_of(self.group)} - self.runs.records().keys())

    def train(self, cache: Path) -> None:
        """Train the arms that have no record.

        Args:
            cache: folder for the runs.
        """
        folder = cache / self.group.name / f"{_SEED}{self.seed}"
        self.runs.train(
            arms_of(self.group),
            lambda arm: _train_arm(self, arm, folder),
            lambda arm: (_run_folder(folder, arm.name) / "result.json").is_file(),
        )


def recorded_seeds() -> list[int]:
    """Return the seeds that have records."""
    return sorted({int(path.stem.removeprefix(_SEED)) for path in FOLDER.glob(f"*/{_SEED}*.json")})


def _run_folder(folder: Path, name: str) -> Path:
    return folder / name.replace(" ", "-")


def _train_arm(unit: Unit, arm: Arm, folder: Path) -> dict[str, Any]:
    """Train an arm and return its record."""
    values = unit.group.values(SETUP, arm.optimizer, unit.seed)
    names = {"data": SETUP.data, "method": unit.group.method, "optimizer": arm.optimizer}
    out = _run_folder(folder, arm.name)
    origin = None if arm.origin is None else _run_folder(folder, arm.origin)
    if origin is None:
        result = trained(names, values, out, keep=(SETUP.defer,))
        record = {"parent": None, **record_of(result, TrainedRun.load(out))}
    elif arm.step == "late":
        branch = Branch.load(origin, SETUP.defer)  # the ascents begin there
        result = trained(names, values, out, branch=branch)
        record = {"parent": branch.parent["weights"], **record_of(result, TrainedRun.load(out))}
    elif arm.step == "second":
        record = _second_stage(names, values, arm.way, out, origin)
    else:
        record = _calibrated(arm.way, origin)
    state = f"{arm.origin}, epoch {SETUP.defer}" if arm.step == "late" else arm.origin
    return {"settings": plain(values), "optimizer": arm.optimizer, "origin": state, **record}


def _second_stage(
    names: dict[str, str], values: dict[str, Any], stages: str, out: Path, origin: Path
) -> dict[str, Any]:
    """Train the second stage of a list, from a network that was trained as its first stage."""
    made = recipe(**names, **values, stages=stages)
    result = fit_stages(
        made.config(),
        sources=made.sources,
        out=out,
        resume="auto",
        from_stage=origin,
        progress=False,
    )
    if result.start is None:
        raise AssertionError("a second stage starts from the weights of the first")
    return {
        "parent": result.start["sha256"],
        "second stage": {
            name: result.config.get(name) for name in ("method", "head", "epochs", "lr")
        },
        **record_of(result, TrainedRun.load(out)),
    }


def _calibrated(calibrator: str, origin: Path) -> dict[str, Any]:
    """Score a network with a calibrator that is chosen on validation images.

    The fitted temperature is left out, because it would change the calibration error of this arm alone.
    """
    run = TrainedRun.load(origin)
    found = calibrate_run(run, method=calibrator)
    trained = TrainedHead(run.trained_head, run.logit_scale, run.counts)
    run.network.head = CALIBRATORS[calibrator].build(found.parameters, trained).eval()
    return {
        "parent": weights_hash(run.checkpoint.judged_weights()),
        "calibrator": dict(found.parameters),
        **record_of(Result.load(origin / "result.json"), run),
    }
