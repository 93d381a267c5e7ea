"""The state of a training run on disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastsam.longtail.atomic import write_atomically
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.data import LongTailData
from fastsam.longtail.errors import CheckpointError, UsageError
from fastsam.longtail.models import Classifier
from fastsam.longtail.network import build_network

FORMAT = "fastsam-longtail"
VERSION = 1


@dataclass(eq=False)
class Checkpoint:
    """Everything needed to go on training, or to look at what was learnt.

    Attributes:
        config: settings of the run.
        epoch: epochs completed.
        channels: channels of the input images.
        num_classes: number of classes.
        model: state of the network.
        optimizer: state of the optimizer.
        history: one record per completed epoch.
        best: state of the network after the best epoch on validation, where that was asked for.
        unreadable: images that could not be read and were skipped so far, with how often.
        sources: where each setting comes from.
        subset_hash: SHA-256 of the training set, which says what the classes' numbers mean.
        contents: SHA-256 of contents and classes of every split; empty in runs of older versions.
        steps_per_epoch: batches of an epoch; None in runs of older versions.
    """

    config: TrainConfig
    epoch: int
    channels: int
    num_classes: int
    model: dict[str, Any]
    optimizer: dict[str, Any]
    history: list[dict[str, Any]]
    best: dict[str, Any] | None = None
    unreadable: dict[str, int] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    subset_hash: str | None = None
    contents: dict[str, str] = field(default_factory=dict)
    steps_per_epoch: int | None = None

    def save(self, path: Path) -> None:
        """Write the file atomically: a crash leaves the previous checkpoint whole."""
        content = {
            **vars(self),
            "config": self.config.as_dict(),
            "format": FORMAT,
            "version": VERSION,
        }
        write_atomically(path, lambda file: torch.save(content, file))

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read a checkpoint without running any code in it (``weights_only=True``).

        Tensors arrive on the CPU.

        Raises:
            CheckpointError: if the file is missing, damaged, not of this format, or of a version
                that this package does not read.
        """
        if path.is_dir():
            path = path / "checkpoint.pt"
        if not path.is_file():
            raise CheckpointError(
                f"no checkpoint at {path}; `fastsam train --out DIR` writes DIR/checkpoint.pt"
            )
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            # torch reports damage as any of half a dozen exception types.
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise CheckpointError(
                f"{path} cannot be read as a checkpoint: it is truncated, damaged or not written "
                f"by fastsam ({reason[:120]})"
            ) from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise CheckpointError(f"{path} is not a checkpoint of `fastsam train`")
        if content["version"] != VERSION:
            raise CheckpointError(
                f"{path} has checkpoint version {content['version']}, this package reads {VERSION}"
            )
        try:
            # What an older version did not write yet has its default.
            values = {name: content[name] for name in cls.__dataclass_fields__ if name in content}
            values["config"] = TrainConfig.from_dict(values["config"])
            return cls(**values)
        except (KeyError, TypeError, UsageError) as error:
            raise CheckpointError(
                f"{path} does not fit this version of fastsam: {error}"
            ) from error

    def check_data(self, data: LongTailData) -> None:
        """Raise :class:`CheckpointError` if the run had other data than ``data``.

        The contents of every split decide, wherever the files lie. Runs of older versions know only
        which images formed the training set. Classes of a set that has changed may be numbered in
        another way.
        """
        if self.contents:
            found = data.contents()
            changed = [
                part
                for part in {**self.contents, **found}
                if self.contents.get(part) != found.get(part)
            ]
            if changed:
                part = changed[0]
                what = "the class names" if part == "classes" else f"the {part} images"
                raise CheckpointError(
                    f"{what} of {data.name} are not those of this run: SHA-256 "
                    f"{self.contents.get(part)} there, {found.get(part)} here; restore them, or "
                    "train anew"
                )
        elif self.subset_hash not in (None, data.subset_hash):
            raise CheckpointError(
                f"the training set of {data.name} is not the one of this run: SHA-256 "
                f"{self.subset_hash} there, {data.subset_hash} here; restore its files or lists, "
                "or train anew"
            )

    def build_model(self) -> Classifier:
        """The network with the stored weights.

        Raises:
            CheckpointError: if the weights are not of the network that the settings name.
        """
        config = self.config
        model = build_network(config, self.num_classes, self.channels)
        try:
            model.load_state_dict(self.model)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise CheckpointError(
                f"the weights are not of a {config.model} with {self.num_classes} classes: {reason}"
            ) from error
        return model
