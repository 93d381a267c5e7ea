"""The command ``fastsam tune``."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, UseAppendAction, arg

from fastsam.cli.commands.sweep import settings_of_all
from fastsam.cli.execution import ExecutionOptions, as_options, parse_search, show_outcomes
from fastsam.cli.options import every_setting, named, with_settings
from fastsam.cli.output import show, table
from fastsam.longtail.results import Result
from fastsam.longtail.settings import value_text
from fastsam.longtail.tuning import TUNING_FILE, Tuning, check_trials, plan_trials
from fastsam.text import notice


@dataclass(frozen=True)
class TuneCommand:
    """Draw trials of some settings, train them, and choose one on validation images."""

    data: Annotated[str | None, named("data", "(required, here or in --search)")] = None
    method: Annotated[str | None, named("method", "(required, here or in --search)")] = None
    optimizer: Annotated[str | None, named("optimizer", "(required, here or in --search)")] = None
    search: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(
            help="values of a setting: a list (rho=0.05,0.1), an interval (lr=0.01:1), or an interval on a "
            "logarithmic scale (lr=log:0.01:1); repeat the option for each setting",
            metavar="NAME=VALUES",
            help_behavior_hint="(required)",
        ),
    ] = ()
    trials: Annotated[int, arg(help="number of trials")] = 10
    search_seed: Annotated[int, arg(help="seed of the trials")] = 0
    sampler: Annotated[
        str,
        arg(help="how trials are drawn: random, or optuna (a Sobol sequence)", metavar="NAME"),
    ] = "random"
    seeds: Annotated[int, arg(help="number of seeds of each trial, whose scores are averaged")] = 1
    out: Annotated[
        Path, arg(help="folder for the trials; finished ones are not trained again", metavar="DIR")
    ] = Path("runs/tune")
    execution: Annotated[ExecutionOptions, arg(name="execution"), OmitArgPrefixes] = (
        ExecutionOptions()  # noqa: RUF009 (frozen)
    )

    def run(self) -> None:
        """Train the trials, print their scores, and the command that trains with the chosen settings."""
        execution = self.execution.execution()
        plan = plan_trials(
            parse_search(self.search),
            settings_of_all(self),
            trials=self.trials,
            search_seed=self.search_seed,
            sampler=self.sampler,
            seeds=self.seeds,
        )
        for note in plan.notes:
            show(f"note: {note}")
        own = execution.shard.of(plan.runs)
        print(f"trials: {len(plan.drawn)} in {self.out}, {execution.jobs} at a time", flush=True)
        outcomes = show_outcomes(plan.execute(self.out, execution), len(own), _balanced)
        tuning = plan.judge(self.out)
        show(_table(tuning))
        check_trials(tuning, outcomes)
        if tuning.best is None:
            notice("no trial is chosen yet; run the same command without --shard when all are done")
            return
        print(f"chosen: {tuning.best.name}, {tuning.rule}")
        print(f"scores: {self.out / TUNING_FILE}")
        print("to train with the chosen settings:")
        options = as_options(tuning.settings)
        show(shlex.join(["fastsam", "train", *options, "--out", str(self.out / "chosen")]))


def _balanced(result: Result) -> str:
    metrics = result.validation
    return "no validation" if metrics is None else f"balanced accuracy {metrics.balanced:.1f} %"


def _table(tuning: Tuning) -> str:
    """Format the searched settings and the score of each trial."""
    names = list(tuning.search)
    rows = [
        (
            trial.name,
            *(value_text(trial.settings.get(name, "-")) for name in names),
            "-" if trial.score is None else f"{trial.score:.1f}",
            "chosen" if trial.name == tuning.chosen else trial.error.partition(":")[0],
        )
        for trial in tuning.trials
    ]
    return table(("balanced validation accuracy, %", *names, "score", ""), rows)


def command(arguments: Sequence[str]) -> Any:
    """Return the command with an option for every setting, because trials may differ in their parts."""
    settings = every_setting(plugins="--help" in arguments or "-h" in arguments)
    del settings["seed"]
    made = with_settings(TuneCommand, settings)
    made.__doc__ = (
        "Train --trials draws from the values in --search, and choose the one with the highest balanced "
        "accuracy on validation images. All are drawn before the first one starts. The choice reads no test "
        "score. The data need validation images: pass --split-validation for your own images, or "
        "--validation-per-class for data sets without a validation part. Options below set a value for all "
        "trials; the recipe of each trial supplies the rest. The scores are stored in tuning.json of --out. "
        "The same command continues, and more --trials are added to the first ones."
    )
    return made
