"""The state of a run, which its checkpoints store."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from fastsam.distributed import World
from fastsam.longtail.checkpoint import Checkpoint
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.data import LongTailData
from fastsam.longtail.models import Classifier
from fastsam.longtail.origin import Origin
from fastsam.longtail.results import Epoch, Result
from fastsam.longtail.runtime import environment
from fastsam.longtail.sharding import load_weights
from fastsam.longtail.training.average import JudgedWeights
from fastsam.longtail.training.branch import Branch
from fastsam.longtail.training.curvature import TrackedCurvature
from fastsam.longtail.training.evaluation import Judge
from fastsam.longtail.training.loss_scale import LossScale, continue_scale


@dataclass(eq=False)
class RunState:
    """The state of a run between two steps.

    Attributes:
        config: settings of the run.
        data: data set of the run.
        model: the network that is trained.
        optimizer: its optimizer.
        judged: the weights to evaluate.
        curvature: measurements of the run.
        loss_scale: loss scale; None if the precision is not float16.
        world: the ranks of the run.
        steps_per_epoch: batches per epoch.
        contents: SHA-256 of images and labels of every split, and of the class names.
        sources: source of each setting, by name.
        keep: epochs whose checkpoint is kept.
        history: one record per completed epoch.
        parent: run and epoch from which this run branched off; None for other runs.
        start: record of the weights that the run started from; None for random initial weights.
        unfinished: state of the epoch in which the run was interrupted, until it is continued.
    """

    config: TrainConfig
    data: LongTailData
    model: Classifier
    optimizer: Optimizer
    judged: JudgedWeights
    curvature: TrackedCurvature
    loss_scale: LossScale | None
    world: World
    steps_per_epoch: int
    contents: dict[str, str]
    sources: dict[str, str]
    keep: tuple[int, ...] = ()
    history: list[Epoch] = field(default_factory=list)
    parent: dict[str, Any] | None = None
    start: dict[str, Any] | None = None
    unfinished: dict[str, Any] | None = None
    _unreadable: dict[str, int] = field(default_factory=dict)

    @property
    def unreadable(self) -> dict[str, int]:
        """Names of unreadable images that were skipped so far, with how often, on all ranks."""
        return self.data.unreadable(self._unreadable, self.world)

    @property
    def batches(self) -> int:
        """Number of batches of the run so far, over all epochs, before the next step."""
        begun = 0 if self.unfinished is None else int(self.unfinished["batches"])
        return len(self.history) * self.steps_per_epoch + begun

    def continue_from(self, checkpoint: Checkpoint) -> None:
        """Load a checkpoint of this run."""
        self.sources = self.sources or checkpoint.sources
        self.parent = checkpoint.parent
        self.unfinished = checkpoint.unfinished
        checkpoint.load_optimizer(self.optimizer)
        self._continue_training(checkpoint)
        self.curvature.load_state_dict(checkpoint.curvature)

    def begin_at(self, branch: Branch) -> None:
        """Start from the checkpoint of another run.

        Raises:
            UsageError: if a setting of data, network, head or batches differs from that run.
            CheckpointError: if the data differ.
        """
        branch.check(self.config, self.data, self.steps_per_epoch)
        branch.check_network(self.model)
        start = branch.checkpoint
        self.parent = branch.parent
        steps = start.epoch * self.steps_per_epoch
        branch.continue_optimizer(self.optimizer, self.config, steps=steps)
        self._continue_training(start)

    def _continue_training(self, start: Checkpoint) -> None:
        load_weights(self.model, start.model)
        self.start = start.start
        self.history = list(start.history)
        self.judged.continue_from(start)
        continue_scale(self.loss_scale, start)
        self._unreadable = start.unreadable

    def checkpoint(self, unfinished: dict[str, Any] | None = None) -> Checkpoint:
        """Return a checkpoint with the tensors of the run itself. All ranks must call this together.

        Args:
            unfinished: state of the epoch; None after a whole epoch.
        """
        data = self.data
        return Checkpoint(
            config=self.config,
            epoch=len(self.history),
            channels=data.test.channels,
            num_classes=data.num_classes,
            size=data.test.frame.size,
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            history=list(self.history),
            best=self.judged.best,
            unreadable=self.unreadable,
            sources=self.sources,
            subset_hash=data.subset_hash,
            contents=self.contents,
            steps_per_epoch=self.steps_per_epoch,
            parent=self.parent,
            start=self.start,
            class_names=list(data.class_names),
            counts=data.counts.tolist(),
            groups=data.group_lists(),
            average=self.judged.average,
            preprocessing=data.test.preprocessing,
            curvature=self.curvature.state_dict(),
            loss_scale=None if self.loss_scale is None else self.loss_scale.state_dict(),
            world_size=self.world.world_size,
            keep=self.keep,
            unfinished=unfinished,
        )

    def result(self, judge: Judge, device: torch.device) -> Result:
        """Evaluate the run and return its result. This loads the weights to evaluate."""
        data = self.data
        return Result(
            config=self.config.as_dict(),
            sources=self.sources,
            counts=data.counts.tolist(),
            class_names=list(data.class_names),
            groups=data.group_lists(),
            subset_hash=data.subset_hash,
            contents=self.contents,
            steps_per_epoch=self.steps_per_epoch,
            parent=self.parent,
            start=self.start,
            rule=self.judged.choose(self.history, self.parent),  # loads the weights
            test=judge.metrics(data.test),
            validation=None if data.validation is None else judge.metrics(data.validation),
            history=self.history,
            seconds=sum(record.seconds for record in self.history),
            unreadable=self.unreadable,
            environment={**environment(device), "processes": self.world.world_size},
            origin=Origin.here(),
            curvature=self.curvature.points,
        )
