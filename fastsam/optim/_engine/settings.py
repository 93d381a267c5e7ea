"""Checks of options, and what the settings of a parameter group mean for each of its parameters."""

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
    """Raise ValueError where a base optimizer has a default of its own under one of ``names``.

    Both would read it from the same parameter groups: Adadelta's ``rho`` is a decay. A base that has all of
    the names has them from an earlier wrapper.

    Args:
        owner: class of the optimizer whose options have these names, for the message.
        names: names of its options in the parameter groups.
        base: the base optimizer.
    """
    own = sorted(base.defaults.keys() & names)
    if own and len(own) < len(names):
        raise ValueError(
            f"{type(base).__name__} has an option of its own named {own[0]!r}, as {owner} has, and both "
            "would read it from the same parameter groups; rename it in a subclass of the base optimizer, "
            "or choose another base"
        )


def check_rho(rho: float | Tensor) -> None:
    """Raise ValueError unless ``rho`` is a finite number >= 0.

    A tensor that is not on the CPU is not checked: reading it would wait for the device, and a value that is
    not finite skips the step there.
    """
    if isinstance(rho, Tensor) and rho.device.type != "cpu":
        return
    check_number("rho", rho)


def check_group(group: Mapping[str, Any]) -> None:
    """Raise ValueError where a setting of the ascent or of its base is invalid; any may be absent."""
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
    """Raise ValueError where a base optimizer's option is NaN or its learning rate no finite number.

    The rest is the base optimizer's business. NaN slips through its comparisons.
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

    Python's and NumPy's numbers and CPU tensors of one element are numbers; truth values and strings are not.

    Args:
        name: name of the option, for the message.
        value: its value.
        low: smallest value.
        high: largest value.
        whole: whether it must be an integer.
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
    """Return ASAM's eta of a group; None is the paper's value with ``"weights"`` and 0 otherwise."""
    if group["eta"] is not None:
        return group["eta"]  # type: ignore[no-any-return]
    return _PAPER_ETA if group["adaptive"] == "weights" else 0.0


def normalized(group: Mapping[str, Any]) -> Sequence[bool]:
    """Return which parameters of a group ASAM normalizes."""
    if group["adaptive"] != "weights":
        return [bool(group["adaptive"])] * len(group["params"])
    names = group.get("param_names")
    if names is not None:
        return ["weight" in name for name in names]
    return [p.dim() >= 2 for p in group["params"]]


def _as_number(value: Any) -> float:
    """Return ``value`` as a float; NaN where it is no number."""
    is_truth = isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))
    if is_truth or isinstance(value, (str, bytes)):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return math.nan


def _refuse_nan(name: str, value: Any) -> None:
    """Raise ValueError where an option is NaN or contains one."""
    if isinstance(value, (tuple, list)):
        for part in value:
            _refuse_nan(name, part)
    elif isinstance(value, Tensor):
        if value.device.type == "cpu" and value.is_floating_point() and bool(value.isnan().any()):
            raise ValueError(f"{name} must be a number, got {value!r}")
    elif isinstance(value, Real) and math.isnan(value):
        raise ValueError(f"{name} must be a number, got {value!r}")
