"""Runs that differ in their seeds alone, together under a name of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsam.longtail.config import settings_in
from fastsam.longtail.differences import differences, is_own
from fastsam.longtail.results import Result
from fastsam.report.collect import Run

SEEDS = ("seed", "subset_seed")
"""Settings in which the runs of a group may differ."""
_IMAGES = "images"
"""Stands for the images among the names of settings in which runs differ."""


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seeds and place.

    Attributes:
        label: ``method optimizer``, with the settings in which groups of that name differ. Where these are
            more than two, the folder takes their place if it says which runs are meant.
        runs: one for each seed.
    """

    label: str
    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        """The label, with the number of seeds where there are several."""
        return self.label if len(self.runs) == 1 else f"{self.label}, {len(self.runs)} seeds"

    @property
    def results(self) -> list[Result]:
        """The results of the runs."""
        return [run.result for run in self.runs]

    @property
    def first(self) -> Result:
        """The result of the first run, whose settings are those of all but for the seeds."""
        return self.runs[0].result


def by_settings(runs: Sequence[Run]) -> list[Group]:
    """Return the groups of ``runs``, in the order of their first runs."""
    groups: list[list[Run]] = []
    for run in runs:
        members = next((group for group in groups if not _differing(group[0], run)), None)
        if members is None:
            groups.append([run])
        # The same run twice is not two seeds: it would narrow the deviation.
        elif not any(seeds(member.result) == seeds(run.result) for member in members):
            members.append(run)
    settings = [_differing_settings(members, groups) for members in groups]
    folders = [_common_folder(members) for members in groups]
    labels = []
    for members, own, folder in zip(groups, settings, folders, strict=True):
        by_folder = len(own) > 2 and folder and folders.count(folder) == 1
        name = members[0].name
        labels.append(f"{name} in {folder}" if by_folder else ", ".join([name, *own]))
    return [Group(*each) for each in zip(labels, map(tuple, groups), strict=True)]


def with_the_same_classes(groups: Sequence[Group]) -> list[list[int]]:
    """Return the places of the groups of runs on each set of classes."""
    found: dict[tuple[str, ...], list[int]] = {}
    for place, group in enumerate(groups):
        found.setdefault(tuple(group.first.class_names), []).append(place)
    return list(found.values())


def places_of(groups: Sequence[Group]) -> dict[int, int]:
    """Return the place of the group of each run, by ``id(run)``."""
    return {id(run): place for place, group in enumerate(groups) for run in group.runs}


def seeds(result: Result) -> tuple[Any, ...]:
    """Return the seeds of a run."""
    return tuple(result.config.get(name) for name in SEEDS)


def on_same_images(one: Result, other: Result) -> bool:
    """Return whether two runs can have been trained on the same images, by what their results record.

    Runs with different ``subset_seed`` have different training sets, and are compared by their classes alone,
    as are runs of older versions, which recorded less.
    """
    if one.class_names != other.class_names:
        return False
    hashes = {one.subset_hash, other.subset_hash}
    seeds = {result.config.get("subset_seed") for result in (one, other)}
    return len(hashes) == 1 or None in hashes or len(seeds) == 2


def data_title(result: Result) -> str:
    """Return the data set of a run, with its imbalance and wrong labels where they were made.

    Of the user's own images, it names the last part of their folder.
    """
    imbalance, noise = result.config.get("imbalance"), result.config.get("label_noise")
    data, root = str(result.config["data"]), result.config.get("data_root")
    parts = [f"{data} {Path(root).name}" if root and is_own(data) else data]
    if imbalance is not None:
        parts.append(f"imbalance {imbalance:g}")
    if noise:
        parts.append(f"{100 * noise:g} % wrong labels")
    return ", ".join(parts)


def setting_text(value: object) -> str:
    """Return a setting as text; empty for one that a run does not have."""
    if isinstance(value, list):
        return " ".join(str(item) for item in value)
    return "" if value is None else str(value)


def _differing_settings(members: Sequence[Run], groups: Sequence[Sequence[Run]]) -> list[str]:
    """Return the settings in which groups of the same name differ."""
    first = members[0]
    rivals = [other[0] for other in groups if other[0].name == first.name]
    differing = {name for rival in rivals for name in _differing(first, rival)}
    texts = [
        f"{name} {setting_text(value)}"
        for name, value in settings_in(first.result.config).items()
        if name in differing
    ]
    if _IMAGES in differing:
        texts.append(f"training set {(first.result.subset_hash or 'unknown')[:8]}")
    return texts


def _common_folder(members: Sequence[Run]) -> str:
    """Return the common part of the members' folders, without the parts that name their seeds."""
    paths = [run.folder.split("/") for run in members]
    if len({len(path) for path in paths}) > 1:
        return ""
    return "/".join(parts[0] for parts in zip(*paths, strict=True) if len(set(parts)) == 1)


def _differing(one: Run, other: Run) -> list[str]:
    """Return the settings, except seeds, that distinguish two runs, and :data:`_IMAGES` for other images."""
    found = differences(one.result.config, other.result.config)
    images = [] if on_same_images(one.result, other.result) else [_IMAGES]
    return [name for name in found if name not in SEEDS] + images
