"""Checks of options, and the settings that parameter groups imply for their parameters."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

_PAPER_ETA = 0.01
"""Kwon et al. 2021, section 5."""


def refuse_clashes(owner: str, names: Collection[str], base: Optimizer) -> None:
    """Raise ValueError if a base optimizer has an option under one of ``names``.

    Both optimizers would read it from the same parameter groups, but Adadelta's ``rho``, for example, is a
    decay rate. A base that has all of the names got them from an earlier wrapper and is accepted.

    Args:
        owner: name of the outer optimizer's class, for the message.
        names: names of the outer optimizer's options in the parameter groups.
        base: the base optimizer.
    """
    own = sorted(base.defaults.keys() & names)
    if own and len(own) < len(names):
        raise ValueError(
            f"{type(base).__name__} and {owner} both have an option named {own[0]!r} and would read it from "
            "the same parameter groups; rename it in a subclass of the base optimizer, or choose another "
            "base optimizer"
        )


def check_rho(rho: float | Tensor) -> None:
    """Raise ValueError unless ``rho`` is a finite number >= 0.

    A tensor on another device than the CPU is not checked, because the host would wait for it. If its value
    is not finite, the device skips the step.
    """
    if isinstance(rho, Tensor) and rho.device.type != "cpu":
        return
    check_number("rho", rho)


def check_group(group: Mapping[str, Any]) -> None:
    """Raise ValueError if an option of SAM or of the base optimizer is invalid; options may be missing."""
    check_rho(group.get("rho", 0.0))
    adaptive = group.get("adaptive", False)
    if not (isinstance(adaptive, bool) or (isinstance(adaptive, str) and adaptive == "weights")):
        raise ValueError(f"adaptive must be True, False or 'weights', got {adaptive!r}")
    if group.get("eta") is not None:
        check_number("eta", group["eta"])
    check_flag("stochastic_rounding", group.get("stochastic_rounding", False))
    check_flag("perturb", group.get("perturb", True))
    check_base_group(group)


def check_base_group(group: Mapping[str, Any]) -> None:
    """Raise ValueError if an option of the base optimizer is NaN, or its learning rate is not finite or < 0.

    The base optimizer checks the rest, but with comparisons that NaN passes.
    """
    for name, value in group.items():
        if name not in ("params", "param_names"):
            _refuse_nan(name, value)
    lr = group.get("lr")
    if lr is not None and not (isinstance(lr, Tensor) and lr.device.type != "cpu"):
        check_number("lr", lr)


def check_number(
    name: str, value: Any, *, low: float = 0.0, high: float = math.inf, whole: bool = False
) -> None:
    """Raise ValueError unless ``value`` is a finite number with ``low <= value <= high``.

    Numbers are those of Python and NumPy and CPU tensors of one element. Booleans and strings are not.

    Args:
        name: name of the option, for the message.
        value: value of the option.
        low: smallest allowed value.
        high: largest allowed value.
        whole: whether the value must be an integer.
    """
    number = _as_number(value)
    is_whole = not isinstance(value, Tensor) and isinstance(value, Integral)
    if low <= number <= high and math.isfinite(number) and (is_whole or not whole):
        return
    kind = "an integer" if whole else "a finite number"
    limit = "" if high == math.inf else f" and <= {high:g}"
    raise ValueError(f"{name} must be {kind} >= {low:g}{limit}, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if not (isinstance(value, str) and value in choices):
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def eta_of(group: Mapping[str, Any]) -> float:
    """Return a group's eta for ASAM; the default is the paper's value with ``"weights"`` and 0 otherwise."""
    if group["eta"] is not None:
        return group["eta"]  # type: ignore[no-any-return]
    return _PAPER_ETA if group["adaptive"] == "weights" else 0.0


def normalized(group: Mapping[str, Any]) -> Sequence[bool]:
    """Return, for each parameter of a group, whether ASAM normalizes it."""
    if group["adaptive"] != "weights":
        return [bool(group["adaptive"])] * len(group["params"])
    names = group.get("param_names")
    if names is not None:
        return ["weight" in name for name in names]
    return [p.dim() >= 2 for p in group["params"]]


def _as_number(value: Any) -> float:
    """Return ``value`` as a float, or NaN if it is not a number."""
    is_truth = isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))
    if is_truth or isinstance(value, (str, bytes)):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return math.nan


def _refuse_nan(name: str, value: Any) -> None:
    """Raise ValueError if an option is or contains NaN."""
    if isinstance(value, (tuple, list)):
        for part in value:
            _refuse_nan(name, part)
    elif isinstance(value, Tensor):
        if value.device.type == "cpu" and value.is_floating_point() and bool(value.isnan().any()):
            raise ValueError(f"{name} must be a number, got {value!r}")
    elif isinstance(value, Real) and math.isnan(value):
        raise ValueError(f"{name} must be a number, got {value!r}")
