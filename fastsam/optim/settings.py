"""What a parameter group may say about the ascent, and what that means for each of its parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

_PAPER_ETA = 0.01
"""Kwon et al. 2021, section 5."""


def check_rho(rho: float | Tensor) -> None:
    """Raises ValueError unless ``rho`` is a finite number >= 0.

    A tensor that is not on the CPU is taken as it is: reading it would wait for the device, and a value
    that is not finite skips the step there.
    """
    if isinstance(rho, Tensor) and rho.device.type != "cpu":
        return
    _check_size("rho", rho)


def check_group(group: Mapping[str, Any]) -> None:
    """Raises ValueError where a setting of the ascent in ``group`` is not one; absent ones are fine."""
    check_rho(group.get("rho", 0.0))
    adaptive = group.get("adaptive", False)
    if not (isinstance(adaptive, bool) or adaptive == "weights"):
        raise ValueError(f"adaptive must be True, False or 'weights', got {adaptive!r}")
    if group.get("eta") is not None:
        _check_size("eta", group["eta"])
    stochastic = group.get("stochastic_rounding", False)
    if not isinstance(stochastic, bool):
        raise ValueError(f"stochastic_rounding must be True or False, got {stochastic!r}")


def eta_of(group: Mapping[str, Any]) -> float:
    """ASAM's eta of a group; where it is None, that of its paper with ``"weights"`` and 0 otherwise."""
    if group["eta"] is not None:
        return group["eta"]  # type: ignore[no-any-return]
    return _PAPER_ETA if group["adaptive"] == "weights" else 0.0


def normalised(group: Mapping[str, Any]) -> Sequence[bool]:
    """Which parameters of a group ASAM normalises."""
    if group["adaptive"] != "weights":
        return [bool(group["adaptive"])] * len(group["params"])
    names = group.get("param_names")
    if names is not None:
        return ["weight" in name for name in names]
    return [p.dim() >= 2 for p in group["params"]]


def _check_size(name: str, value: Any) -> None:
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0.0 <= number < math.inf:
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
