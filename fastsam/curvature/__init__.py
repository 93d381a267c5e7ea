"""Spectra of Hessians and other symmetric operators by batched Lanczos."""

from fastsam.curvature.api import (
    class_spectra,
    group_spectra,
    layer_spectra,
    operator_spectrum,
    spectral_density,
)
from fastsam.curvature.losses import BatchLoss
from fastsam.curvature.operators import CallableOperator, MatrixOperator, Operator
from fastsam.curvature.spectrum import (
    Comparison,
    Estimate,
    Spectrum,
    compare,
    merge,
    normal_interval,
)

__all__ = [
    "BatchLoss",
    "CallableOperator",
    "Comparison",
    "Estimate",
    "MatrixOperator",
    "Operator",
    "Spectrum",
    "class_spectra",
    "compare",
    "group_spectra",
    "layer_spectra",
    "merge",
    "normal_interval",
    "operator_spectrum",
    "spectral_density",
]
