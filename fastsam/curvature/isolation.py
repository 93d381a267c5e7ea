"""Leave no trace: model modes, random state and arithmetic switches are restored."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the global generators of torch (all devices), NumPy and Python on exit."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if initialized else ()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode; restore each module's mode and attributes on exit."""
    before = [(module, dict(module.__dict__)) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, attributes in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)


@contextmanager
def exact_arithmetic(*, repeatable: bool = False) -> Iterator[None]:
    """IEEE float32 products (no TF32, no bfloat16), no autocast, differentiable attention.

    On a GPU ``repeatable`` keeps cuDNN to kernels that give the same bits every time; which kernel
    is never left to a race against the clock.

    Scaled-dot-product attention runs on its math backend, the only one that can be differentiated
    twice; its memory is quadratic in the sequence length.
    """
    backends: Any = torch.backends  # the type checker does not know all of its attributes
    switches = [
        backends.cuda.matmul,
        backends.cudnn.conv,
        backends.cudnn.rnn,
        backends.mkldnn.matmul,
        backends.mkldnn.conv,
        backends.mkldnn.rnn,
    ]
    before = [switch.fp32_precision for switch in switches]
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    cudnn = torch.backends.cudnn
    kernels = cudnn.benchmark, cudnn.deterministic
    try:
        cudnn.benchmark, cudnn.deterministic = False, cudnn.deterministic or repeatable
        for switch in switches:
            switch.fp32_precision = "ieee"
        torch.backends.mha.set_fastpath_enabled(False)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            for kind in ("cpu", "cuda"):
                stack.enter_context(torch.autocast(kind, enabled=False))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision
        cudnn.benchmark, cudnn.deterministic = kernels
        torch.backends.mha.set_fastpath_enabled(fast_attention)


@contextmanager
def thread_count(threads: int | None) -> Iterator[None]:
    """Use this many CPU threads inside; None leaves them alone."""
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def undisturbed(model: nn.Module, *, repeatable: bool = False) -> Iterator[None]:
    """All of the above together, for the time of one run."""
    with (
        preserved_random_state(),
        evaluation_mode(model),
        exact_arithmetic(repeatable=repeatable),
    ):
        yield
