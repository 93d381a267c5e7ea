"""Weights of networks in files of torch and safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsam.extras import requires_extra
from fastsam.longtail.errors import CheckpointError, UsageError

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".safetensors", ".npy")
_NESTED = ("state_dict", "model", "model_state_dict", "state_dict_ema", "weights")
"""Keys under which training scripts store a state dict."""
_WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes of names that DataParallel and torch.compile add."""


def is_file(name: str) -> bool:
    """Return whether a setting names a file, which need not exist, and not something else.

    Example:
        >>> is_file("./weights"), is_file("resnet50.pth"), is_file("IMAGENET1K_V2")
        (True, True, False)
    """
    return name.endswith(SUFFIXES) or "/" in name or "\\" in name or Path(name).exists()


def read_file(path: str | Path) -> Any:
    """Read a file of torch or safetensors to the CPU, without executing code from it.

    Raises:
        UsageError: if there is no such file.
        CheckpointError: if it is damaged, or contains other objects than tensors and plain values.
        ImportError: if safetensors is required and not installed.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UsageError(
            f"the file of weights {path} {what}; pass the path of a file, or for init the folder of a run"
        )
    safe = path.suffix == ".safetensors"
    if safe:
        with requires_extra("export", path.name):
            from safetensors.torch import load_file
    try:
        return load_file(path) if safe else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # the libraries raise any of a dozen types
        reason = (str(error) or type(error).__name__).splitlines()[0][:160]
        raise CheckpointError(
            f"cannot read weights from {path}: {reason}; save network.state_dict() with torch.save or "
            "safetensors.torch.save_file"
        ) from error


def state_dict_in(content: Any, path: str | Path) -> dict[str, Tensor]:
    """Return the state dict in the content of a file, with weights of at least 32 bits.

    Args:
        content: a state dict, or a dict that contains one under a usual key.
        path: the file, for the message.

    Raises:
        CheckpointError: if there is none.
    """
    found = content
    for key in _NESTED:
        if not isinstance(found, Mapping) or any(isinstance(v, Tensor) for v in found.values()):
            break
        found = found.get(key, found)
    weights = {}
    if isinstance(found, Mapping):
        weights = {str(name): v for name, v in found.items() if isinstance(v, Tensor)}
    if not weights:
        raise CheckpointError(
            f"{path} contains no state dict; save network.state_dict() with torch.save"
        )
    for prefix in _WRAPPERS:
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return {name: _whole(value) for name, value in weights.items()}


def read_vectors(path: str | Path) -> Tensor:
    """Read a matrix from a file of NumPy, torch or safetensors as float32.

    Raises:
        UsageError: if there is no such file.
        CheckpointError: if it does not contain a single matrix of finite numbers.
    """
    path = Path(path)
    content: Any
    if path.suffix == ".npy" and path.is_file():
        try:
            content = torch.from_numpy(np.load(path, allow_pickle=False))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"cannot read {path} as an array: {error}") from error
    else:
        content = read_file(path)
    if isinstance(content, Mapping) and len(content) == 1:
        (content,) = content.values()
    if not isinstance(content, Tensor) or content.ndim != 2:
        raise CheckpointError(
            f"expected one matrix [classes, features] in {path}, got "
            f"{tuple(content.shape) if isinstance(content, Tensor) else type(content).__name__}"
        )
    if not content.isfinite().all():
        raise CheckpointError(f"{path} contains infinite or NaN values; compute the vectors again")
    return content.float()


def _whole(value: Tensor) -> Tensor:
    """Return the tensor with at least 32 bits per number."""
    small = value.is_floating_point() and value.element_size() < 4
    return value.float() if small else value
