"""Branches: runs that start from a checkpoint of another run, with other settings."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fastsam.longtail.checkpoint import Checkpoint, weights_hash
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.data import LongTailData
from fastsam.longtail.errors import CheckpointError, UsageError
from fastsam.longtail.losses.base import LOSSES
from fastsam.longtail.optimizers.base import OPTIMIZERS, base_of
from fastsam.longtail.recipes import NAMES, inherited_recipe, inherited_settings
from fastsam.longtail.settings import settings_of
from fastsam.longtail.sharding import sharded_state
from fastsam.longtail.training.run_folder import RunFolder

_FIXED_PARTS = ("data", "augmentation", "model", "head")
_COUNTERS = ("attempted_steps", "steps_taken")


@dataclass(frozen=True)
class Branch:
    """The checkpoint of a parent run from which a branch starts.

    Attributes:
        name: name of the parent's folder.
        checkpoint: state of the parent after the last epoch that both runs share.
        folder: folder of the parent; None if unknown.
    """

    name: str
    checkpoint: Checkpoint
    folder: str | Path | None = None

    @classmethod
    def load(cls, run: str | Path, epoch: int) -> Branch:
        """Load the checkpoint that a run kept of an epoch.

        Args:
            run: folder of the parent run.
            epoch: last epoch that both runs share.

        Raises:
            CheckpointError: if there is no checkpoint of the epoch; the message lists the existing ones.
        """
        run = Path(run)
        if not run.is_dir():
            what = "is a file" if run.is_file() else "does not exist"
            raise CheckpointError(
                f"{run} {what}; pass the folder of a run, and the epoch with --at"
            )
        folder = RunFolder(run)
        kept = folder.kept_epochs()
        path = folder.kept(epoch) if epoch in kept else folder.checkpoint
        checkpoint = Checkpoint.load(path) if path.is_file() else None
        if checkpoint is None or checkpoint.epoch != epoch:
            have = {*kept} if checkpoint is None else {*kept, checkpoint.epoch}
            raise CheckpointError(
                f"{run} has no checkpoint of epoch {epoch}, only of: "
                f"{', '.join(map(str, sorted(have))) or 'none'}. Choose one of these, or train "
                f"the run with --keep {epoch}"
            )
        return cls(run.resolve().name, checkpoint, run.resolve())

    @property
    def origin(self) -> dict[str, Any]:
        """Options of ``fastsam train`` that start this branch, by name."""
        return {"from": str(self.folder) if self.folder else None, "at": self.checkpoint.epoch}

    @property
    def parent(self) -> dict[str, Any]:
        """Record of the parent run, as stored in results."""
        return {
            "run": self.name,
            "epoch": self.checkpoint.epoch,
            "weights": weights_hash(self.checkpoint.model),
            "config": self.checkpoint.config.as_dict(),
        }

    def settings(self, **overrides: Any) -> tuple[TrainConfig, dict[str, str]]:
        """Return the settings of the branch, and the source of each by name.

        Settings are inherited from the parent run. Settings that only parts of the branch have come from the
        recipe.

        Args:
            **overrides: settings that replace them.

        Raises:
            UsageError: if a setting does not exist.
        """
        parent = self.checkpoint.config
        names = {name: overrides.pop(name, getattr(parent, name)) for name in NAMES}
        inherited = inherited_settings(parent)
        made = inherited_recipe(names, inherited, overrides)
        sources = dict(made.sources)
        for name in (inherited.keys() & sources.keys()) - overrides.keys():
            sources[name] = self.checkpoint.sources.get(name, f"run {self.name}")
        return made.config(), sources

    def check(self, config: TrainConfig, data: LongTailData, steps_per_epoch: int) -> None:
        """Check that the branch changes only settings that may differ from the parent.

        Args:
            config: settings of the branch.
            data: data set of the branch.
            steps_per_epoch: batches per epoch of the branch.

        Raises:
            UsageError: if a setting of data, network, head or batches differs.
            CheckpointError: if the data differ, or the parent has an older version.
        """
        try:
            self.checkpoint.check_continues()
        except CheckpointError as error:
            raise CheckpointError(f"cannot branch from {self.name}: {error}") from None
        parent = self.checkpoint.config
        fixed = ["data", "model", "head", "init", "head_from", "batch_size", "augment"]
        for kind in _FIXED_PARTS:
            settings = settings_of(type(parent.parts[kind]))
            fixed += [item.name for item in settings if not item.metadata["place"]]
        for name in fixed:
            here, there = getattr(config, name), getattr(parent, name)
            if here != there:
                raise UsageError(
                    f"a branch cannot change {name}: it is {there} in {self.name}, but {here} in the branch; "
                    "train from scratch instead"
                )
        extended = _extends(config) or _extends(parent)
        if extended and config.parts["loss"] != parent.parts["loss"]:
            raise UsageError(
                f"a branch cannot change loss {parent.parsed_method.loss} to "
                f"{config.parsed_method.loss}, because their networks differ; train from scratch instead"
            )
        if config.epochs <= self.checkpoint.epoch:
            raise UsageError(
                f"epochs must be above {self.checkpoint.epoch}, the epoch at which the branch starts, got "
                f"{config.epochs}; branch off earlier (--at) or train longer (--epochs)"
            )
        if config.select != "last" and self.checkpoint.best is None:
            raise UsageError(
                f"select {config.select} requires the best weights so far, but {self.name} did not store "
                f"them; train it with select={config.select}"
            )
        self.checkpoint.check_data(data)
        if self.checkpoint.steps_per_epoch != steps_per_epoch:
            raise CheckpointError(
                f"{self.name} has {self.checkpoint.steps_per_epoch} steps per epoch, but this branch has "
                f"{steps_per_epoch}; use the same number of processes"
            )

    def check_network(self, network: nn.Module) -> None:
        """Check that the weights of the parent fit the network of the branch.

        Raises:
            UsageError: if one of them has other entries, or entries of other shapes.
        """
        own, there = network.state_dict(), self.checkpoint.model
        for name in sorted(own.keys() | there.keys()):
            if name not in there:
                what = f"only the branch has {name}"
            elif name not in own:
                what = f"only {self.name} has {name}"
            elif own[name].shape != there[name].shape:
                what = f"{name} has another shape"
            else:
                continue
            raise UsageError(
                f"a branch cannot change the network: {what}. Pass the same network and --tune "
                f"{self.checkpoint.config.tune} with its settings, or train from scratch instead"
            )

    def continue_optimizer(self, optimizer: Optimizer, config: TrainConfig, *, steps: int) -> None:
        """Load the state of the parent's optimizer into a new optimizer.

        If the parent has the same optimizer, all of its state is loaded; with another optimizer around the
        same base optimizer, the state of the base optimizer, such as the momentum; else none. Parameters that
        only one of the runs trains keep their fresh state.

        Args:
            optimizer: optimizer built from the settings of the branch. Its options are kept.
            config: settings of the branch.
            steps: number of steps in the shared epochs, used if the parent did not count them.
        """
        # Optimizers keep references to the tensors that they load, and this branch may be used again.
        stored, own = copy.deepcopy(self.checkpoint.optimizer), optimizer.state_dict()
        kept = _kept_state(stored["state"], config, self.checkpoint.config)
        both = (stored["param_groups"], own["param_groups"])
        names = all("param_names" in group for groups in both for group in groups)
        places, own_places = (_places(groups, by_name=names) for groups in both)
        found = {index: kept.get(places.get(name)) for name, index in own_places.items()}
        state = {index: entry for index, entry in found.items() if entry}
        first = stored["param_groups"][0]
        loaded = {
            **own,
            **_counters(stored, own, steps),
            "state": state,
            "param_groups": [
                {**group, **_counters(first, group, steps)} for group in own["param_groups"]
            ],
        }
        parameters = [value for group in optimizer.param_groups for value in group["params"]]
        optimizer.load_state_dict(sharded_state(loaded, parameters))


def _kept_state(
    stored: Mapping[Any, Mapping[str, Any]], config: TrainConfig, parent: TrainConfig
) -> dict[Any, dict[str, Any]]:
    """Return the part of the parent's optimizer state that a branch takes over, by parameter."""
    base, same = base_of(config), config.optimizer == parent.optimizer
    if base != base_of(parent) or (base is None and not same):
        return {}
    dropped = () if same else OPTIMIZERS[parent.optimizer].state
    return {
        index: {name: value for name, value in entry.items() if name not in dropped}
        for index, entry in stored.items()
    }


def _places(groups: Sequence[Mapping[str, Any]], *, by_name: bool) -> dict[Any, int]:
    """Return the index of each parameter in an optimizer's state dict, by its name or by the index itself."""
    key = "param_names" if by_name else "params"
    return {
        name: index
        for group in groups
        for name, index in zip(group[key], group["params"], strict=True)
    }


def _counters(stored: Mapping[str, Any], own: Mapping[str, Any], steps: int) -> dict[str, Any]:
    return {name: stored.get(name, steps) for name in _COUNTERS if name in own}


def _extends(config: TrainConfig) -> bool:
    """Return whether the loss extends the network."""
    return LOSSES[config.parsed_method.loss].network is not None
