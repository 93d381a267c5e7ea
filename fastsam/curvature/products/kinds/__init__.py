"""Curvature matrices by name: one file each, found by importing the modules of this folder."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from fastsam.curvature.products.kinds.kind import Kind, register_kind, registered_kinds

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")


def kind_named(name: str) -> Kind:
    """Return a curvature matrix by its name.

    Raises:
        ValueError: the name is unknown.
    """
    kinds = registered_kinds()
    if name not in kinds:
        raise ValueError(f"kind must be one of {', '.join(sorted(kinds))}, got {name!r}")
    return kinds[name]


__all__ = ["Kind", "kind_named", "register_kind", "registered_kinds"]
