"""What is done with a run after its training."""

from fastsam.longtail.trained.run import TrainedRun

__all__ = ["TrainedRun"]
