"""What is done with a run after its training."""

from fastsam.longtail.trained.prediction import FilePrediction, predict_files
from fastsam.longtail.trained.run import TrainedRun

__all__ = ["FilePrediction", "TrainedRun", "predict_files"]
