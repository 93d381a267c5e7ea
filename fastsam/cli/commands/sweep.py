"""The command ``fastsam sweep``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, UseAppendAction, arg

from fastsam.cli.execution import ExecutionOptions, parse_grid, show_outcomes
from fastsam.cli.options import NAMES, every_setting, given, named, with_settings
from fastsam.cli.output import show
from fastsam.longtail.results import Result
from fastsam.longtail.sweeps import check_outcomes, plan_grid, run_plan


@dataclass(frozen=True)
class SweepCommand:
    """Train every combination of values of some settings, each with several seeds."""

    data: Annotated[str | None, named("data", "(required, here or in --grid)")] = None
    method: Annotated[str | None, named("method", "(required, here or in --grid)")] = None
    optimizer: Annotated[str | None, named("optimizer", "(required, here or in --grid)")] = None
    grid: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(
            help="values of a setting to combine with those of the others, such as rho=0.05,0.1 or "
            "optimizer=sgd,sam; repeat the option for each setting. Spaces separate the values of a setting "
            'with several: "lr_milestones=80 90,60 80"',
            metavar="NAME=VALUE,...",
            help_behavior_hint="",
        ),
    ] = ()
    seeds: Annotated[int, arg(help="number of seeds of each combination: 0, 1, ...")] = 1
    out: Annotated[
        Path, arg(help="folder for the runs; finished ones are not trained again", metavar="DIR")
    ] = Path("runs/sweep")
    execution: Annotated[ExecutionOptions, arg(name="execution"), OmitArgPrefixes] = (
        ExecutionOptions()  # noqa: RUF009 (frozen)
    )

    def run(self) -> None:
        """Train the runs, print a line for each, and a table of all that are finished."""
        from fastsam.report import Run, accuracy_table, by_settings

        execution = self.execution.execution()
        plan = plan_grid(parse_grid(self.grid), settings_of_all(self), seeds=self.seeds)
        plan.check(self.out)
        own = execution.shard.of(plan.runs)
        for note in plan.notes:
            show(f"note: {note}")
        part = "" if len(own) == len(plan.runs) else f"{len(own)} of "
        print(f"runs: {part}{len(plan.runs)} in {self.out}, {execution.jobs} at a time", flush=True)
        outcomes = show_outcomes(run_plan(plan.runs, self.out, execution), len(own), _accuracy)
        order = [run.name for run in plan.runs]
        outcomes.sort(key=lambda outcome: order.index(outcome.run.name))
        runs = [Run(each.result, each.run.name) for each in outcomes if each.result is not None]
        if runs:
            show(accuracy_table(by_settings(runs)))
        check_outcomes(outcomes)


def settings_of_all(command: Any) -> dict[str, Any]:
    """Return the settings that a command gives for all of its runs, by name."""
    names = {name: getattr(command, name) for name in NAMES}
    return {**{name: value for name, value in names.items() if value is not None}, **given(command)}


def _accuracy(result: Result) -> str:
    return f"test accuracy {result.test.accuracy:.1f} %, balanced {result.test.balanced:.1f} %"


def command(arguments: Sequence[str]) -> Any:
    """Return the command with an option for every setting, because runs may differ in their parts."""
    settings = every_setting(plugins="--help" in arguments or "-h" in arguments)
    del settings["seed"]
    made = with_settings(SweepCommand, settings)
    made.__doc__ = (
        "Train every combination of the values in --grid, each with several seeds, and print test "
        "accuracies. Options below set a value for all runs; the recipe of each run supplies the rest. A "
        "combination that does not have a setting, such as --rho with sgd, is trained once without it. The "
        "plan is stored in sweep.json of --out. The same command skips finished runs and resumes "
        "interrupted ones; with more values or seeds it adds runs. A failed run does not stop the others."
    )
    return made
