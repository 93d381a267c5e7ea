"""The command ``fastsam recipes``."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import arg

from fastsam.cli.output import table
from fastsam.longtail.calibrators import CALIBRATORS
from fastsam.longtail.data import AUGMENTATIONS, DATASETS
from fastsam.longtail.errors import UsageError
from fastsam.longtail.losses import LOSSES
from fastsam.longtail.methods import RULES
from fastsam.longtail.mixers import MIXERS
from fastsam.longtail.models import HEADS, MODELS
from fastsam.longtail.named_recipes import NAMED_RECIPES, STANDARD
from fastsam.longtail.optimizers import OPTIMIZERS
from fastsam.longtail.published import combinations
from fastsam.longtail.recipes import Recipe, recipe
from fastsam.longtail.registry import Registry
from fastsam.longtail.stage_plan import PlannedStage, plan_stages
from fastsam.longtail.stages import STAGES


@dataclass(frozen=True)
class Recipes:
    """List the recipes of Rangwani et al. (arXiv 2212.13827), or show one with the source of every value.

    Every other combination of data set, method and optimizer also has a recipe. --names lists all data sets,
    methods and optimizers.
    """

    data: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """List only recipes of this data set. With --method and --optimizer, show one recipe in full."""
    method: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """List only recipes of this method."""
    optimizer: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """List only recipes of this optimizer."""
    recipe: Annotated[str, arg(metavar="NAME", help_behavior_hint="")] = STANDARD
    """With the three names above, show this named recipe instead of the standard one."""
    stages: Annotated[str, arg(metavar="NAME", help_behavior_hint="")] = "none"
    """With the three names above, show the stages of this list, too."""
    names: bool = False
    """List all data sets, losses, rules, optimizers, augmentations, models, heads, mixers, recipes, stages
    and calibrators."""

    def run(self) -> None:
        """Print the list of recipes, one recipe, or the names of all parts."""
        if self.names:
            _print_names()
        elif self.data is None or self.method is None or self.optimizer is None:
            if (self.recipe, self.stages) != (STANDARD, "none"):
                raise UsageError("--recipe and --stages require --data, --method and --optimizer")
            self._list()
        else:
            named = {"recipe": self.recipe, "stages": self.stages}
            default = {"recipe": STANDARD, "stages": "none"}
            given = {name: value for name, value in named.items() if value != default[name]}
            chosen = recipe(self.data, self.method, self.optimizer, **given)
            _print_plan(plan_stages(chosen.config(), chosen.sources))

    def _list(self) -> None:
        asked = (self.data, self.method, self.optimizer)
        listed = {
            key: tables
            for key, tables in combinations().items()
            if all(want in (None, have) for want, have in zip(asked, key, strict=True))
        }
        if not listed:
            raise UsageError(
                f"Rangwani et al. have no recipe for {' '.join(name for name in asked if name)}; pass "
                "--data, --method and --optimizer to see the recipe that fastsam uses"
            )
        found = {key: recipe(*key) for key in listed}
        for data in sorted({data for data, _, _ in listed}, key=tuple(DATASETS).index):
            _print_data_set(data, [(found[key], listed[key]) for key in listed if key[0] == data])
        _print_more()
        print("? value not published. To show one recipe with the source of every value:")
        print("fastsam recipes --data NAME --method NAME --optimizer NAME")


_WIDTH = 80
_LONGEST = 28
"""Width of the values of a recipe; longer ones take several lines."""
_SHARED = ("model", "batch_size")
"""Settings shown in the heading of a data set, because its recipes agree on them."""
_COLUMNS = {
    "epochs": "epochs",
    "lr": "lr",
    "weight_decay": "decay",
    "defer_epoch": "defer",
    "rho": "rho",
}
"""Settings shown in a column, with its title."""


_SOURCES = (
    "[paper] Rangwani et al., NeurIPS 2022 (arXiv 2212.13827)",
    "[code] the published code of its authors",
    "default the default of fastsam",
    "given   what you passed",
)
"""Explanation of the sources in a recipe."""


def _print_data_set(data: str, listed: Sequence[tuple[Recipe, Sequence[str]]]) -> None:
    """Print the recipes of a data set and the tables of the paper in which they occur."""
    shared = (
        f"{name.replace('_', ' ')} {' or '.join(dict.fromkeys(_shown(one, name) for one, _ in listed))}"
        for name in _SHARED
    )
    print(f"{data}: {', '.join(shared)}")
    rows = tuple(
        (
            f"{one.method} {one.optimizer}",
            *(_shown(one, name) for name in _COLUMNS),
            " ".join(name.removeprefix("table") for name in tables),
        )
        for one, tables in listed
    )
    print(table(("recipe", *_COLUMNS.values(), "in table"), rows))
    unknown: dict[str, list[str]] = {}
    for one, _ in listed:
        names = [
            n for n, e in one.entries.items() if not e.known and n not in (*_SHARED, *_COLUMNS)
        ]
        if names:
            unknown.setdefault(" ".join(names), []).append(f"{one.method} {one.optimizer}")
    if unknown:
        notes = (f"{names} of {', '.join(of)}" for names, of in unknown.items())
        print(textwrap.fill(f"also not published: {'; '.join(notes)}", _WIDTH))
    print()


def _print_more() -> None:
    """Print the named recipes and the lists of stages."""
    print("other recipes, with --recipe NAME:")
    for part in NAMED_RECIPES.values():
        if part.name != STANDARD:
            _print_wrapped(f"  {part.name}: {part.summary}; {', '.join(part.data)}")
    print("recipes in stages, with --stages NAME:")
    for stages in STAGES.values():
        if stages.stages:
            _print_wrapped(f"  {stages.name}: {stages.summary}")


def _print_plan(plan: Sequence[PlannedStage]) -> None:
    """Print every value of a recipe with its source; of later stages those that differ from the first."""
    first = plan[0].config.flat()
    for stage in plan:
        values = {
            name: value
            for name, value in stage.config.flat().items()
            if value is not None and name in stage.sources
        }
        if stage is not plan[0]:
            values = {name: value for name, value in values.items() if value != first.get(name)}
        if stage.name:
            print(f"stage {stage.name}:")
        _print_settings(values, stage.sources)
        print()
    for line in _SOURCES:
        print(line)


def _print_settings(values: Mapping[str, Any], sources: Mapping[str, str]) -> None:
    rows = [("setting", "value", "source")]
    rows += [(name, _value(value), sources[name]) for name, value in values.items()]
    name = max(len(row[0]) for row in rows) + 2
    value = min(max(len(row[1]) for row in rows), _LONGEST) + 2
    for row in rows:
        *above, last = textwrap.wrap(row[1], value - 2, break_long_words=False) or [""]
        if len(last) >= value:
            above, last = [*above, last], ""
        for place, line in enumerate(above):
            print((row[0] if place == 0 else "").ljust(name) + line)
        start = ("" if above else row[0]).ljust(name) + last.ljust(value)
        print(
            textwrap.fill(
                row[2],
                _WIDTH,
                initial_indent=start,
                subsequent_indent=" " * (name + value),
                break_long_words=False,
            )
        )


def _shown(chosen: Recipe, name: str) -> str:
    """Format a value, followed by a question mark if no source states it."""
    entry = chosen.entries.get(name)
    return "-" if entry is None else _value(entry.value) + ("" if entry.known else "?")


def _value(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _print_names() -> None:
    _print_wrapped(f"data: {', '.join(DATASETS.names(plugins=True))}")
    _print_wrapped("methods: loss or loss-rule, with")
    for part in (*LOSSES.values(), *RULES.values()):
        _print_wrapped(f"  {part.name}: {part.summary}")
    _print_wrapped("optimizers:")
    for part in OPTIMIZERS.values():
        _print_wrapped(f"  {part.name}: {part.summary}")
    _print_wrapped(f"augmentations: {', '.join(AUGMENTATIONS.names())}")
    _print_wrapped(f"models: {', '.join(MODELS.names())}")
    more: dict[str, Registry[Any]] = {
        "heads": HEADS,
        "mixers": MIXERS,
        "recipes": NAMED_RECIPES,
        "stages": STAGES,
        "calibrators": CALIBRATORS,
    }
    for kind, registry in more.items():
        _print_wrapped(f"{kind}:")
        for member in registry.values():
            _print_wrapped(f"  {member.name}: {member.summary}")


def _print_wrapped(line: str) -> None:
    print(
        textwrap.fill(
            line, _WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
        )
    )


def command(arguments: Sequence[str]) -> type[Recipes]:
    """Return the command; its options do not depend on ``arguments``."""
    return Recipes
