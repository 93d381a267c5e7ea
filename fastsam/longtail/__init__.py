"""Training on long-tailed classes: data, models, losses, recipes, the trainer, sweeps and tuning."""

from fastsam.longtail.checkpoint import Checkpoint
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.recipes import recipe
from fastsam.longtail.results import Result
from fastsam.longtail.start import Start
from fastsam.longtail.sweeps import Execution, sweep
from fastsam.longtail.training import Trainer, fit_stages
from fastsam.longtail.tuning import Interval, tune

__all__ = [
    "Checkpoint",
    "Execution",
    "Interval",
    "Result",
    "Start",
    "TrainConfig",
    "Trainer",
    "fit_stages",
    "recipe",
    "sweep",
    "tune",
]
