"""Training of a run: loop, step, evaluation, resuming and run folder."""

from fastsam.longtail.training.branch import Branch
from fastsam.longtail.training.engine import Engine
from fastsam.longtail.training.run_folder import RunFolder, check_free
from fastsam.longtail.training.stage_record import StageRecord
from fastsam.longtail.training.stages import StageTrainer, fit_stages, stage_trainers
from fastsam.longtail.training.step import Step, Stepper
from fastsam.longtail.training.trainer import Trainer

__all__ = [
    "Branch",
    "Engine",
    "RunFolder",
    "StageRecord",
    "StageTrainer",
    "Step",
    "Stepper",
    "Trainer",
    "check_free",
    "fit_stages",
    "stage_trainers",
]
