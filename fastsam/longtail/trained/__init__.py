"""What is done with a run after its training."""

from fastsam.longtail.trained.evaluation import Evaluation, evaluate_run
from fastsam.longtail.trained.run import TrainedRun

__all__ = ["Evaluation", "TrainedRun", "evaluate_run"]
