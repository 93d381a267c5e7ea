"""Temporary changes of model modes and arithmetic switches, restored even if runs overlap."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, _sdpa_kernel

_LOCK = threading.RLock()
_HELD: dict[Hashable, list[Callable[[], None]]] = {}
"""For each thing that runs have changed, the functions that restore it, one per active run."""

_REGISTRIES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
"""Attributes of a module that hold its tensors and submodules."""


@contextmanager
def _held(thing: Hashable, change: Callable[[], Callable[[], None]]) -> Iterator[None]:
    """Change global state for the duration of the context; the last of overlapping runs restores it.

    If every run restored the state that it found, a run that began inside another would restore the
    other's change. Therefore only the state before the first run is ever restored.

    Args:
        thing: key of the state.
        change: changes the state and returns a function that restores it.
    """
    with _LOCK:
        undo = change()
        _HELD.setdefault(thing, []).append(undo)
    try:
        yield
    finally:
        with _LOCK:
            users = _HELD[thing]
            first, _ = users[0], users.pop()
            if not users:
                del _HELD[thing]
                first()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Set every module to evaluation mode; restore mode, attributes, tensors and submodules on exit."""

    def remember(module: nn.Module) -> Callable[[], None]:
        attributes = dict(module.__dict__)
        # Restored in place: other code, such as an overlapping run, may hold these containers. Those of
        # TorchScript are of other types, and its modules register nothing in forward.
        found = [attributes.get(name) for name in _REGISTRIES]
        contents = [(held, held.copy()) for held in found if isinstance(held, (dict, set))]

        def restore() -> None:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for held, content in contents:
                held.clear()
                held.update(content)

        return restore

    with ExitStack() as stack:
        with _LOCK:
            for module in model.modules():
                stack.enter_context(_held(("mode", id(module)), partial(remember, module)))
            model.eval()
        yield


@contextmanager
def eager() -> Iterator[None]:
    """Run compiled modules and functions eagerly, because compiled code cannot be differentiated twice.

    The switch is that of the process: compiled code in other threads runs eagerly, too.
    """

    def change() -> Callable[[], None]:
        stance = torch.compiler.set_stance("force_eager")
        return lambda: stance.__exit__(None, None, None)

    # Whoever compiled something has imported the compiler, which takes seconds.
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with _held("compiler", change):
        yield


@contextmanager
def exact_arithmetic(*, repeatable: bool = False) -> Iterator[None]:
    """Use IEEE float32 products (no TF32, no bfloat16), no autocast, and differentiable attention.

    With ``repeatable``, cuDNN uses only deterministic kernels. It never chooses kernels by
    benchmarks.

    Scaled-dot-product attention runs on its math backend, the only one that can be differentiated
    twice; its memory is quadratic in the sequence length.
    """

    def change() -> Callable[[], None]:
        before = _switches()
        cudnn = torch.backends.cudnn
        deterministic = cudnn.deterministic or repeatable
        _set_switches(["ieee"] * len(before[0]), False, (False, deterministic), [SDPBackend.MATH])
        return lambda: _set_switches(*before)

    with ExitStack() as stack:
        stack.enter_context(_held("arithmetic", change))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _precisions() -> list[Any]:
    backends: Any = torch.backends  # Any, because torch's types lack some of its attributes
    return [
        backends.cuda.matmul,
        backends.cudnn.conv,
        backends.cudnn.rnn,
        backends.mkldnn.matmul,
        backends.mkldnn.conv,
        backends.mkldnn.rnn,
    ]


def _switches() -> tuple[list[str], bool, tuple[bool, bool], list[SDPBackend]]:
    cudnn = torch.backends.cudnn
    return (
        [switch.fp32_precision for switch in _precisions()],
        torch.backends.mha.get_fastpath_enabled(),
        (cudnn.benchmark, cudnn.deterministic),
        _cur_sdpa_kernel_backends(),
    )


def _set_switches(
    precisions: list[str],
    fast_attention: bool,
    kernels: tuple[bool, bool],
    attention: list[SDPBackend],
) -> None:
    for switch, precision in zip(_precisions(), precisions, strict=True):
        switch.fp32_precision = precision
    torch.backends.mha.set_fastpath_enabled(fast_attention)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = kernels
    _sdpa_kernel(attention)


@contextmanager
def undisturbed(model: nn.Module, *, repeatable: bool = False) -> Iterator[None]:
    """Combine the contexts :func:`evaluation_mode`, :func:`eager` and :func:`exact_arithmetic`."""
    with evaluation_mode(model), eager(), exact_arithmetic(repeatable=repeatable):
        yield
