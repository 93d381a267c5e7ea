"""Detection of images that occur more than once: in a split, under two classes, or in two splits."""

from __future__ import annotations

import itertools
import posixpath
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

from fastsam.longtail.data.dataset import Images
from fastsam.longtail.data.lists import ImageList


class Keyed(NamedTuple):
    """Images of a split with the keys by which they are compared.

    Attributes:
        keys: key of each image. Images with equal keys are the same.
        targets: class of each image.
        names: name of each image, for messages.
    """

    keys: Sequence[Hashable]
    targets: Sequence[int]
    names: Sequence[str]


def repeated(splits: Mapping[str, Keyed], what: str) -> list[str]:
    """Describe the images that occur more than once, with one line for each kind of problem.

    Args:
        splits: the splits by name.
        what: what repeated images have in common, ``path`` or ``content``.

    Example:
        >>> repeated({"train": Keyed("aab", [0, 0, 1], ["x", "y", "z"])}, "content")
        ['train: 1 image repeats the content of another; the first is y (same as x)']
    """
    places: dict[str, dict[Hashable, list[int]]] = {}
    lines = []
    for split, keyed in splits.items():
        by_key: dict[Hashable, list[int]] = defaultdict(list)
        for place, key in enumerate(keyed.keys):
            by_key[key].append(place)
        places[split] = by_key
        again = [(found[0], place) for found in by_key.values() for place in found[1:]]
        if again:
            count = (
                f"{len(again)} image repeats" if len(again) == 1 else f"{len(again)} images repeat"
            )
            lines.append(
                f"{split}: {count} the {what} of another; the first is "
                f"{_pair(keyed.names[again[0][1]], keyed.names[again[0][0]])}"
            )
        torn = [
            found for found in by_key.values() if len({keyed.targets[place] for place in found}) > 1
        ]
        if torn:
            labels = sorted({keyed.targets[place] for place in torn[0]})
            lines.append(
                f"{split}: {_images(len(torn))} with the same {what} in several classes; the first is "
                f"{keyed.names[torn[0][0]]} (classes {', '.join(map(str, labels))})"
            )
    for one, other in itertools.combinations(splits, 2):
        shared = [key for key in places[one] if key in places[other]]
        if shared:
            here = splits[one].names[places[one][shared[0]][0]]
            there = splits[other].names[places[other][shared[0]][0]]
            lines.append(
                f"{one} and {other} share {_images(len(shared))} with the same {what}; the first is "
                f"{_pair(here, there)}"
            )
    return lines


def repeated_paths(lists: Mapping[str, ImageList]) -> list[str]:
    """Describe the paths that occur more than once in one list or in several."""
    return repeated(
        {
            split: Keyed(_normal(images), images.targets.tolist(), images.paths)
            for split, images in lists.items()
        },
        "path",
    )


def repeated_contents(splits: Mapping[str, Images], *, progress: bool = False) -> list[str]:
    """Describe images with equal content under different names.

    Candidates are found by sampled digests, and confirmed by digests of every byte.

    Args:
        splits: the splits by name.
        progress: show progress: a bar on a terminal, one line per minute elsewhere.
    """
    names = {
        split: [images.name_of(i) for i in range(len(images))] for split, images in splits.items()
    }
    sampled = {split: images.digests(progress=progress) for split, images in splits.items()}
    count: dict[bytes, int] = defaultdict(int)
    for digests in sampled.values():
        for digest in digests:
            count[digest] += 1
    keyed = {}
    seen: set[str] = set()
    for split, images in splits.items():
        candidates = [place for place, digest in enumerate(sampled[split]) if count[digest] > 1]
        whole = dict(zip(candidates, images.digests(candidates, whole=True), strict=True))
        keys: list[Hashable] = []
        for place, name in enumerate(names[split]):
            # A repeated path is reported by repeated_paths(), so here it counts as different content.
            path = f"{split}/{name}" if name.startswith("image ") else posixpath.normpath(name)
            keys.append((split, place) if path in seen else whole.get(place, (split, place)))
            seen.add(path)
        keyed[split] = Keyed(keys, images.targets.tolist(), names[split])
    return repeated(keyed, "content")


def _normal(images: ImageList) -> list[str]:
    return [posixpath.normpath(path) for path in images.paths]


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def _pair(one: str, other: str) -> str:
    return one if one == other else f"{one} (same as {other})"
