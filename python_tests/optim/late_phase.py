"""Runs with late ascents, all ways to write their steps, and the reference run that they must equal."""

from __future__ import annotations

import copy
import io
import pickle
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from fastsam import SAM
from fastsam.optim import capture_step
from python_tests.optim.trajectories import TOLERANCE, assert_close, assert_torch_bits

STEPS = 12
BATCH = 12
RHO = 0.3
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, "nesterov": True}

POLICIES: dict[str, tuple[dict[str, int], Collection[int]]] = {
    "late": ({"start": 5}, range(5, STEPS)),
    "late, every second step": ({"start": 4, "interval": 2}, (4, 6, 8, 10)),
    "a window, every third step": ({"start": 3, "interval": 3, "stop": 10}, (3, 6, 9)),
    "early, then no more": ({"stop": 4}, range(4)),
    "after the run": ({"start": STEPS}, ()),
}
"""Options of a policy, and the steps in which an ascent is due."""


@dataclass
class Task:
    """A small network and random batches, with a count of the forward passes of every step.

    Attributes:
        passes: forward passes by step.
        broken: ``(step, pass)`` whose loss is NaN.
    """

    seed: int = 0
    dtype: torch.dtype = torch.float32
    broken: Collection[tuple[int, int]] = ()
    passes: Counter[int] = field(default_factory=Counter)

    def network(self) -> nn.Module:
        """Return a network with tensors longer and shorter than a vector register, none a multiple of it."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            layers = nn.Linear(6, 37), nn.Tanh(), nn.Linear(37, 5), nn.Tanh(), nn.Linear(5, 3)
            return nn.Sequential(*layers).to(self.dtype)

    def batch(self, n: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed + 1000 + n)
        inputs = torch.randn(BATCH, 6, generator=generator, dtype=torch.float64).to(self.dtype)
        return inputs, torch.randint(3, (BATCH,), generator=generator)

    def loss(self, model: nn.Module, n: int, part: slice = slice(None)) -> Tensor:
        inputs, targets = self.batch(n)
        return self.criterion(model(inputs[part]), targets[part], n)

    def criterion(self, outputs: Tensor, targets: Tensor, n: int) -> Tensor:
        loss = nn.functional.cross_entropy(outputs, targets)
        if (n, self.passes[n]) in self.broken:
            loss = loss * float("nan")
        self.passes[n] += 1
        return loss

    def backward(self, model: nn.Module, n: int) -> Tensor:
        loss = self.loss(model, n)
        loss.backward()
        return loss.detach()

    def backward_in_parts(self, model: nn.Module, n: int) -> None:
        for part in (slice(0, 4), slice(4, BATCH)):
            share = (part.stop - part.start) / BATCH
            (self.loss(model, n, part) * share).backward()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


# --- the reference run --------------------------------------------------------------------------


@contextmanager
def climbed(model: nn.Module, rho: float = RHO) -> Iterator[None]:
    """Return the perturbed weights of algorithm 1 of Foret et al. (2021), with a norm summed in float64."""
    before = weights(model)
    with torch.no_grad():
        moved = [p for p in model.parameters() if p.grad is not None]
        squares = [p.grad.double().square().sum() for p in moved]
        scale = rho / (float(torch.stack(squares).sum().sqrt()) + 1e-12)
        for p in moved:
            p += (p.grad.double() * scale).to(p.dtype)
    yield
    with torch.no_grad():
        for p, value in zip(model.parameters(), before, strict=True):
            p.copy_(value)


def reference(
    task: Task,
    due: Collection[int],
    *,
    base: Any = torch.optim.SGD,
    backward: Callable[[nn.Module, int], Any] | None = None,
    skip: Collection[int] = (),
    decay: float = 1.0,
    **options: Any,
) -> list[list[Tensor]]:
    """Return the weights after every step of torch's optimizer, with ascents by :func:`climbed`.

    Args:
        task: the network and its batches.
        due: steps with an ascent.
        base: the optimizer's class.
        backward: puts the gradients of step n into ``.grad``. Default: the gradient of the whole batch.
        skip: steps to skip.
        decay: factor of the learning rate after every step.
        **options: arguments of ``base``.
    """
    model = task.network()
    optimizer = base(model.parameters(), **(options or SGD))
    backward = backward or task.backward
    history = []
    for n in range(STEPS):
        optimizer.zero_grad()
        if n not in skip:
            backward(model, n)
            if n in due:
                with climbed(model):
                    optimizer.zero_grad()
                    backward(model, n)
            optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= decay
        history.append(weights(model))
    return history


def assert_equals_base_until(
    first_ascent: int, found: Sequence[list[Tensor]], expected: Sequence[list[Tensor]]
) -> None:
    """Assert equal bits to torch before the first ascent, and equality up to rounding after it."""
    assert len(found) == len(expected)
    for n, (f, e) in enumerate(zip(found, expected, strict=True)):
        if n < first_ascent:
            assert_torch_bits(f, e)
        else:
            assert_close(f, e, TOLERANCE[e[0].dtype])


# --- every way to write a step ------------------------------------------------------------------

StepOf = Callable[[int], Any]


@dataclass(frozen=True)
class Form:
    """A way to write a training step.

    Attributes:
        make: returns the function that makes step n.
        options: constructor arguments of the optimizer.
        plain_passes: forward passes in a step without an ascent.
        ascent_passes: forward passes in a step with one.
        in_parts: whether the gradient is accumulated over micro-batches.
    """

    make: Callable[[Task, nn.Module, SAM], StepOf]
    options: dict[str, Any] = field(default_factory=dict)
    plain_passes: int = 1
    ascent_passes: int = 2
    in_parts: bool = False


def _asks(task: Task, model: nn.Module, optimizer: SAM) -> StepOf:
    def step(n: int) -> None:
        task.backward(model, n)
        if optimizer.ascent_due:
            optimizer.first_step(zero_grad=True)
            task.backward(model, n)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _does_not_ask(task: Task, model: nn.Module, optimizer: SAM) -> StepOf:
    def step(n: int) -> None:
        task.backward(model, n)
        optimizer.first_step(zero_grad=True)
        assert all(p.grad is None for p in model.parameters())
        task.backward(model, n)
        optimizer.second_step(zero_grad=True)
        assert all(p.grad is None for p in model.parameters())

    return step


def _does_not_ask_and_calls_step(task: Task, model: nn.Module, optimizer: SAM) -> StepOf:
    def step(n: int) -> None:
        task.backward(model, n)
        optimizer.first_step(zero_grad=True)
        task.backward(model, n)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _closure_for_the_second_pass(task: Task, model: nn.Module, optimizer: SAM) -> StepOf:
    def step(n: int) -> None:
        task.backward(model, n)
        due = optimizer.ascent_due
        loss = optimizer.step(lambda: task.backward(model, n))
        assert (loss is not None) == due
        optimizer.zero_grad()

    return step


def _closure_for_both_passes(task: Task, model: nn.Module, optimizer: SAM) -> StepOf:
    def step(n: int) -> None:
        losses: list[Tensor] = []

        def closure() -> Tensor:
            optimizer.zero_grad()
            losses.append(task.backward(model, n))
            return losses[-1]

        assert optimizer.step(closure) is losses[0]

    return step


def _passes(task: Task, model: nn.Module, optimizer: SAM) -> StepOf:
    def step(n: int) -> None:
        for _ in optimizer.passes():
            optimizer.zero_grad()
            task.backward(model, n)
        optimizer.zero_grad()

    return step


def _scaler(
    task: Task, model: nn.Module, optimizer: SAM, *, asks: bool, unscales: bool = False
) -> StepOf:
    scaler = GradScaler("cpu", init_scale=1024.0)

    def half(target: Any, n: int) -> None:
        scaler.scale(task.loss(model, n)).backward()
        if unscales:
            scaler.unscale_(target)
            nn.utils.clip_grad_norm_(model.parameters(), 1e6)

    def step(n: int) -> None:
        if not asks or optimizer.ascent_due:
            half(optimizer.ascent, n)
            scaler.step(optimizer.ascent)
            optimizer.ascent.zero_grad()
        half(optimizer, n)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def _accumulates(task: Task, model: nn.Module, optimizer: SAM) -> StepOf:
    def step(n: int) -> None:
        task.backward_in_parts(model, n)
        if optimizer.ascent_due:
            optimizer.first_step(zero_grad=True)
            task.backward_in_parts(model, n)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _accumulates_in_a_closure(task: Task, model: nn.Module, optimizer: SAM) -> StepOf:
    def step(n: int) -> None:
        task.backward_in_parts(model, n)
        optimizer.step(lambda: task.backward_in_parts(model, n))
        optimizer.zero_grad()

    return step


def _accumulates_in_passes(task: Task, model: nn.Module, optimizer: SAM) -> StepOf:
    def step(n: int) -> None:
        for _ in optimizer.passes():
            optimizer.zero_grad()
            task.backward_in_parts(model, n)
        optimizer.zero_grad()

    return step


def _one_call(task: Task, model: nn.Module, optimizer: SAM) -> StepOf:
    now = 0

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return task.criterion(outputs, targets, now)

    made = capture_step(model, loss_fn, optimizer, task.batch(0))

    def step(n: int) -> None:
        nonlocal now
        now = n
        made(task.batch(n))

    return step


FORMS: dict[str, Form] = {
    "two calls, asks": Form(_asks),
    "two calls, does not ask": Form(_does_not_ask, plain_passes=2),
    "first_step and step, does not ask": Form(_does_not_ask_and_calls_step, plain_passes=2),
    "closure for the second pass": Form(_closure_for_the_second_pass),
    "closure for both passes": Form(_closure_for_both_passes, {"closure": "both_passes"}),
    "passes": Form(_passes),
    "scaler, asks": Form(lambda *of: _scaler(*of, asks=True)),
    "scaler, does not ask": Form(lambda *of: _scaler(*of, asks=False), plain_passes=2),
    "scaler, asks and unscales": Form(lambda *of: _scaler(*of, asks=True, unscales=True)),
    "scaler, unscales and does not ask": Form(
        lambda *of: _scaler(*of, asks=False, unscales=True), plain_passes=2
    ),
    "accumulates": Form(_accumulates, plain_passes=2, ascent_passes=4, in_parts=True),
    "accumulates in a closure": Form(
        _accumulates_in_a_closure, plain_passes=2, ascent_passes=4, in_parts=True
    ),
    "accumulates in passes": Form(
        _accumulates_in_passes, plain_passes=2, ascent_passes=4, in_parts=True
    ),
    "capture_step": Form(_one_call),
}


def sam(form: Form, model: nn.Module, policy: dict[str, int], **options: Any) -> SAM:
    """Return SAM on SGD with the options of ``form``."""
    settings = {"base_optimizer": torch.optim.SGD, "rho": RHO, **(options or SGD)}
    return SAM(model.parameters(), **policy, **form.options, **settings)


def run(
    task: Task, form: Form, model: nn.Module, optimizer: SAM, steps: range = range(STEPS)
) -> list[list[Tensor]]:
    """Return the weights after every step."""
    step = form.make(task, model, optimizer)
    history = []
    for n in steps:
        assert optimizer.attempted_steps == n
        step(n)
        history.append(weights(model))
    return history


# --- ways to save and resume --------------------------------------------------------------------

MakeOptimizer = Callable[[nn.Module], SAM]
Resume = Callable[[Task, nn.Module, SAM, MakeOptimizer], tuple[nn.Module, SAM]]


def _from_state_dicts(
    task: Task, model: nn.Module, optimizer: SAM, make: MakeOptimizer
) -> tuple[nn.Module, SAM]:
    """Save and load through a file with plain Python objects only."""
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = task.network()
    other.load_state_dict(saved["model"])
    resumed = make(other)
    resumed.load_state_dict(saved["optimizer"])
    return other, resumed


def _from_a_copy(
    task: Task, model: nn.Module, optimizer: SAM, make: MakeOptimizer
) -> tuple[nn.Module, SAM]:
    copied: tuple[nn.Module, SAM] = copy.deepcopy((model, optimizer))
    return copied


def _from_a_pickle(
    task: Task, model: nn.Module, optimizer: SAM, make: MakeOptimizer
) -> tuple[nn.Module, SAM]:
    loaded: tuple[nn.Module, SAM] = pickle.loads(pickle.dumps((model, optimizer)))
    return loaded


RESUMES: dict[str, Resume] = {
    "state dict": _from_state_dicts,
    "deepcopy": _from_a_copy,
    "pickle": _from_a_pickle,
}
