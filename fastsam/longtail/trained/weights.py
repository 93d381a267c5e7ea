"""Weights of a run that leave their checkpoint, and the network that they come back to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastsam.extras import requires_extra
from fastsam.longtail.build import build_network
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.data import Preprocessing
from fastsam.longtail.errors import CheckpointError, LongTailError
from fastsam.longtail.models.classifier import Classifier
from fastsam.longtail.models.heads import AffineHead
from fastsam.longtail.trained.run import TrainedRun

SCALE, OFFSET = "logits.scale", "logits.offset"
"""Names of the tensors that turn the head's output z into logits, ``scale * z + offset``."""


class LoadedWeights(NamedTuple):
    """A network read from ``model.safetensors``.

    Attributes:
        network: maps normalized images ``[B, channels, H, W]`` to logits ``[B, C]`` whose softmax is the
            probability of each class; in evaluation mode, on the CPU.
        class_names: one per class.
        preprocessing: how an image file becomes the network's input; None where that is unknown.
    """

    network: Classifier
    class_names: tuple[str, ...]
    preprocessing: Preprocessing | None


def named_weights(run: TrainedRun) -> dict[str, Tensor]:
    """Return the tensors that rebuild the network of a run.

    They have the names of the trained network: ``features.*`` and ``head.*``. :data:`SCALE` (float64)
    and :data:`OFFSET` (``[C]``) turn the head's output into logits whose softmax is the probability.

    Raises:
        LongTailError: the run's head is not the trained kind of head with a scale and an offset.
    """
    head, scales, offsets = _unwrapped(run)
    state = {
        name: value
        for name, value in run.network.state_dict().items()
        if not name.startswith("head.")
    }
    state |= {f"head.{name}": value for name, value in head.state_dict().items()}
    scale, offset = 1.0, torch.zeros(len(run.class_names))
    if scales:  # the usual case, one of each, keeps its bits
        scale, offset = scales[-1], offsets[-1].cpu()
    for factor, shift in zip(scales[-2::-1], offsets[-2::-1], strict=True):
        scale, offset = factor * scale, factor * offset + shift.cpu()
    state |= {SCALE: torch.tensor(scale, dtype=torch.float64), OFFSET: offset}
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}


def _unwrapped(run: TrainedRun) -> tuple[nn.Module, list[float], list[Tensor]]:
    """The innermost head, and the scales and offsets around it from the outside in."""
    head: nn.Module = run.network.head
    scales: list[float] = []
    offsets: list[Tensor] = []
    while isinstance(head, AffineHead):
        scales.append(head.scale)
        offsets.append(head.get_buffer("offset"))
        head = head.head
    trained = run.trained_head
    if type(head) is not type(trained) or head.state_dict().keys() != trained.state_dict().keys():
        raise LongTailError(
            f"the head of {run.path} is a {type(head).__name__}, not the trained "
            f"{type(trained).__name__} with a scale and an offset, so it cannot be stored as weights "
            "of the network; use --format torch or onnx, or leave the calibration out (--uncalibrated)"
        )
    return head, scales, offsets


def load_weights(path: str | Path) -> LoadedWeights:
    """Rebuild the network of a file that ``fastsam export --format safetensors`` wrote.

    Args:
        path: ``model.safetensors``.

    Raises:
        CheckpointError: the file is missing, damaged, not written by fastsam, or names a network that
            this version does not have.
        ImportError: safetensors is not installed.
    """
    with requires_extra("export", "model.safetensors"):
        from safetensors import safe_open

    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"there is no {path}; `fastsam export --format safetensors` writes one"
        )
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # the library's own error is an Exception
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
    if "config" not in header or SCALE not in state:
        raise CheckpointError(f"{path} was not written by `fastsam export --format safetensors`")
    try:
        names = tuple(json.loads(header["classes"]))
        stored = json.loads(header["preprocessing"])
        preprocessing = None if stored is None else Preprocessing.from_dict(stored)
        config = TrainConfig.from_dict(json.loads(header["config"]))
        network = build_network(config, len(names), int(header["channels"]))
        scale, offset = state.pop(SCALE).item(), state.pop(OFFSET)
        network.load_state_dict(state)
    except (ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit this version of fastsam: {error}") from error
    network.head = AffineHead(network.head, scale, offset)
    return LoadedWeights(network.eval(), names, preprocessing)
