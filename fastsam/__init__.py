"""Fused Sharpness-Aware Minimization, batched Lanczos Hessian spectra, and long-tailed training."""

from fastsam.curvature import BatchLoss, Spectrum, class_spectra, spectral_density
from fastsam.kernels.native import build_info
from fastsam.optim import SAM, capture_step

__all__ = [
    "SAM",
    "BatchLoss",
    "Spectrum",
    "build_info",
    "capture_step",
    "class_spectra",
    "spectral_density",
]

__version__ = "0.1.0"
