"""Training of one arm, and its record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.late_ascent.plan import Arm, Setup, Values
from benchmarks.run_record import plain, record_of, trained
from fastsam.longtail.trained import TrainedRun
from fastsam.longtail.training import Branch


def place_of(arm: Arm, folder: Path) -> Path:
    """Return the folder of an arm's run among the runs of its seed in ``folder``."""
    return folder / arm.name.replace(" ", "-")


def train_arm(
    setup: Setup, method: str, arm: Arm, seed: int, base: Values, folder: Path, *, tested: bool
) -> dict[str, Any]:
    """Train an arm and return its record.

    Args:
        setup: the setup.
        method: method, ``LOSS-RULE``.
        arm: the arm.
        seed: seed of all arms that are compared.
        base: learning rate and weight decay of the phase before the deferral.
        folder: folder of the runs. The run that others branch from is in its subfolder ``base``.
        tested: whether to include the scores on the test set.
    """
    values = {
        **setup.of_seed(seed),
        **base,
        "weight_decay": arm.decay * base["weight_decay"],
        **setup.schedule(arm.factor, late=arm.late, longer=arm.longer),
        **dict(arm.settings),
    }
    values["seed"] += arm.seed
    out = place_of(arm, folder)
    names = {"data": setup.data, "method": method, "optimizer": arm.optimizer}
    branch = Branch.load(folder / "base", setup.defer) if arm.branched else None
    keep = () if arm.branched else (setup.defer,)
    result = trained(names, values, out, branch=branch, keep=keep)
    return {
        "settings": plain(values),
        "optimizer": arm.optimizer,
        "parent": None if result.parent is None else result.parent["weights"],
        **record_of(result, TrainedRun.load(out), tested=tested),
    }
