"""Contexts that intercept torch's functions or operations, with one method to override."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

Arguments = tuple[Any, ...]
Keywords = dict[str, Any]


class _Mode(ABC):
    @abstractmethod
    def call(self, function: Callable[..., Any], arguments: Arguments, keywords: Keywords) -> Any:
        """Return the result of ``function(*arguments, **keywords)`` or of a replacement."""

    def _handle(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.call(function, args, kwargs or {})


class FunctionMode(_Mode, TorchFunctionMode):
    """A context in which ``call`` intercepts every function of torch's Python interface."""

    __torch_function__ = _Mode._handle


class DispatchMode(_Mode, TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which ``call`` intercepts every operation, below autograd."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    __torch_dispatch__ = _Mode._handle
