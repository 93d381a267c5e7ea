"""Ways to train that differ in their optimizer alone, as panels of a paired comparison."""

from __future__ import annotations

from collections.abc import Sequence

from fastsam.longtail.differences import differences
from fastsam.longtail.measured import Measured
from fastsam.longtail.optimizers import OPTIMIZERS
from fastsam.longtail.schedules import RHO_SCHEDULES
from fastsam.report.collect import Runs
from fastsam.report.comparison import SCORES, Arm, PairedPanel, scores_of
from fastsam.report.groups import SEEDS, Group, data_title, on_same_images, seeds


def panels_of(runs: Runs, groups: Sequence[Group]) -> Sequence[PairedPanel]:
    """Return the comparison that a file holds; without one, that of runs that differ in their optimizer."""
    return paired_panels(groups) if runs.comparison is None else runs.comparison.panels


def paired_panels(groups: Sequence[Group]) -> list[PairedPanel]:
    """Return panels of all groups that differ in their optimizer and its settings alone.

    Only seeds that both sides of a pair have count, and a pair needs two. The first arm of a panel is the
    group with SGD that makes pairs with most others, or else any such group. Pairs with other seeds are in a
    panel of their own, and so are groups that make no pair with the first one.
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
    alike = set(differences(one.first.config, other.first.config)) <= but_for
    return alike and on_same_images(one.first, other.first)


def _panels(groups: Sequence[Group]) -> list[PairedPanel]:
    panels: list[PairedPanel] = []
    left = list(groups)
    while len(left) > 1:
        partners = [_partners(group, left) for group in left]
        plain = [group.first.config["optimizer"] == "sgd" for group in left]
        order = range(len(left))
        best = max(order, key=lambda i: (bool(partners[i]) and plain[i], len(partners[i])))
        if not partners[best]:
            break
        first = left[best]
        title = f"{data_title(first.first)}, {first.first.config['method']}"
        by_seeds: dict[tuple[object, ...], list[Group]] = {}
        for other, common in partners[best]:
            by_seeds.setdefault(common, []).append(other)
        for common, others in by_seeds.items():
            arms = [_arm(group, common) for group in (first, *others)]
            panels.append(PairedPanel(title, arms, []))
        compared = [first, *(other for other, _ in partners[best])]
        left = [group for group in left if all(group is not each for each in compared)]
    return panels


def _partners(first: Group, groups: Sequence[Group]) -> list[tuple[Group, tuple[object, ...]]]:
    """Return the other groups with at least two seeds in common with ``first``, and these seeds."""
    found: list[tuple[Group, tuple[object, ...]]] = []
    for group in groups:
        common = sorted({*map(seeds, first.results)} & {*map(seeds, group.results)}, key=repr)
        if group is not first and len(common) > 1:
            found.append((group, tuple(common)))
    return found


def _arm(group: Group, common: Sequence[object]) -> Arm:
    results = [next(r for r in group.results if seeds(r) == each) for each in common]
    cost = Measured.of(result.total_gradients for result in results)
    scores = [scores_of(result.test) for result in results]
    raw = {name: [each[name] for each in scores] for name in SCORES}
    name = group.label.removeprefix(f"{group.first.config['method']} ")
    return Arm(name, cost.mean, raw, {})
