"""Weights of a run as named tensors, and the network that is rebuilt from them."""

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
"""Names of the scale and the offset in the logits ``scale * head(features) + offset``."""


class LoadedWeights(NamedTuple):
    """A network loaded from ``model.safetensors``.

    Attributes:
        network: the network in evaluation mode, on the CPU. It maps normalized images ``[B, channels, H, W]``
            to logits ``[B, C]``; their softmax gives class probabilities.
        class_names: one name per class.
        preprocessing: how an image file becomes the network's input; None if that is unknown.
    """

    network: Classifier
    class_names: tuple[str, ...]
    preprocessing: Preprocessing | None


def named_weights(run: TrainedRun) -> dict[str, Tensor]:
    """Return the tensors from which the network of a run can be rebuilt.

    They have the names of the trained network, ``features.*`` and ``head.*``. Logits are the head's output
    times :data:`SCALE` (float64) plus :data:`OFFSET` (``[C]``); their softmax gives class probabilities.

    Raises:
        LongTailError: if the run's head is not the trained type of head with a scale and an offset.
    """
    head, scales, offsets = _unwrapped(run)
    state = {
        name: value
        for name, value in run.network.state_dict().items()
        if not name.startswith("head.")
    }
    state |= {f"head.{name}": value for name, value in head.state_dict().items()}
    scale, offset = 1.0, torch.zeros(len(run.class_names))
    if scales:  # the usual case of a single scale and offset is bit-exact
        scale, offset = scales[-1], offsets[-1].cpu()
    for factor, shift in zip(scales[-2::-1], offsets[-2::-1], strict=True):
        scale, offset = factor * scale, factor * offset + shift.cpu()
    state |= {SCALE: torch.tensor(scale, dtype=torch.float64), OFFSET: offset}
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}


def _unwrapped(run: TrainedRun) -> tuple[nn.Module, list[float], list[Tensor]]:
    """Return the innermost head, and the scales and offsets around it, outermost first."""
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
            f"safetensors requires the trained head, a {type(trained).__name__}, but the calibration of "
            f"{run.path} replaces it by a {type(head).__name__}; use --format torch or onnx, or pass "
            "--uncalibrated"
        )
    return head, scales, offsets


def load_weights(path: str | Path, *, module: nn.Module | None = None) -> LoadedWeights:
    """Load the network from a file written by ``fastsam export --format safetensors``.

    Args:
        path: path of ``model.safetensors``.
        module: your module, if it was passed to the trainer (network ``own:NAME``). It is copied.

    Raises:
        CheckpointError: if the file is missing, damaged or not written by fastsam, or its network does not
            exist in this version.
        ImportError: if safetensors is not installed.
    """
    with requires_extra("export", "model.safetensors"):
        from safetensors import safe_open

    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist; write it with `fastsam export --format safetensors`"
        )
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # the library's own error is an Exception
        raise CheckpointError(
            f"cannot read {path} as safetensors: {error}; export the run again"
        ) from error
    if "config" not in header or SCALE not in state:
        raise CheckpointError(
            f"{path} was not written by `fastsam export --format safetensors`; pass a file that was"
        )
    try:
        names = tuple(json.loads(header["classes"]))
        stored = json.loads(header["preprocessing"])
        preprocessing = None if stored is None else Preprocessing.from_dict(stored)
        config = TrainConfig.from_dict(json.loads(header["config"]))
        size = json.loads(header.get("size", "null"))  # older exports have none
        network = build_network(
            config,
            len(names),
            int(header["channels"]),
            size=None if size is None else tuple(size),
            module=module,
        )
        scale, offset = state.pop(SCALE).item(), state.pop(OFFSET)
        network.load_state_dict(state)
    except (ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is not a valid export for this version of fastsam: {error}; export the run again"
        ) from error
    network.head = AffineHead(network.head, scale, offset)
    return LoadedWeights(network.eval(), names, preprocessing)
