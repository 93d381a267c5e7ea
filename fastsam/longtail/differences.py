"""Which settings differ between two runs, for resuming, plans of sweeps and reports."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from fastsam.longtail.config import before, place_settings, settings_in
from fastsam.longtail.data.catalog import DATASETS
from fastsam.longtail.errors import UsageError


def differences(
    one: Mapping[str, Any], other: Mapping[str, Any], *, same_content: bool = False
) -> list[str]:
    """Return the names of the settings that differ between two runs.

    Settings that determine only where a run is executed or what is measured of it are ignored. The exception
    is the folder of the user's own data, because nothing else identifies these data. If a setting is missing
    in one of the runs, because an older version wrote it, it has the value that was hard-coded in that
    version. The precision ``auto`` agrees with every other one.

    Args:
        one: settings as returned by :meth:`TrainConfig.as_dict`, possibly of another version.
        other: settings of the other run.
        same_content: whether the caller compares the contents of the data, so that their folder is ignored.
    """
    return [name for name, _, _ in _different(one, other, same_content)]


def changes(
    stored: Mapping[str, Any],
    wanted: Mapping[str, Any],
    *,
    same_content: bool = False,
    but_for: Collection[str] = (),
) -> str:
    """Describe the settings that differ between a stored run and the wanted one; empty if none do.

    Args:
        stored: as for :func:`differences`.
        wanted: settings of the wanted run.
        same_content: as for :func:`differences`.
        but_for: names of settings that do not count.

    Example:
        >>> changes({"lr": 0.1, "rho": [0.05], "device": "cpu"}, {"lr": 0.2, "rho": [0.05], "device": "cuda"})
        'lr was 0.1, is now 0.2'
    """
    found = _different(stored, wanted, same_content)
    return "; ".join(
        f"{name} was {_shown(before)}, is now {_shown(now)}"
        for name, before, now in found
        if name not in but_for
    )


def identity(stored: Mapping[str, Any], *, varied: Collection[str] = ()) -> dict[str, Any]:
    """Return the settings that distinguish a run from others; see :func:`differences`.

    Args:
        stored: settings as returned by :meth:`TrainConfig.as_dict`, possibly of another version.
        varied: names of settings that count although they determine only where a run is executed.
    """
    known = {**settings_in(stored), **_known_before(stored)}
    place = {*place_settings()} - {*varied}
    if is_own(str(known.get("data"))):
        place.discard("data_root")
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in known.items()
        if name not in place
    }


def _different(
    one: Mapping[str, Any], other: Mapping[str, Any], same_content: bool
) -> list[tuple[str, Any, Any]]:
    """Return name and both values of each setting that differs."""
    one, other = identity(one), identity(other)
    ignored = {"data_root"} if same_content else set()
    if "auto" in (one.get("precision"), other.get("precision")):
        ignored.add("precision")  # the stored run has what it stood for on its device
    pairs = [(name, one.get(name), other.get(name)) for name in {**one, **other}]
    return [(name, a, b) for name, a, b in pairs if a != b and name not in ignored]


def _shown(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def is_own(data: str) -> bool:
    """Return whether a data set is the user's own, read from a folder of any content."""
    part = DATASETS.get(data)
    return part is not None and bool(part.own)


def _known_before(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return :func:`before`, or nothing if a part is unknown here."""
    try:
        return before(values)
    except UsageError:
        return {}
