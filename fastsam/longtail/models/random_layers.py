"""Whether a network samples random numbers while it trains."""

from __future__ import annotations

from torch import nn

_NAMES = ("Dropout", "DropPath", "DropBlock", "StochasticDepth")
_PROBABILITIES = ("p", "drop_prob")


def has_random_layers(network: nn.Module) -> bool:
    """Return whether a network has layers that drop features or blocks at random.

    Such layers sample from torch's global generator. They are known by the names of their classes in torch,
    torchvision and timm.

    Example:
        >>> has_random_layers(nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.1)))
        True
        >>> has_random_layers(nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.0)))
        False
    """
    return any(
        any(name in type(layer).__name__ for name in _NAMES)
        and any(getattr(layer, name, 0) for name in _PROBABILITIES)
        for layer in network.modules()
    )
