"""What is done with a run after its training."""

from fastsam.longtail.trained.export import export_run
from fastsam.longtail.trained.prediction import FilePrediction, predict_files
from fastsam.longtail.trained.run import TrainedRun
from fastsam.longtail.trained.weights import load_weights

__all__ = ["FilePrediction", "TrainedRun", "export_run", "load_weights", "predict_files"]
