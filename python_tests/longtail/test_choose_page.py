"""The costs on the page that helps to choose a method follow from the recipes."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from fastsam.longtail import TrainConfig, recipe
from fastsam.longtail.errors import UsageError
from fastsam.longtail.named_recipes import NAMED_RECIPES, STANDARD
from fastsam.longtail.stage_plan import plan_stages
from fastsam.longtail.stages import STAGES

PAGE = (Path(__file__).parents[2] / "docs" / "longtail" / "choose.md").read_text("utf-8")
TABLE = PAGE.split("## Cost in gradients")[1].split("\n## ")[0]
HEADER, _, *ROWS = (
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TABLE.splitlines()
    if line.startswith("|")
)
HOME = "fastsam.longtail.stages"


def gradients(config: TrainConfig) -> int:
    """Return the gradients of a stage, in passes over the training set."""
    if config.optimizer == "sgd":
        return config.epochs
    assert config.optimizer == "sam"
    first = {"0": 0, "defer": config.defer_epoch}[config.ascent_start]
    assert first is not None
    return config.epochs + config.epochs - first


def cost(data: str, options: str) -> float:
    """Return the gradients of a command relative to those of SGD with the standard recipe."""
    words = shlex.split(options)
    names = [word.removeprefix("--").replace("-", "_") for word in words[::2]]
    given = dict(zip(names, words[1::2], strict=True))
    chosen = recipe(data, given.pop("method", "ce"), given.pop("optimizer", "sgd"), **given)
    plan = plan_stages(chosen.config())
    return sum(gradients(stage.config) for stage in plan) / unit(data)


@cache
def unit(data: str) -> int:
    return recipe(data, "ce", "sgd").config().epochs


@pytest.mark.parametrize(
    "place", [1, *(pytest.param(place, marks=pytest.mark.slow) for place in range(2, len(HEADER)))]
)
def test_the_costs_are_those_of_the_recipes(place: int) -> None:
    data = HEADER[place].strip("`")
    assert len(ROWS) == 20
    for row in ROWS:
        options = row[0].strip("`")
        if row[place] == "none":
            with pytest.raises(UsageError, match="no values for data set"):
                cost(data, options)
        else:
            assert row[place] == f"{cost(data, options):.2f}", options


def test_every_recipe_and_list_of_stages_has_a_cost() -> None:
    shown = {name for row in ROWS for name in re.findall(r"--(?:recipe|stages) (\S+)`?", row[0])}
    # The cost of lift is that of another network.
    # Other tests may have registered lists of their own.
    ours = {name for name, part in STAGES.items() if part.module.startswith(f"{HOME}.")}
    expected = {*NAMED_RECIPES, *ours} - {STANDARD, "none", "lift"}
    assert {name.strip("`") for name in shown} == expected
