"""fastsam recipes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastsam.cli.output import table
from fastsam.longtail.calibrators import CALIBRATORS
from fastsam.longtail.data import DATASETS
from fastsam.longtail.errors import UsageError
from fastsam.longtail.losses import LOSSES
from fastsam.longtail.methods import RULES
from fastsam.longtail.models import MODELS
from fastsam.longtail.optimizers import OPTIMIZERS
from fastsam.longtail.published import combinations
from fastsam.longtail.recipes import Recipe, recipe


@dataclass(frozen=True)
class Recipes:
    """List the recipes of the paper, or show one with the source of every value.

    Any other combination of data, method and optimizer has a recipe as well; --names lists them.
    """

    data: str | None = None
    """Only this data set; with --method and --optimizer one recipe is shown in full."""
    method: str | None = None
    """Only this method."""
    optimizer: str | None = None
    """Only this optimizer."""
    names: bool = False
    """List every data set, loss, rule and optimizer."""

    def run(self) -> None:
        """Print the list, or one recipe."""
        if self.names:
            _print_names()
        elif self.data is None or self.method is None or self.optimizer is None:
            self._list()
        else:
            chosen = recipe(self.data, self.method, self.optimizer)
            rows = tuple(
                (name, _value(entry.value), chosen.sources[name])
                for name, entry in chosen.entries.items()
            )
            print(table(("setting", "value", "source"), rows))

    def _list(self) -> None:
        asked = (self.data, self.method, self.optimizer)
        listed = {
            key: tables
            for key, tables in combinations().items()
            if all(want in (None, have) for want, have in zip(asked, key, strict=True))
        }
        if not listed:
            raise UsageError(
                f"the paper has no recipe for {' '.join(name for name in asked if name)}; name data, "
                "method and optimizer to see what fastsam takes instead"
            )
        rows = tuple(_summary(recipe(*key), listed[key]) for key in sorted(listed, key=_by_data))
        header = ("data", "method", "optimizer", *_SUMMARY, "in", "other values not known")
        print(table(header, rows))
        print("? not a published value; show one with --data NAME --method NAME --optimizer NAME")


_SUMMARY = ("model", "epochs", "batch_size", "lr", "weight_decay", "defer_epoch", "rho")


def _by_data(key: tuple[str, str, str]) -> int:
    """Sorts recipes by data set alone."""
    return tuple(DATASETS).index(key[0])


def _summary(chosen: Recipe, tables: Sequence[str]) -> tuple[str, ...]:
    """The main settings of a recipe, marked where no source states them, and the tables it is of."""
    shown = {name: chosen.entries[name] for name in _SUMMARY if name in chosen.entries}
    guessed = (
        name for name, entry in chosen.entries.items() if not entry.known and name not in shown
    )
    return (
        chosen.data,
        chosen.method,
        chosen.optimizer,
        *(
            _value(shown[name].value) + ("" if shown[name].known else "?") if name in shown else "-"
            for name in _SUMMARY
        ),
        " ".join(tables),
        " ".join(guessed) or "-",
    )


def _value(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _print_names() -> None:
    print(f"data: {', '.join(DATASETS.names(plugins=True))}")
    print("methods: loss or loss-rule, with")
    for part in (*LOSSES.values(), *RULES.values()):
        print(f"  {part.name}: {part.summary}")
    print("optimizers:")
    for part in OPTIMIZERS.values():
        print(f"  {part.name}: {part.summary}")
    print(f"models: {', '.join(MODELS.names())}")
    print("calibrators:")
    for calibrator in CALIBRATORS.values():
        print(f"  {calibrator.name}: {calibrator.summary}")


def command(arguments: Sequence[str]) -> type[Recipes]:
    """The command, which has the same options for all arguments."""
    return Recipes
