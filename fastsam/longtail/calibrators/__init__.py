"""Calibrators: changes of a trained classifier that validation chooses, one file for each."""

from fastsam.longtail.calibrators.base import (
    CALIBRATORS,
    Calibrator,
    Parameters,
    TrainedHead,
    register_calibrator,
)

__all__ = ["CALIBRATORS", "Calibrator", "Parameters", "TrainedHead", "register_calibrator"]
