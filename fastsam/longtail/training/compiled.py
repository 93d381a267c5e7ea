"""Compilation of a network's passes with ``torch.compile``, and the time that it takes."""

from __future__ import annotations

import inspect
import os
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsam.longtail.errors import UsageError
from fastsam.longtail.models.classifier import Classifier, Outputs

_LIMITS = {"recompile_limit": 64, "isolate_recompiles": True}
"""Each shape of a batch is a variant, and so are passes without running statistics. torch's default is 8
variants for all runs of a process together, and older versions of torch know no other."""


def check_compiler(device: torch.device) -> None:
    """Raise :class:`UsageError` if ``torch.compile`` would find no C++ compiler for a CPU."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if device.type == "cpu" and sys.platform != "win32" and shutil.which(compiler) is None:
        raise UsageError(
            f"compile requires a C++ compiler on a CPU, but {compiler} was not found; install it, set the "
            "environment variable CXX, or omit --compile"
        )


def compiled_outputs(network: Classifier) -> Callable[[Tensor], Outputs]:
    """Return a compiled form of :meth:`Classifier.outputs` that shares the weights of ``network``.

    It compiles the method and not the module, so the state dict keeps its names. The first pass of each kind
    compiles a variant: for each shape of a batch, and with and without an update of the running statistics of
    batch normalization. Later passes reuse the variants.
    """
    known = inspect.signature(torch.compile).parameters
    limits: dict[str, Any] = {name: value for name, value in _LIMITS.items() if name in known}
    compiled: Callable[[Tensor], Outputs] = torch.compile(network.outputs, dynamic=False, **limits)
    return compiled


class CompileClock:
    """Adds up the time for which this process compiles.

    The forward pass is compiled in its first call, the backward pass in its own first call.

    Attributes:
        seconds: seconds spent compiling inside the context so far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = 0.0

    def __enter__(self) -> CompileClock:
        handler = _callbacks()
        handler.register_start_callback(self._begin)
        handler.register_end_callback(self._end)
        return self

    def __exit__(self, *_: object) -> None:
        handler = _callbacks()
        handler.remove_start_callback(self._begin)
        handler.remove_end_callback(self._end)

    def _begin(self, _: object) -> None:
        self._began = time.perf_counter()

    def _end(self, _: object) -> None:
        self.seconds += time.perf_counter() - self._began


def _callbacks() -> Any:
    from torch._dynamo.callback import callback_handler  # importing the compiler takes seconds

    return callback_handler
