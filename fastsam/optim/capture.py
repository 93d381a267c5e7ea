"""Capture of a whole training step, of SAM or one of torch's optimizers, as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from fastsam.kernels.waits import waiting_is_an_error
from fastsam.optim._engine.untraced import untraced
from fastsam.optim.batch_norm import frozen_batch_norm_statistics
from fastsam.optim.obstacles import obstacle
from fastsam.optim.rehearsal import rehearsal
from fastsam.optim.sam import SAM
from fastsam.optim.skipped import kept_if_skipped

TensorBatch = tuple[Tensor, ...] | list[Tensor]
"""Inputs of the model, and the targets last."""

StepFunction = Callable[[TensorBatch], Tensor]


def capture_step(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    optimizer: Optimizer,
    example_batch: TensorBatch,
    *,
    autocast: torch.dtype | None = None,
    scaler: GradScaler | None = None,
    warmup: int = 3,
    freeze_batch_norm: bool = False,
) -> StepFunction:
    """Capture a training step and return a function ``step(batch) -> loss`` that replays its CUDA graph.

    For SAM there are two graphs that share memory. One has both forward and backward passes, the norm, the
    perturbation, the restore and the update; the other has the single pass and update of a step without an
    ascent. The host chooses by ``ascent_due``. For torch's SGD, Adam and AdamW one graph has their pass and
    their update. A step costs one launch, whatever the number of layers. On the CPU the returned function
    makes the same step without a graph.

    Changes made by schedules take effect in the next replay: with SAM those of every setting of the parameter
    groups, including the learning rate, rho and the ascent policy; with torch's optimizers those of settings
    that are tensors on the device.

    The warm-up restores weights, buffers, optimizer state, loss scale and random state.

    Args:
        model: the model, in the mode (training or evaluation) to capture.
        loss_fn: called as ``loss_fn(outputs, targets)``; returns a scalar.
        optimizer: optimizer over the parameters of ``model``. Either a :class:`SAM` on SGD, Adam or AdamW, or
            ``SGD(fused=True)``, ``Adam(capturable=True)`` or ``AdamW(capturable=True)`` with a tensor on the
            device as ``lr``. With an enabled scaler, Adam and AdamW need ``fused=True``, too.
        example_batch: ``(*inputs, targets)``, tensors with the shapes, dtypes and device of every later
            batch.
        autocast: dtype of ``torch.autocast``, entered separately for each pass. Default None: no autocast.
        scaler: a ``GradScaler``; the step includes its ``update()``.
        warmup: number of steps before the capture, at least 1. Default 3.
        freeze_batch_norm: keep the second pass of SAM out of the running statistics of BatchNorm, as
            :func:`frozen_batch_norm_statistics` does.

    Returns:
        ``step(batch)``, which copies the batch into the graph's inputs and returns the loss of the first
        pass, detached.

    Raises:
        ValueError: ``warmup`` is less than 1, the batch is not a sequence of tensors, or
            ``freeze_batch_norm`` is True without SAM. ``step`` raises it, with and without a graph, if a
            batch does not match the example.
        RuntimeError: the step cannot be captured; the message names the reason. The model and the optimizer
            are as before. ``step``
            raises it if the optimizer's parameters, groups or state were replaced since the capture, or if a
            number that the graph has frozen was changed; capture again.

    Example:
        >>> import torch
        >>> from fastsam import SAM
        >>> from fastsam.optim import capture_step
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
        >>> batch = torch.randn(8, 4), torch.randint(2, (8,))
        >>> step = capture_step(model, torch.nn.CrossEntropyLoss(), optimizer, batch)
        >>> step(batch) > step(batch)
        tensor(True)
    """
    if warmup < 1:
        raise ValueError(f"warmup must be at least 1, got {warmup}")
    if freeze_batch_norm and not isinstance(optimizer, SAM):
        raise ValueError(
            "freeze_batch_norm=True applies to the second pass of SAM; the running statistics need the only "
            f"pass of {type(optimizer).__name__}. Leave it False"
        )
    expected = _layout_of(example_batch)
    device = next(model.parameters()).device

    def step(batch: TensorBatch) -> Tensor:
        return _eager_step(
            model, loss_fn, optimizer, batch, device, autocast, scaler, freeze_batch_norm
        )

    made: StepFunction = step
    if device.type == "cuda":
        reason = obstacle(model, optimizer, scaler)
        if reason is not None:
            raise RuntimeError(f"this step cannot be captured as a CUDA graph: {reason}")
        # A graph is captured on the current device, which need not be the model's.
        with torch.cuda.device(device):
            made = _captured(step, model, optimizer, example_batch, scaler, warmup)

    @untraced
    def checked(batch: TensorBatch) -> Tensor:
        given = _layout_of(batch)
        if given != expected:
            raise ValueError(
                f"the step was captured for (shape, dtype) {expected}, got {given}; train on a batch of "
                "another shape with the plain calls"
            )
        return made(batch)

    return checked


def _layout_of(batch: TensorBatch) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of every tensor of a batch."""
    if not isinstance(batch, (tuple, list)) or not (
        len(batch) >= 2 and all(isinstance(part, Tensor) for part in batch)
    ):
        parts = batch if isinstance(batch, (tuple, list)) else [batch]
        raise ValueError(
            "a batch must be a tuple or list of tensors, one or more inputs followed by the targets, got "
            f"{type(batch).__name__} of {[type(part).__name__ for part in parts]}"
        )
    return [(tuple(part.shape), part.dtype) for part in batch]


def _eager_step(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    optimizer: Optimizer,
    batch: TensorBatch,
    device: torch.device,
    autocast: torch.dtype | None,
    scaler: GradScaler | None,
    freeze_batch_norm: bool,
) -> Tensor:
    *inputs, targets = batch
    scaler = scaler or GradScaler(device.type, enabled=False)
    losses: list[Tensor] = []
    sam = optimizer if isinstance(optimizer, SAM) else None
    due = sam is not None and sam.ascent_due
    halves: tuple[Optimizer, ...] = (sam.ascent, sam) if sam is not None and due else (optimizer,)
    buffers: AbstractContextManager[object] = (
        kept_if_skipped(optimizer, model.buffers()) if isinstance(optimizer, SAM) else nullcontext()
    )
    optimizer.zero_grad()  # gradients that a failed step has left
    try:
        with buffers:
            for half in halves:
                cast: AbstractContextManager[object] = (
                    nullcontext() if autocast is None else torch.autocast(device.type, autocast)
                )
                # The backward pass is included, because checkpointed layers repeat their forward pass in it.
                statistics: AbstractContextManager[object] = (
                    frozen_batch_norm_statistics(model)
                    if freeze_batch_norm and losses
                    else nullcontext()
                )
                with statistics:
                    with cast:
                        loss = loss_fn(model(*inputs), targets)
                    scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
                if sam is not None and not due:
                    # step() alone may read the gradients on the host, to see whether it only creates state.
                    sam.first_step()
                scaler.step(half)
                optimizer.zero_grad()
                losses.append(loss.detach())
    except BaseException:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise  # launches and host reads would fail now and hide the error; _captured() cleans up
        if sam is not None:
            sam.restore()
        if losses and scaler.is_enabled():
            scaler.update(scaler.get_scale())  # forgets the half that was stepped, keeps the scale
        raise
    scaler.update()
    return losses[0]


def _captured(
    step: StepFunction,
    model: nn.Module,
    optimizer: Optimizer,
    example_batch: TensorBatch,
    scaler: GradScaler | None,
    warmup: int,
) -> StepFunction:
    static = [part.clone() for part in example_batch]
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    variants = (True, False) if isinstance(optimizer, SAM) else (True,)
    with rehearsal(model, optimizer, scaler):
        _frozen(optimizer)  # allocates SAM's native memory on the current stream
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for due in variants:
                decided = _with_ascent(step, optimizer, due)
                for _ in range(warmup):
                    decided(static)
                _refuse_waits(decided, static)
        torch.cuda.current_stream().wait_stream(side)
    frozen = _frozen(optimizer)
    graphs: dict[bool, _Graph] = {}
    attempted = optimizer.attempted_steps if isinstance(optimizer, SAM) else 0
    pool: Any = None
    for due in variants:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=side, pool=pool):
                loss = _with_ascent(step, optimizer, due)(static)
        except BaseException:
            optimizer.zero_grad()
            if isinstance(optimizer, SAM):
                optimizer.native_step.forget_ascent()
                optimizer.policy.abandon()
                optimizer.policy.attempted_steps = attempted
            raise
        pool = graph.pool()  # the graphs never replay at the same time, so they can share memory
        graphs[due] = _Graph(graph.replay, loss)
    if isinstance(optimizer, SAM):
        optimizer.policy.attempted_steps = attempted
    replay = replaying(optimizer, graphs, static, lambda: _frozen(optimizer) == frozen)

    def on_device(batch: TensorBatch) -> Tensor:
        with torch.cuda.device(static[0].device):
            return replay(batch)

    return on_device


def _refuse_waits(step: StepFunction, batch: TensorBatch) -> None:
    """Make a step, and raise RuntimeError if it waits for the GPU."""
    try:
        with waiting_is_an_error():
            step(batch)
    except RuntimeError as error:
        raise RuntimeError(
            "this step cannot be captured as a CUDA graph: the model or the loss waits for the GPU, for "
            f"example in .item(), float(tensor) or a boolean mask ({str(error).splitlines()[0]}); remove it, "
            "or take the step without capture_step"
        ) from error


@dataclass(frozen=True)
class _Graph:
    """A captured step and the tensor that each replay writes its loss to."""

    replay: Callable[[], None]
    loss: Tensor


def _with_ascent(step: StepFunction, optimizer: Optimizer, due: bool) -> StepFunction:
    """Return ``step`` with an ascent where ``due`` is True, whatever the policy decides."""

    def decided(batch: TensorBatch) -> Tensor:
        if isinstance(optimizer, SAM):
            optimizer.policy.decide(due)
        return step(batch)

    return decided


def replaying(
    optimizer: Optimizer,
    graphs: Mapping[bool, _Graph],
    static: TensorBatch,
    is_fresh: Callable[[], bool],
) -> StepFunction:
    """Return the step that replays one of ``graphs`` and does the host's part of an eager step.

    Args:
        optimizer: its policy chooses the graph and counts the step.
        graphs: the captured steps by ``ascent_due``; only True for an optimizer without a policy.
        static: the inputs of the graphs.
        is_fresh: writes changed settings to the device and returns whether the memory and the numbers that
            the graphs have frozen are unchanged.
    """

    def replay(batch: TensorBatch) -> Tensor:
        if not is_fresh():
            raise RuntimeError(
                "the optimizer's parameters, groups, state or a frozen setting changed after the step was "
                "captured; call capture_step again"
            )
        graph = graphs[optimizer.ascent_due if isinstance(optimizer, SAM) else True]
        for given, expected in zip(batch, static, strict=True):
            expected.copy_(given, non_blocking=True)
        graph.replay()
        if isinstance(optimizer, SAM):
            optimizer.policy.end()
        return graph.loss.clone()

    return replay


@dataclass(frozen=True)
class _Memory:
    """The address of a tensor, with its storage kept alive so that the address cannot be reused."""

    address: int
    storage: torch.UntypedStorage = field(compare=False, repr=False)

    @classmethod
    def of(cls, tensor: Tensor) -> _Memory:
        return cls(tensor.data_ptr(), tensor.untyped_storage())


def _frozen(optimizer: Optimizer) -> tuple[Any, ...]:
    """Return everything that a graph of this optimizer's step freezes: memory, and settings that are numbers.

    SAM's kernels read numbers from a block on the device, which this call refreshes, so they are not frozen.
    The graph itself copies settings that are device tensors into the block, so their addresses are.
    """
    settings = [
        value
        for group in optimizer.param_groups
        for name, value in group.items()
        if name != "params"
    ]
    if isinstance(optimizer, SAM):
        optimizer.prepare()
        on_device = [v for v in settings if isinstance(v, Tensor) and v.device.type != "cpu"]
        return (optimizer.native_step.memory(), *map(_Memory.of, on_device))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = [value for p in parameters for value in optimizer.state.get(p, {}).values()]
    return tuple(
        _Memory.of(value) if isinstance(value, Tensor) else value
        for value in (*settings, *parameters, *state)
    )
