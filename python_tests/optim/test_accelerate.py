"""SAM prepared by a real Accelerator, against the same steps written by hand."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastsam import SAM
from fastsam.optim import LookSAM

with warnings.catch_warnings():  # ignore deprecation warnings of its imports
    warnings.simplefilter("ignore")
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.state import AcceleratorState, GradientState

BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"lr": 0.05}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.02}),
}
STEPS = 6


@pytest.fixture(autouse=True)
def _no_state_is_left() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def sam(model: nn.Module, base: str = "sgd", **options: Any) -> SAM:
    kind, settings = BASES[base]
    return SAM(model.parameters(), kind, rho=0.1, **options, **settings)


def loss_of(model: nn.Module, step: int, part: slice = slice(None)) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(8, 5, generator=generator)
    targets = torch.randint(3, (8,), generator=generator)
    return nn.functional.cross_entropy(model(inputs[part]), targets[part])


def by_hand(
    base: str = "sgd", clip: float | None = None, steps: int = STEPS, decay: float = 1.0
) -> nn.Module:
    model = network()
    optimizer = sam(model, base)
    for step in range(steps):
        for half in (optimizer.first_step, optimizer.second_step):
            loss_of(model, step).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            half(zero_grad=True)
        for group in optimizer.param_groups:
            group["lr"] *= decay
    return model


def assert_same(first: nn.Module, second: nn.Module) -> None:
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def _calls(accelerator: Accelerator, model: nn.Module, optimizer: Any, step: int) -> None:
    accelerator.backward(loss_of(model, step))
    optimizer.optimizer.first_step(zero_grad=True)
    accelerator.backward(loss_of(model, step))
    optimizer.optimizer.second_step()
    optimizer.zero_grad()


def _step(accelerator: Accelerator, model: nn.Module, optimizer: Any, step: int) -> None:
    accelerator.backward(loss_of(model, step))
    optimizer.optimizer.first_step(zero_grad=True)
    accelerator.backward(loss_of(model, step))
    optimizer.step()
    optimizer.zero_grad()


def _second_pass(accelerator: Accelerator, model: nn.Module, optimizer: Any, step: int) -> None:
    accelerator.backward(loss_of(model, step))
    optimizer.step(lambda: accelerator.backward(loss_of(model, step)))
    optimizer.zero_grad()


def _both_passes(accelerator: Accelerator, model: nn.Module, optimizer: Any, step: int) -> None:
    def closure() -> None:
        optimizer.zero_grad()
        accelerator.backward(loss_of(model, step))

    optimizer.step(closure)


def _cleared_after(accelerator: Accelerator, model: nn.Module, optimizer: Any, step: int) -> None:
    optimizer.step(lambda: accelerator.backward(loss_of(model, step)))
    optimizer.zero_grad(set_to_none=step % 2 == 0)


WAYS: dict[str, tuple[Callable[..., None], Any]] = {
    "first_step and second_step": (_calls, "second_pass"),
    "first_step and step": (_step, "second_pass"),
    "closure for the second pass": (_second_pass, "second_pass"),
    "closure for both passes": (_both_passes, "both_passes"),
    "cleared after the step": (_cleared_after, "both_passes"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("base", BASES)
def test_every_way_to_step(base: str, way: str) -> None:
    accelerator = Accelerator(cpu=True)
    model = network()
    one_step, closure = WAYS[way]
    model, optimizer = accelerator.prepare(model, sam(model, base, closure=closure))
    for step in range(STEPS):
        one_step(accelerator, model, optimizer, step)
    assert_same(model, by_hand(base))


@pytest.mark.parametrize("way", WAYS)
def test_a_prepared_scheduler(way: str) -> None:
    accelerator = Accelerator(cpu=True)
    model = network()
    one_step, closure = WAYS[way]
    optimizer = sam(model, closure=closure)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    for step in range(STEPS):
        one_step(accelerator, model, optimizer, step)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**STEPS)
    assert_same(model, by_hand(decay=0.5))


def test_clipping() -> None:
    accelerator = Accelerator(cpu=True)
    model = network()
    model, optimizer = accelerator.prepare(model, sam(model, closure="both_passes"))
    for step in range(STEPS):

        def closure(step: int = step) -> None:
            optimizer.zero_grad()
            accelerator.backward(loss_of(model, step))
            accelerator.clip_grad_norm_(model.parameters(), 0.1)

        optimizer.step(closure)
    assert_same(model, by_hand(clip=0.1))


def test_accumulation_over_all_micro_batches_in_both_passes() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = network()
    model, optimizer = accelerator.prepare(model, sam(model))
    for step in range(STEPS):
        for half in (optimizer.optimizer.first_step, optimizer.optimizer.second_step):
            for part in (slice(0, 4), slice(4, 8)):
                with accelerator.accumulate(model):
                    accelerator.backward(loss_of(model, step, part))
            half(zero_grad=True)
    for a, b in zip(model.parameters(), by_hand().parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_closure_in_accumulate_is_refused_after_another_micro_batch() -> None:
    """Only the passes of the last micro-batch would be added to the gradients of the others."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = network()
    model, optimizer = accelerator.prepare(model, sam(model, closure="both_passes"))
    with accelerator.accumulate(model):
        accelerator.backward(loss_of(model, 0, slice(0, 4)))
        optimizer.step(lambda: pytest.fail("no step is due"))
    with accelerator.accumulate(model), pytest.raises(RuntimeError, match="micro-batch"):
        optimizer.step(lambda: accelerator.backward(loss_of(model, 0, slice(4, 8))))
    assert_same(model, network())


def test_bf16() -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = network()
    model, optimizer = accelerator.prepare(model, sam(model))
    for step in range(STEPS):
        _step(accelerator, model, optimizer, step)
    for a, b in zip(model.parameters(), by_hand().parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.02)
    assert not torch.equal(model[0].weight, network()[0].weight)


@pytest.mark.parametrize("with_ascent", [False, True])
def test_a_gradient_scaler(with_ascent: bool) -> None:
    """``step()`` unscales the second pass; the ascent does not depend on the scale."""
    Accelerator(cpu=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model = network()
    optimizer = AcceleratedOptimizer(sam(model), scaler=scaler)
    ascent = AcceleratedOptimizer(optimizer.optimizer.ascent, False, scaler)
    for step in range(STEPS):
        scaler.scale(loss_of(model, step)).backward()
        if with_ascent:
            ascent.step()
            ascent.zero_grad()
        else:
            optimizer.optimizer.first_step(zero_grad=True)
        scaler.scale(loss_of(model, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for a, b in zip(model.parameters(), by_hand().parameters(), strict=True):
        torch.testing.assert_close(a, b)
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(loss_of(model, 0)).backward()
    optimizer.optimizer.first_step(zero_grad=True)
    (scaler.scale(loss_of(model, 0)) * float("inf")).backward()
    optimizer.step()
    assert scaler.get_scale() == 2.0**9
    assert int(optimizer.optimizer.skipped_steps) == 1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_the_error_of_a_plain_step_names_the_calls() -> None:
    accelerator = Accelerator(cpu=True)
    model = network()
    model, optimizer = accelerator.prepare(model, sam(model))
    accelerator.backward(loss_of(model, 0))
    with pytest.raises(RuntimeError, match="first_step"):
        optimizer.step()
    assert_same(model, network())


def test_states_are_saved_and_loaded(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model = network()
    model, optimizer = accelerator.prepare(model, sam(model))
    for step in range(3):
        _step(accelerator, model, optimizer, step)
    accelerator.save_state(str(tmp_path))
    for step in range(3):
        _step(accelerator, model, optimizer, 50 + step)
    accelerator.load_state(str(tmp_path))
    for step in range(3, STEPS):
        _step(accelerator, model, optimizer, step)
    assert_same(model, by_hand())


def test_a_variant() -> None:
    def train(model: nn.Module, optimizer: Any, backward: Callable[[Tensor], Any]) -> nn.Module:
        for step in range(STEPS):

            def closure(step: int = step) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, step)
                backward(loss)
                return loss

            optimizer.step(closure)
        return model

    def look(model: nn.Module) -> LookSAM:
        return LookSAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, every=2)

    accelerator = Accelerator(cpu=True)
    model = network()
    prepared, optimizer = accelerator.prepare(model, look(model))
    alone = network()
    expected = train(alone, look(alone), lambda loss: loss.backward())
    assert_same(train(prepared, optimizer, accelerator.backward), expected)
