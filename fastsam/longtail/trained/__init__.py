"""Trained runs: evaluation, calibration, prediction and export."""

from fastsam.longtail.trained.calibrate import calibrate_run
from fastsam.longtail.trained.calibration import Calibration
from fastsam.longtail.trained.evaluation import Evaluation, evaluate_run
from fastsam.longtail.trained.export import export_run
from fastsam.longtail.trained.prediction import FilePrediction, predict_files
from fastsam.longtail.trained.run import TrainedRun
from fastsam.longtail.trained.weights import load_weights

__all__ = [
    "Calibration",
    "Evaluation",
    "FilePrediction",
    "TrainedRun",
    "calibrate_run",
    "evaluate_run",
    "export_run",
    "load_weights",
    "predict_files",
]
