"""Optional packages, and errors with the command that installs a missing one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Literal

Extra = Literal[
    "plots",
    "longtail",
    "huggingface",
    "decode",
    "export",
    "tensorboard",
    "wandb",
    "mlflow",
    "optuna",
]

TIED_TO_TORCH = ("timm", "torchvision")
"""Packages in no extra: each release requires one torch release, so pip would replace the installed torch."""


def install_command(package: str, extra: Extra) -> str:
    """Return the command that installs an optional package.

    Args:
        package: name of the package on the index.
        extra: extra of fastsam that includes it; ignored for :data:`TIED_TO_TORCH`.

    Example:
        >>> from fastsam.extras import install_command
        >>> install_command("scipy", "longtail")
        'pip install ".[longtail]" in a checkout of fastsam'
    """
    if package in TIED_TO_TORCH:
        return matching_command(package, torch=metadata.version("torch"))
    return f'pip install ".[{extra}]" in a checkout of fastsam'


def matching_command(package: str, *, torch: str) -> str:
    """Return the command that installs a package tied to torch without replacing torch.

    pip chooses the release of the package that matches this torch. A local version such as ``cu126`` is
    the name of the index on pytorch.org from which torch was installed; a torch from PyPI has none.

    Args:
        package: one of :data:`TIED_TO_TORCH`.
        torch: version of the installed distribution ``torch``.

    Example:
        >>> from fastsam.extras import matching_command
        >>> matching_command("torchvision", torch="2.9.1+cu126")
        'pip install torchvision torch==2.9.1+cu126 --extra-index-url https://download.pytorch.org/whl/cu126'
    """
    command = f"pip install {package} torch=={torch}"
    public, _, build = torch.partition("+")
    if not re.fullmatch(r"(cpu|xpu|cu\d+|rocm[\d.]+)", build):
        return command
    channel = "nightly/" if ".dev" in public else ""
    return f"{command} --extra-index-url https://download.pytorch.org/whl/{channel}{build}"


@contextmanager
def requires_extra(extra: Extra, purpose: str) -> Iterator[None]:
    """Import optional packages inside the context, with a helpful error if one is missing.

    Args:
        extra: extra of fastsam that installs them.
        purpose: the feature that needs them, for the message.

    Raises:
        ImportError: a package is not installed; the message has its name and the install command.

    Example:
        >>> with requires_extra("longtail", "this example"):
        ...     import no_such_package
        Traceback (most recent call last):
            ...
        ImportError: this example needs no_such_package: pip install ".[longtail]" in a checkout of fastsam
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or str(error)).partition(".")[0]
        raise ImportError(
            f"{purpose} needs {package}: {install_command(package, extra)}", name=error.name
        ) from error
