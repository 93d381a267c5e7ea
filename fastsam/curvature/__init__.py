"""Spectra of Hessians and other symmetric operators by batched Lanczos."""

from fastsam.curvature.api import curvature_operator, operator_spectrum, spectral_density
from fastsam.curvature.comparison import Comparison, compare, merge, table
from fastsam.curvature.eigenpairs import ConvergenceWarning, Eigenpairs, eigenpairs
from fastsam.curvature.escape import (
    EscapeReport,
    NegativeCurvature,
    escape_report,
    negative_curvature,
)
from fastsam.curvature.estimates import Estimate, Histogram, MassBelow
from fastsam.curvature.estimators.diagonal import DiagonalEstimate, diagonal
from fastsam.curvature.estimators.frobenius import frobenius_norm
from fastsam.curvature.estimators.functions import log_determinant, trace_of
from fastsam.curvature.estimators.trace import trace
from fastsam.curvature.groups import class_spectra, group_spectra, layer_spectra
from fastsam.curvature.lanczos.options import LanczosOptions
from fastsam.curvature.losses import BatchLoss, OutputLoss
from fastsam.curvature.operators.algebra import CallableOperator, SymmetricOperator
from fastsam.curvature.operators.base import Operator
from fastsam.curvature.operators.curvature import CurvatureOperator
from fastsam.curvature.operators.matrix import MatrixOperator
from fastsam.curvature.operators.scipy import from_scipy, to_scipy
from fastsam.curvature.options import SpectrumOptions
from fastsam.curvature.points import CurvaturePoint, read_points
from fastsam.curvature.sharpness import (
    Sharpness,
    average_sharpness,
    m_sharpness,
    worst_case_sharpness,
)
from fastsam.curvature.spectrum import Spectrum
from fastsam.curvature.surfaces.directions import random_directions
from fastsam.curvature.surfaces.path import LossPath, loss_path
from fastsam.curvature.surfaces.surface import Surface, loss_surface
from fastsam.curvature.tracking import CurvatureTracker

__all__ = [
    "BatchLoss",
    "CallableOperator",
    "Comparison",
    "ConvergenceWarning",
    "CurvatureOperator",
    "CurvaturePoint",
    "CurvatureTracker",
    "DiagonalEstimate",
    "Eigenpairs",
    "EscapeReport",
    "Estimate",
    "Histogram",
    "LanczosOptions",
    "LossPath",
    "MassBelow",
    "MatrixOperator",
    "NegativeCurvature",
    "Operator",
    "OutputLoss",
    "Sharpness",
    "Spectrum",
    "SpectrumOptions",
    "Surface",
    "SymmetricOperator",
    "average_sharpness",
    "class_spectra",
    "compare",
    "curvature_operator",
    "diagonal",
    "eigenpairs",
    "escape_report",
    "frobenius_norm",
    "from_scipy",
    "group_spectra",
    "layer_spectra",
    "log_determinant",
    "loss_path",
    "loss_surface",
    "m_sharpness",
    "merge",
    "negative_curvature",
    "operator_spectrum",
    "random_directions",
    "read_points",
    "spectral_density",
    "table",
    "to_scipy",
    "trace",
    "trace_of",
    "worst_case_sharpness",
]
