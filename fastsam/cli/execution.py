"""Options and printing shared by commands that train the runs of a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import arg

from fastsam.cli.output import show
from fastsam.longtail.config import find_setting
from fastsam.longtail.errors import UsageError
from fastsam.longtail.results import Result
from fastsam.longtail.run_file import parse_setting
from fastsam.longtail.sweeps import Execution, RunOutcome, Shard
from fastsam.longtail.tuning import Choices, Dimension, Interval


@dataclass(frozen=True)
class ExecutionOptions:
    """How many runs are trained at a time, where, and which of them."""

    jobs: Annotated[int, arg(help="number of runs that are trained at a time")] = 1
    executor: Annotated[
        str,
        arg(
            help="executor of the runs: local (processes on this machine), or that of a plug-in",
            metavar="NAME",
        ),
    ] = "local"
    shard: Annotated[
        str | None,
        arg(
            help="part of the runs that this command trains, I of N: every N-th run, for job arrays of a "
            "scheduler",
            metavar="I/N",
            help_behavior_hint="(default: all runs)",
        ),
    ] = None

    def execution(self) -> Execution:
        """Return the options as the execution of a plan.

        Raises:
            UsageError: if a value is not valid.
        """
        shard = Shard() if self.shard is None else Shard.parse(self.shard)
        return Execution(jobs=self.jobs, executor=self.executor, shard=shard)


def show_outcomes(
    outcomes: Iterable[RunOutcome], total: int, text: Callable[[Result], str]
) -> list[RunOutcome]:
    """Print one line for each run that ended, and return what became of all.

    Args:
        outcomes: what became of each run.
        total: number of runs.
        text: describes a result.
    """
    seen: list[RunOutcome] = []
    for outcome in outcomes:
        seen.append(outcome)
        if outcome.result is None:
            line = f"{outcome.state} {outcome.error}".rstrip()
        else:
            line = text(outcome.result)
            line += f", {outcome.result.seconds:.0f} s" if outcome.trained else ", finished before"
        show(f"[{len(seen)}/{total}] {outcome.run.name}: {line}")
    return seen


def parse_grid(texts: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """Parse the values of ``--grid``: ``NAME=VALUE,VALUE,...`` for each setting.

    Raises:
        UsageError: if a text has another form, a setting is unknown or repeated, or a value has a wrong type.
    """
    return {
        name: tuple(parse_setting(name, value) for value in values.split(","))
        for name, values in _pairs("--grid", texts)
    }


def parse_search(texts: Sequence[str]) -> dict[str, Dimension]:
    """Parse the values of ``--search``: ``NAME=VALUE,...``, ``NAME=LOW:HIGH`` or ``NAME=log:LOW:HIGH``.

    Raises:
        UsageError: if a text has another form, a setting is unknown or repeated, or a value has a wrong type.
    """
    return {name: _dimension(name, text) for name, text in _pairs("--search", texts)}


def as_options(settings: dict[str, Any]) -> list[str]:
    """Return the options of ``fastsam train`` that pass these settings.

    Example:
        >>> as_options({"lr_milestones": (80, 90), "nesterov": False})
        ['--lr-milestones', '80', '90', '--nesterov', 'False']
    """
    words: list[str] = []
    for name, value in settings.items():
        values = value if isinstance(value, tuple | list) else (value,)
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


def _pairs(option: str, texts: Sequence[str]) -> list[tuple[str, str]]:
    """Split texts at their first ``=``, and check that no setting is repeated."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip().removeprefix("--").replace("-", "_")
        if not equals:
            raise UsageError(f"{option} must be NAME=VALUES, such as lr=0.1,0.2, got {text!r:.60}")
        find_setting(name)  # raises: unknown
        if name in found:
            raise UsageError(f"{option} has {name} twice; pass all of its values at once")
        found[name] = values
    return list(found.items())


def _dimension(name: str, text: str) -> Dimension:
    hint = str(find_setting(name)[1])
    if ":" not in text or not ("int" in hint or "float" in hint):
        return Choices(tuple(parse_setting(name, value) for value in text.split(",")))
    low, _, high = text.removeprefix("log:").partition(":")
    whole = "int" in hint and "float" not in hint
    try:
        bounds = (int(low), int(high)) if whole else (float(low), float(high))
    except ValueError as error:
        raise UsageError(
            f"--search {name} must be VALUE,..., LOW:HIGH or log:LOW:HIGH, where LOW and HIGH are "
            f"{'whole ' if whole else ''}numbers, got {text!r:.60}"
        ) from error
    return Interval(bounds[0], bounds[1], log=text.startswith("log:"))
