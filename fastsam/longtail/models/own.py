"""Networks that are passed from Python, named ``own:NAME``."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fastsam.longtail.errors import UsageError

OWN = "own:"
"""Prefix of the names of networks that are passed from Python."""


def is_given(name: str) -> bool:
    """Return whether ``name`` is the name of a network passed from Python, ``own:NAME``."""
    return name.startswith(OWN) and len(name) > len(OWN)


def copied(module: nn.Module, channels: int) -> nn.Module:
    """Return a copy of a module as a feature extractor, with the attribute ``out_features``.

    Args:
        module: maps images ``[B, channels, H, W]`` to features ``[B, D]``. Without the attribute
            ``out_features`` it is called with images of zeros to find D.
        channels: channels of the images.

    Raises:
        UsageError: if it does not map images to vectors.
    """
    module = copy.deepcopy(module)
    if isinstance(getattr(module, "out_features", None), int):
        return module
    weight = next(module.parameters(), torch.empty(()))
    was_training, error = module.training, ""
    shape: tuple[int, ...] = ()
    for side in (224, 32, 64, 28, 8):  # many networks accept several sizes, some only one
        try:
            with torch.no_grad():
                images = torch.zeros(2, channels, side, side, device=weight.device)
                shape = tuple(module.eval()(images).shape)
            break
        except (RuntimeError, ValueError, AssertionError, AttributeError, TypeError) as reason:
            error = str(reason).splitlines()[0][:120]
    module.train(was_training)
    if len(shape) != 2:
        found = error or f"it returned shape {shape}"
        raise UsageError(
            f"the module must map images [B, {channels}, H, W] to features [B, D], without a classification "
            f"layer, but: {found}. Set its attribute out_features to D if it accepts one image size only"
        )
    module.out_features = shape[1]  # type: ignore[assignment]
    return module


def unavailable(name: str) -> UsageError:
    """Return the error for a network that exists only in the program that trained it."""
    return UsageError(
        f"network {name} is a module that was passed from Python and cannot be built by a command. In "
        "Python, pass the module: Trainer(config, model=module), TrainedRun.load(RUN, module=module), or "
        "Checkpoint.load(RUN).build_model(module=module)"
    )
