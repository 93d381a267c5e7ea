"""Training on long-tailed classes: data, models, losses, recipes and the trainer."""

from fastsam.longtail.checkpoint import Checkpoint
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.recipes import recipe
from fastsam.longtail.results import Result
from fastsam.longtail.training import Trainer

__all__ = ["Checkpoint", "Result", "TrainConfig", "Trainer", "recipe"]
