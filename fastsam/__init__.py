"""Fused Sharpness-Aware Minimization, batched Lanczos Hessian spectra, and long-tailed training.

Public names are imported when they are first used, so that commands respond to Ctrl-C while torch is
imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastsam.curvature import (
        BatchLoss,
        Spectrum,
        class_spectra,
        curvature_operator,
        spectral_density,
    )
    from fastsam.kernels.backends import FallbackWarning, build_info, require_native
    from fastsam.optim import SAM, capture_step

__all__ = [
    "SAM",
    "BatchLoss",
    "FallbackWarning",
    "Spectrum",
    "build_info",
    "capture_step",
    "class_spectra",
    "curvature_operator",
    "require_native",
    "spectral_density",
]

__version__ = "0.1.0"

_LOCATIONS = {
    **dict.fromkeys(
        ("BatchLoss", "Spectrum", "class_spectra", "curvature_operator", "spectral_density"),
        "curvature",
    ),
    **dict.fromkeys(("FallbackWarning", "build_info", "require_native"), "kernels.backends"),
    **dict.fromkeys(("SAM", "capture_step"), "optim"),
}
_SUBPACKAGES = ("curvature", "kernels", "optim")


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return import_module(f"fastsam.{name}")
    if name not in _LOCATIONS:
        raise AttributeError(f"module 'fastsam' has no attribute {name!r}")
    return getattr(import_module(f"fastsam.{_LOCATIONS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LOCATIONS, *_SUBPACKAGES})
