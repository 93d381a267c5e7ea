"""Selection of the parameters to differentiate by."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from fastsam.curvature.randomness import USER_CODE


def parameter_names(model: nn.Module, selection: Iterable[str] | None) -> list[str]:
    """Return the names of the parameters to differentiate by.

    Args:
        model: any module.
        selection: names of parameters, or of modules for all parameters in them. None: all
            parameters that require a gradient.

    Raises:
        ValueError: a name is unknown, no parameter is selected, or the parameters are on several
            devices.
    """
    with USER_CODE:  # another run may have swapped its parameters into the model
        available = dict(model.named_parameters())
    if selection is None:
        names = [name for name, value in available.items() if value.requires_grad]
        if not names:
            raise ValueError(
                "the model has no parameter that requires a gradient; select some by name with "
                "params="
            )
    else:
        names = selected_names(available, [selection] if isinstance(selection, str) else selection)
    for name in names:
        if not available[name].is_floating_point():
            raise ValueError(
                f"parameter {name!r} has dtype {available[name].dtype}, expected a floating-point "
                "dtype; exclude it with params="
            )
    devices = {str(available[name].device) for name in names}
    if len(devices) > 1:
        raise ValueError(
            f"the parameters are on several devices, {', '.join(sorted(devices))}; expected one: move "
            "the model, or select parameters of one device with params="
        )
    return names


def shortest_selection(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the fewest names of layers and parameters that select exactly ``names``.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> shortest_selection(model, ["0.bias", "2.weight", "2.bias"])
        ['0.bias', '2']
    """
    available = [name for name, _ in model.named_parameters()]
    chosen, covered = set(names), set[str]()
    selection: list[str] = []
    for name in available:
        if name in covered or name not in chosen:
            continue
        parts = name.split(".")
        entries = (".".join(parts[: depth + 1]) for depth in range(len(parts)))
        widest = next(entry for entry in entries if chosen.issuperset(_within(available, entry)))
        selection.append(widest)
        covered.update(_within(available, widest))
    return selection


def _within(available: Iterable[str], entry: str) -> list[str]:
    """Return the parameters that a name selects: itself, or all parameters of a layer."""
    return [name for name in available if name == entry or name.startswith(f"{entry}.")]


def selected_names(available: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """Return the names of the parameters that names of parameters and layers select.

    Raises:
        ValueError: a name selects nothing, or nothing is selected.
    """
    available = list(available)
    names: list[str] = []
    for entry in wanted:
        found = _within(available, entry)
        if not found:
            known = ", ".join(available)
            raise ValueError(
                f"params: the model has no parameter or layer named {entry!r}; it has {known}"
            )
        names += [name for name in found if name not in names]
    if not names:
        raise ValueError("params selects no parameter; pass at least one name, or None for all")
    return names
