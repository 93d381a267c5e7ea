"""The runs of one seed of a panel: train, evaluate, calibrate, and evaluate again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastsam.demo.plan import DATA, PanelPlan, Way
from fastsam.longtail import Checkpoint, Trainer, recipe
from fastsam.longtail.results import Result
from fastsam.longtail.trained import TrainedRun, calibrate_run, evaluate_run
from fastsam.longtail.trained.calibration import calibration_path
from fastsam.longtail.training import Branch
from fastsam.report.comparison import scores_of


@dataclass(frozen=True)
class Outcome:
    """Test scores of one run, in percent.

    Attributes:
        gradients: cost in forward-backward passes over whole batches; None if unknown.
        raw: scores as trained, by name.
        calibrated: scores after logit adjustment with tau chosen on validation images, by name.
    """

    gradients: float | None
    raw: dict[str, float]
    calibrated: dict[str, float]


def run_folder(out: Path, plan: PanelPlan, seed: int, way: Way) -> Path:
    """Return the folder of a run."""
    return out / plan.folder / f"seed-{seed}" / way.folder


def train_seed(plan: PanelPlan, seed: int, epochs: int, out: Path) -> dict[str, Outcome]:
    """Train every method of a panel with one seed.

    Args:
        plan: the panel.
        seed: seed of the subset, the initial weights and the batches.
        epochs: epochs of each run.
        out: folder of the demo.
    """
    return {way.name: outcome for way, outcome in _outcomes(plan, seed, epochs, out)}


def _outcomes(plan: PanelPlan, seed: int, epochs: int, out: Path) -> Iterator[tuple[Way, Outcome]]:
    trunk = run_folder(out, plan, seed, plan.ways[0])
    for way in plan.ways:
        folder = run_folder(out, plan, seed, way)
        names = {"data": DATA, "method": plan.method, "optimizer": way.optimizer}
        values = {
            **plan.settings,
            "epochs": way.longer * epochs,
            "seed": seed,
            "subset_seed": seed,
            "threads": 1,
            "validate_every": 5,
            **way.settings,
        }
        if way.branches:
            branch = Branch.load(trunk, _deferral(trunk))
            config, sources = branch.settings(**names, **values)
        else:
            branch, chosen = None, recipe(**names, **values)
            config, sources = chosen.config(), chosen.sources
        result = Trainer(
            config,
            sources=sources,
            out=folder,
            branch=branch,
            keep=(config.defer_epoch,) if way is plan.ways[0] else (),
            progress=False,
        ).fit()
        yield way, _outcome(result, folder)


def _deferral(trunk: Path) -> int:
    """Return the deferral epoch, after which runs branch off."""
    return int(Checkpoint.load(trunk).config.defer_epoch)


def _outcome(result: Result, folder: Path) -> Outcome:
    calibration = calibrate_run(TrainedRun.load(folder), method="logit-adjustment")
    calibration.save(calibration_path(folder))
    calibrated = evaluate_run(TrainedRun.load(folder), bootstrap=0).metrics
    return Outcome(result.total_gradients, scores_of(result.test), scores_of(calibrated))
