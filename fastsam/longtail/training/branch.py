"""Branches: a run that continues a kept checkpoint of another run under other settings."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from fastsam.longtail.checkpoint import Checkpoint
from fastsam.longtail.config import TrainConfig, applies, chosen_parts
from fastsam.longtail.data import LongTailData
from fastsam.longtail.errors import CheckpointError, UsageError
from fastsam.longtail.losses.base import LOSSES
from fastsam.longtail.recipes import recipe
from fastsam.longtail.settings import settings_of
from fastsam.longtail.training.run_folder import RunFolder

NAMES = ("data", "method", "optimizer")
_FIXED_PARTS = ("data", "model", "head")
_COUNTERS = ("attempted_steps", "steps_taken")
_KEPT_STATE = ("momentum_buffer",)
"""State that an optimizer of another name takes over: that of the SGD below all of them."""


@dataclass(frozen=True)
class Branch:
    """A checkpoint of another run that a run continues.

    Attributes:
        name: name of the other run's folder.
        checkpoint: its state after the last epoch that both runs share.
        folder: the other run's folder; None where it is not known.
    """

    name: str
    checkpoint: Checkpoint
    folder: str | Path | None = None

    @classmethod
    def load(cls, run: str | Path, epoch: int) -> Branch:
        """Read the checkpoint that a run kept of an epoch.

        Args:
            run: folder of the run.
            epoch: last epoch that both runs share.

        Raises:
            CheckpointError: it was not kept; the message says which were.
        """
        run = Path(run)
        if not run.is_dir():
            what = "is a file" if run.is_file() else "does not exist"
            raise CheckpointError(
                f"{run} {what}; name the folder of a run, and the epoch with --at"
            )
        folder = RunFolder(run)
        kept = {}
        for path in folder.checkpoints():
            stem = path.stem.removeprefix("epoch-")
            kept[int(stem) if stem.isdecimal() else Checkpoint.load(path).epoch] = path
        if epoch not in kept:
            have = ", ".join(map(str, sorted(kept))) or "none"
            raise CheckpointError(
                f"{run} kept no checkpoint of epoch {epoch}; kept: {have}. Train with --keep {epoch} to "
                "keep it"
            )
        return cls(run.resolve().name, Checkpoint.load(kept[epoch]), run.resolve())

    @property
    def origin(self) -> dict[str, Any]:
        """The options of ``fastsam train`` that begin this branch."""
        return {"from": str(self.folder) if self.folder else None, "at": self.checkpoint.epoch}

    @property
    def parent(self) -> dict[str, Any]:
        """The other run, for the record."""
        weights = hashlib.sha256()
        for name, value in sorted(self.checkpoint.model.items()):
            weights.update(name.encode() + value.contiguous().cpu().numpy().tobytes())
        return {
            "run": self.name,
            "epoch": self.checkpoint.epoch,
            "weights": weights.hexdigest(),
            "config": self.checkpoint.config.as_dict(),
        }

    def settings(self, **overrides: Any) -> tuple[TrainConfig, dict[str, str]]:
        """The settings of the branch, and where each comes from.

        They are those of the other run, as far as the chosen parts have them, then of the recipe.

        Args:
            **overrides: settings that replace them.

        Raises:
            UsageError: for a setting that does not exist.
        """
        parent = self.checkpoint.config
        names = {name: overrides.pop(name, getattr(parent, name)) for name in NAMES}
        inherited = {k: v for k, v in parent.flat().items() if k not in NAMES and v is not None}
        chosen = chosen_parts({**inherited, **overrides, **names})
        inherited = {k: v for k, v in inherited.items() if applies(k, chosen)}
        made = recipe(**names, **{**inherited, **overrides})
        sources = dict(made.sources)
        for name in inherited.keys() - overrides.keys():
            sources[name] = self.checkpoint.sources.get(name, f"run {self.name}")
        return made.config(), sources

    def check(self, config: TrainConfig, data: LongTailData, steps_per_epoch: int) -> None:
        """Refuse settings that a branch cannot change.

        Args:
            config: settings of the branch.
            data: its data set.
            steps_per_epoch: its batches of an epoch.

        Raises:
            UsageError: a setting of data, network, head or batches is another one.
            CheckpointError: the data are not those of the other run.
        """
        parent = self.checkpoint.config
        fixed = ["data", "model", "head", "batch_size", "augment"]
        for kind in _FIXED_PARTS:
            settings = settings_of(type(parent.parts[kind]))
            fixed += [item.name for item in settings if not item.metadata["place"]]
        for name in fixed:
            here, there = getattr(config, name), getattr(parent, name)
            if here != there:
                raise UsageError(
                    f"a branch cannot change {name}: it is {there} in {self.name}, {here} here; train from "
                    "the beginning instead"
                )
        extended = _extends(config) or _extends(parent)
        if extended and config.parts["loss"] != parent.parts["loss"]:
            raise UsageError(
                f"a branch cannot go from the loss {parent.parsed_method.loss} to "
                f"{config.parsed_method.loss}: their networks differ"
            )
        if config.epochs <= self.checkpoint.epoch:
            raise UsageError(
                f"the branch begins after epoch {self.checkpoint.epoch}, but has {config.epochs} epochs; "
                "begin earlier (--at), or train longer (--epochs)"
            )
        if config.select != "last" and self.checkpoint.best is None:
            raise UsageError(
                f"select {config.select} needs the best epoch so far, which {self.name} did not keep; "
                "train it with the same select"
            )
        self.checkpoint.check_data(data)
        if self.checkpoint.steps_per_epoch not in (None, steps_per_epoch):
            raise CheckpointError(
                f"{self.name} has {self.checkpoint.steps_per_epoch} steps in an epoch, here there are "
                f"{steps_per_epoch}; use as many processes as there"
            )

    def continue_optimizer(self, optimizer: Optimizer, *, same: bool, steps: int) -> None:
        """Give a new optimizer the state of the other run.

        Args:
            optimizer: newly built for the settings of the branch, which stay.
            same: whether the other run has the same optimizer: all of its state is taken over. Else it
                is the momentum.
            steps: steps of the epochs that both share, where the other run did not count them.
        """
        # A copy: optimizers take over the tensors that they load, and another branch may follow.
        stored, own = copy.deepcopy(self.checkpoint.optimizer), optimizer.state_dict()
        state = {
            index: {name: value for name, value in entry.items() if same or name in _KEPT_STATE}
            for index, entry in stored["state"].items()
        }
        groups = [
            {**group, **_counters(kept, group, steps)}
            for group, kept in zip(own["param_groups"], stored["param_groups"], strict=True)
        ]
        optimizer.load_state_dict(
            {
                **own,
                **_counters(stored, own, steps),
                "state": {index: entry for index, entry in state.items() if entry},
                "param_groups": groups,
            }
        )


def _counters(stored: Mapping[str, Any], own: Mapping[str, Any], steps: int) -> dict[str, Any]:
    return {name: stored.get(name, steps) for name in _COUNTERS if name in own}


def _extends(config: TrainConfig) -> bool:
    """Whether the loss has a network of its own."""
    return LOSSES[config.parsed_method.loss].network is not None
