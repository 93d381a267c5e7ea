"""Registry of curvature matrices. A new one is one file in this folder that registers a kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastsam.curvature.products.graphs import GraphBuilder


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A curvature matrix.

    Attributes:
        name: its name, as in ``curvature_operator(..., kind=name)``.
        summary: one line about it.
        builder: returns the builder of its graphs, given a seed for random numbers.
        is_hessian: whether it is the Hessian of the loss itself, for which strategies exist that
            differentiate the loss in forward mode.
        is_random: whether its products depend on the seed and on how the data are cut into batches.
    """

    name: str
    summary: str
    builder: Callable[[int], GraphBuilder]
    is_hessian: bool = False
    is_random: bool = False


_KINDS: dict[str, Kind] = {}


def register_kind(kind: Kind) -> None:
    """Make a kind available by its name.

    Raises:
        ValueError: the name is taken.
    """
    if kind.name in _KINDS:
        raise ValueError(f"the curvature kind {kind.name!r} is registered already")
    _KINDS[kind.name] = kind


def registered_kinds() -> dict[str, Kind]:
    """Return the registered kinds by name."""
    return dict(_KINDS)
