"""Registry of named recipes: settings of a publication that replace those of the standard recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fastsam.longtail.errors import UsageError
from fastsam.longtail.registry import Registry, ValuesPart
from fastsam.longtail.settings import Layer, factor_text, matching

STANDARD = "standard"


@dataclass(frozen=True, kw_only=True)
class NamedRecipe(ValuesPart):
    """A named recipe. Once it is registered, ``--recipe NAME`` trains with its settings.

    Settings that the user passes override it. It overrides the standard recipe, except for the learning rate
    of another base optimizer than SGD.

    Attributes:
        exact: values of settings by patterns of the data set, its imbalance factor and the method, such as
            ``("cifar100-lt", "100", "ce")``. Later entries override earlier ones.
    """

    exact: Mapping[tuple[str, str, str], Layer] = field(default_factory=dict)

    @property
    def data(self) -> tuple[str, ...]:
        """Patterns of the data sets that the recipe has values for."""
        return tuple(dict.fromkeys(data for data, _, _ in self.exact))

    def values(self, data: str, imbalance: float | None, method: str) -> Layer:
        """Return the value of each setting for a run, by name.

        Args:
            data: name of the data set.
            imbalance: its imbalance factor; None if it has none.
            method: method of the run.

        Raises:
            UsageError: if the recipe has no values for the data set.
        """
        found = matching(self.exact, data, factor_text(imbalance), method)
        if not found and self.name != STANDARD:
            raise UsageError(
                f"recipe {self.name!r} has no values for data set {data!r}, only for {', '.join(self.data)}; "
                "omit recipe and pass the settings themselves, such as epochs"
            )
        return found


NAMED_RECIPES: Registry[NamedRecipe] = Registry("recipe", "fastsam.longtail.named_recipes")
register_recipe = NAMED_RECIPES.add
