"""Networks that are passed from Python, named ``own:NAME``."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fastsam.longtail.errors import UsageError

OWN = "own:"
"""Prefix of the names of networks that are passed from Python."""
_SIZES = tuple((side, side) for side in (224, 32, 64, 28, 8))
"""Image sizes to try if the size is unknown: many networks accept several, some only one."""


def is_given(name: str) -> bool:
    """Return whether ``name`` is the name of a network passed from Python, ``own:NAME``."""
    return name.startswith(OWN) and len(name) > len(OWN)


def copied(module: nn.Module, channels: int, size: tuple[int, int] | None = None) -> nn.Module:
    """Return a copy of a module as a feature extractor, with the attribute ``out_features``.

    Args:
        module: maps images ``[B, channels, H, W]`` to features ``[B, D]``. Without the attribute
            ``out_features`` it is called with images of zeros to find D.
        channels: channels of the images.
        size: height and width of the images. Lazy layers are initialized for it. None tries several sizes.

    Raises:
        UsageError: if it does not map images to vectors, or D depends on the size and ``size`` is None.
    """
    module = copy.deepcopy(module)
    if isinstance(getattr(module, "out_features", None), int):
        return module
    widths: set[int] = set()
    reason = ""
    for height, width in _SIZES if size is None else (size,):
        # Lazy layers must not be initialized for a size that is only tried.
        tried = copy.deepcopy(module) if size is None else module
        try:
            shape = _shape(tried, channels, height, width)
        except (RuntimeError, ValueError, AssertionError, AttributeError, TypeError) as error:
            reason = str(error).splitlines()[0][:120]
            continue
        if len(shape) == 2:
            widths.add(shape[1])
        else:
            reason = f"it returned shape {shape}"
    if len(widths) > 1:
        reason = f"D depends on the image size: it is one of {sorted(widths)}"
    if len(widths) != 1:
        raise UsageError(
            f"the module must map images [B, {channels}, H, W] to features [B, D], without a classification "
            f"layer, but: {reason}. Set its attribute out_features to D if it accepts one image size only"
        )
    (module.out_features,) = widths  # type: ignore[assignment]
    return module


def _shape(module: nn.Module, channels: int, height: int, width: int) -> tuple[int, ...]:
    """Return the shape of a module's outputs for two images of zeros."""
    weight = next(module.parameters(), torch.empty(()))
    was_training = module.training
    try:
        with torch.no_grad():
            images = torch.zeros(2, channels, height, width, device=weight.device)
            return tuple(module.eval()(images).shape)
    finally:
        module.train(was_training)


def unavailable(name: str) -> UsageError:
    """Return the error for a network that exists only in the program that trained it."""
    return UsageError(
        f"network {name} is a module that was passed from Python and cannot be built by a command. In "
        "Python, pass the module: Trainer(config, model=module), TrainedRun.load(RUN, module=module), or "
        "Checkpoint.load(RUN).build_model(module=module)"
    )
