"""What is done with a run after its training."""

from fastsam.longtail.trained.calibrate import calibrate_run
from fastsam.longtail.trained.calibration import Calibration
from fastsam.longtail.trained.evaluation import Evaluation, evaluate_run
from fastsam.longtail.trained.run import TrainedRun

__all__ = ["Calibration", "Evaluation", "TrainedRun", "calibrate_run", "evaluate_run"]
