"""Epochs as they finish, sent to TensorBoard or Weights & Biases."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from fastsam.extras import Extra, install_command
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.errors import UsageError, unknown
from fastsam.longtail.results import Epoch

_EXTRAS: dict[str, Extra] = {"tensorboard": "tensorboard", "wandb": "wandb"}
"""The extra that installs each tracker."""

TRACKERS = ("none", *_EXTRAS)


def check_tracker(name: str, *, out: Path | None) -> None:
    """Refuses a tracker that could not be used, before anything is written.

    Args:
        name: one of :data:`TRACKERS`.
        out: folder of the run, which TensorBoard's events need.

    Raises:
        UsageError: for an unknown name, or TensorBoard without a folder.
        ImportError: if the package is not installed; the message names the command that installs it.
    """
    if name not in TRACKERS:
        raise unknown("tracker", name, TRACKERS)
    if name == "tensorboard" and out is None:
        raise UsageError("--track tensorboard writes into the run's folder: give --out DIR")
    if name != "none":
        _package(name)


@contextlib.contextmanager
def tracker(
    name: str, *, config: TrainConfig, out: Path | None
) -> Iterator[Callable[[Epoch], None] | None]:
    """What to call with every finished epoch; closed when the context ends.

    Args:
        name: one of :data:`TRACKERS`, checked by :func:`check_tracker`.
        config: the run's settings, recorded once.
        out: folder of the run; TensorBoard's events go to ``out/tensorboard``.
    """
    if name == "none":
        yield None
    elif name == "tensorboard" and out is not None:
        with _package(name).SummaryWriter(str(out / "tensorboard")) as writer:
            writer.add_text("config", repr(config))

            def write(epoch: Epoch) -> None:
                for key, value in _numbers(epoch).items():
                    writer.add_scalar(key, value, epoch.epoch)

            yield write
    else:
        run = _package(name).init(project="fastsam", config=config.as_dict())
        try:
            yield lambda epoch: run.log(_numbers(epoch), step=epoch.epoch)
        finally:
            run.finish()


def _numbers(epoch: Epoch) -> dict[str, float]:
    """The measurements of an epoch that exist."""
    return {
        key: value for key, value in asdict(epoch).items() if key != "epoch" and value is not None
    }


def _package(name: str) -> Any:
    try:
        return import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError as error:
        raise ImportError(
            f"{name} is not installed: {install_command(name, _EXTRAS[name])}, or use --track none"
        ) from error
