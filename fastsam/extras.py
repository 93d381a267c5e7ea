"""Optional packages: a missing one is reported together with the extra that installs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Extra = Literal["longtail", "export", "tensorboard", "wandb", "mlflow"]


@contextmanager
def requires_extra(extra: Extra, purpose: str) -> Iterator[None]:
    """Import optional packages inside the context.

    Args:
        extra: the extra of this package that installs them.
        purpose: what needs them, for the message.

    Raises:
        ImportError: a package is not installed; the message names it and the extra.

    Example:
        >>> with requires_extra("longtail", "this example"):
        ...     import no_such_package
        Traceback (most recent call last):
            ...
        ImportError: this example needs no_such_package: pip install "fastsam[longtail]"
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or str(error)).partition(".")[0]
        raise ImportError(
            f'{purpose} needs {package}: pip install "fastsam[{extra}]"', name=error.name
        ) from error
