"""Contexts that see every call of torch's functions or operations, with one method to override."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

Arguments = tuple[Any, ...]
Keywords = dict[str, Any]


class FunctionMode(TorchFunctionMode, ABC):
    """A context in which :meth:`call` stands in for every function of torch's Python interface."""

    @abstractmethod
    def call(self, function: Callable[..., Any], arguments: Arguments, keywords: Keywords) -> Any:
        """Return the result of ``function(*arguments, **keywords)``, or of what replaces it."""

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        """Hand torch's call to :meth:`call`."""
        return self.call(function, arguments, keywords or {})


class DispatchMode(TorchDispatchMode, ABC):  # type: ignore[no-untyped-call]
    """A context in which :meth:`call` stands in for every operation, below autograd."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @abstractmethod
    def call(self, function: Callable[..., Any], arguments: Arguments, keywords: Keywords) -> Any:
        """Return the result of ``function(*arguments, **keywords)``, or of what replaces it."""

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        """Hand torch's call to :meth:`call`."""
        return self.call(function, arguments, keywords or {})
