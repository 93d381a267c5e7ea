"""Spectra of Hessians and other symmetric operators by batched Lanczos."""

from fastsam.curvature.api import (
    class_spectra,
    group_spectra,
    layer_spectra,
    operator_spectrum,
    spectral_density,
)
from fastsam.curvature.comparison import Comparison, compare, merge, table
from fastsam.curvature.eigenpairs import Eigenpairs, eigenpairs
from fastsam.curvature.escape import (
    EscapeReport,
    NegativeCurvature,
    escape_report,
    negative_curvature,
)
from fastsam.curvature.losses import BatchLoss
from fastsam.curvature.operators import (
    CallableOperator,
    MatrixOperator,
    Operator,
    from_scipy,
    to_scipy,
)
from fastsam.curvature.spectrum import (
    Estimate,
    Histogram,
    MassBelow,
    Spectrum,
    normal_interval,
)

__all__ = [
    "BatchLoss",
    "CallableOperator",
    "Comparison",
    "Eigenpairs",
    "EscapeReport",
    "Estimate",
    "Histogram",
    "MassBelow",
    "MatrixOperator",
    "NegativeCurvature",
    "Operator",
    "Spectrum",
    "class_spectra",
    "compare",
    "eigenpairs",
    "escape_report",
    "from_scipy",
    "group_spectra",
    "layer_spectra",
    "merge",
    "negative_curvature",
    "normal_interval",
    "operator_spectrum",
    "spectral_density",
    "table",
    "to_scipy",
]
