"""Calibrators: changes of a trained classifier, chosen on validation images. Each file defines one."""

from fastsam.longtail.calibrators.base import (
    CALIBRATORS,
    Calibrator,
    Parameters,
    TrainedHead,
    register_calibrator,
)

__all__ = ["CALIBRATORS", "Calibrator", "Parameters", "TrainedHead", "register_calibrator"]
