"""Epochs at which something begins: the deferred loss or sampling, and ascents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastsam.longtail.config import TrainConfig
from fastsam.longtail.errors import LongTailError
from fastsam.longtail.optimizers.base import AscentSettings
from fastsam.longtail.results import Result
from fastsam.report.groups import Group


@dataclass(frozen=True)
class Mark:
    """What begins after an epoch.

    Attributes:
        kind: ``deferral``, ``ascents begin`` or ``ascents end``.
        after: the last epoch before.
        places: places of the groups of runs in which it happens.
    """

    kind: str
    after: int
    places: tuple[int, ...]


def marks(groups: Sequence[Group]) -> list[Mark]:
    """Return what happens within the groups of runs, without ascents from the first epoch on."""
    found: dict[tuple[str, int], list[int]] = {}
    for place, group in enumerate(groups):
        for mark in _marks(group.first):
            found.setdefault(mark, []).append(place)
    return [Mark(kind, after, tuple(places)) for (kind, after), places in found.items()]


def _marks(result: Result) -> Iterator[tuple[str, int]]:
    try:
        config = TrainConfig.from_dict(result.config)
    except LongTailError:  # a setting or a plug-in that this version does not have
        return
    if config.defer_epoch is not None:
        yield "deferral", config.defer_epoch
    settings = config.parts["optimizer"]
    if isinstance(settings, AscentSettings):
        first = settings.first_ascent_epoch(config.run)
        if first > 1:
            yield "ascents begin", first - 1
        if settings.ascent_stop is not None and settings.ascent_stop < config.epochs:
            yield "ascents end", settings.ascent_stop
