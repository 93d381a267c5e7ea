"""Ways to train that differ in their optimizer alone, as panels of a paired comparison."""

from __future__ import annotations

from collections.abc import Sequence

from fastsam.longtail.differences import differences
from fastsam.longtail.measured import Measured
from fastsam.longtail.optimizers import OPTIMIZERS
from fastsam.longtail.schedules import RHO_SCHEDULES
from fastsam.report.collect import Runs
from fastsam.report.comparison import SCORES, Arm, PairedPanel, scores_of
from fastsam.report.groups import SEEDS, Group, data_title, seeds


def panels_of(runs: Runs, groups: Sequence[Group]) -> Sequence[PairedPanel]:
    """Return the comparison that a file holds; without one, that of runs that differ in their optimizer."""
    return paired_panels(groups) if runs.comparison is None else runs.comparison.panels


def paired_panels(groups: Sequence[Group]) -> list[PairedPanel]:
    """Return a panel for all groups that differ in their optimizer and its settings alone.

    The first arm is SGD where there is one. Only seeds that both sides of a pair have count, and a pair
    needs two; pairs with other seeds are in a panel of their own.
    """
    own = _settings_of_optimizers()
    alike: list[list[Group]] = []
    for group in groups:
        others = next((each for each in alike if _same(each[0], group, own)), None)
        if others is None:
            alike.append([group])
        else:
            others.append(group)
    return [panel for members in alike for panel in _panels(members)]


def _settings_of_optimizers() -> set[str]:
    parts = (*OPTIMIZERS.examples().values(), *RHO_SCHEDULES.examples().values())
    names = {name for part in parts for name in part.settings.__dataclass_fields__}
    return names | {"optimizer", *SEEDS}


def _same(one: Group, other: Group, but_for: set[str]) -> bool:
    return set(differences(one.first.config, other.first.config)) <= but_for


def _panels(groups: Sequence[Group]) -> list[PairedPanel]:
    plain = [group for group in groups if group.first.config["optimizer"] == "sgd"]
    first = (plain or groups)[0]
    partners: dict[tuple[object, ...], list[Group]] = {}
    for group in groups:
        common = sorted({*map(seeds, first.results)} & {*map(seeds, group.results)}, key=repr)
        if group is not first and len(common) > 1:
            partners.setdefault(tuple(common), []).append(group)
    title = f"{data_title(first.first)}, {first.first.config['method']}"
    return [
        PairedPanel(title, [_arm(group, common) for group in (first, *others)], [])
        for common, others in partners.items()
    ]


def _arm(group: Group, common: Sequence[object]) -> Arm:
    results = [next(r for r in group.results if seeds(r) == each) for each in common]
    cost = Measured.of(result.total_gradients for result in results)
    scores = [scores_of(result.test) for result in results]
    raw = {name: [each[name] for each in scores] for name in SCORES}
    name = group.label.removeprefix(f"{group.first.config['method']} ")
    return Arm(name, cost.mean, raw, {})
