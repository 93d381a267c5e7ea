"""The setting ``pretrained``, and input filters for other numbers of channels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from fastsam.longtail.errors import UsageError
from fastsam.longtail.settings import Settings, setting

DEFAULT = "default"


@dataclass(frozen=True, kw_only=True)
class PretrainedSettings(Settings):
    """Setting of networks for which their library has pretrained weights."""

    pretrained: str | None = setting(
        "pretrained weights to start from: default, a name of weights of the network's library (such as "
        "IMAGENET1K_V2 or augreg_in21k), or a file. The library downloads named weights",
        optional=True,
        default_text="random initial weights",
    )


def adapted_filters(weight: Tensor, channels: int) -> Tensor:
    """Adapt the filters of a first convolution to another number of input channels.

    Every new channel gets the sum of the filters of the given channels, divided by the number of new
    channels. A gray image thus gives the response of an RGB image with three equal channels.

    Args:
        weight: ``[O, C, kH, kW]``.
        channels: number of channels.

    Example:
        >>> import torch
        >>> adapted_filters(torch.ones(8, 3, 7, 7), 1)[0, 0, 0, 0]
        tensor(3.)
    """
    summed = weight.sum(dim=1, keepdim=True) / channels
    return summed.expand(-1, channels, *weight.shape[2:]).contiguous()


@contextmanager
def downloading(what: str) -> Iterator[None]:
    """Report a failed download inside the context as an error that names the remedy.

    Args:
        what: what is downloaded, for the message.

    Raises:
        UsageError: if it fails.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # the libraries raise errors of the network, the hub, or files
        reason = (str(error) or type(error).__name__).splitlines()[0][:160]
        raise UsageError(
            f"cannot get {what}: {reason}; check the connection, or download the file elsewhere and pass its "
            "path as pretrained"
        ) from error
