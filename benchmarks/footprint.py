"""Kernel launches and memory of a step, measured by PyTorch's profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile

from fastsam.kernels import extension

if TYPE_CHECKING:
    from fastsam._native import Execution


def launches(step: Callable[[], object], device: torch.device) -> int:
    """Count the kernels that a step launches on CUDA, or the operators and native phases on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            step()
            torch.cuda.synchronize(device)
        # Annotations, for example of an optimizer's step, appear on the timeline of the device too.
        return sum(
            event.device_type.name == "CUDA" and not event.is_user_annotation
            for event in recorded.events()
        )
    with _native_launches() as phases, profile(activities=[ProfilerActivity.CPU]) as recorded:
        step()
    operators = [
        event
        for event in recorded.events()
        if event.name.startswith("aten::")
        and not (event.cpu_parent is not None and event.cpu_parent.name.startswith("aten::"))
    ]
    return len(operators) + len(phases)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Return the peak memory of tensors during ``run``, in bytes, above the memory allocated before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in recorded.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    taken = peak = 0
    for _, change in sorted(changes):
        taken += change
        peak = max(peak, taken)
    return peak


@contextmanager
def _native_launches() -> Iterator[list[None]]:
    """Record every native launch, by wrapping the function that each launch calls."""
    seen: list[None] = []
    execution = extension.execution

    def counting(device: torch.device) -> Execution:
        seen.append(None)
        return execution(device)

    extension.execution = counting
    try:
        yield seen
    finally:
        extension.execution = execution
