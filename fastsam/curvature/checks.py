"""Checks of numeric options before a run."""

from __future__ import annotations

import numbers
from typing import Any


def check_count(name: str, value: Any, *, least: int = 1, unit: str = "") -> None:
    """Raise an error unless an option is an integer of at least ``least``.

    Raises:
        TypeError: the value is not an integer.
        ValueError: the value is too small.
    """
    of = f" ({unit})" if unit else ""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer{of}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}{of}, got {value}")


def check_number(name: str, value: Any, *, below: float, unit: str = "") -> None:
    """Raise an error unless an option is a real number in ``[0, below)``.

    Raises:
        TypeError: the value is not a number.
        ValueError: the value is negative, NaN or too large.
    """
    of = f" ({unit})" if unit else ""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number{of}, got {value!r}")
    if not 0 <= float(value) < below:
        raise ValueError(f"{name} must be in [0, {below}){of}, got {value}")
