"""Closures for several passes: gradients that may exist before, and passes that are never summed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fastsam import SAM
from fastsam.optim import LPFSGD, PGD, EntropySGD, LookSAM

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "sam": lambda p: SAM(p, torch.optim.SGD, rho=0.1, lr=0.1, closure="both_passes"),
    "sam on rmsprop": lambda p: SAM(
        p, torch.optim.RMSprop, rho=0.1, lr=0.01, closure="both_passes"
    ),
    "looksam": lambda p: LookSAM(torch.optim.SGD(p, lr=0.1), rho=0.1, every=2),
    "lpf": lambda p: LPFSGD(torch.optim.SGD(p, lr=0.1), gamma=0.1, parts=3),
    "entropy": lambda p: EntropySGD(torch.optim.SGD(p, lr=0.5), steps=3),
    "pgd on weights": lambda p: PGD(torch.optim.SGD(p, lr=0.1), sigma=0.1, noise_on="weights"),
}


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def batch(step: int) -> Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(step))


def clear(model: nn.Module, how: str) -> None:
    if how == "to none":
        model.zero_grad()
    elif how == "to zero":
        model.zero_grad(set_to_none=False)


@pytest.fixture(params=OPTIMIZERS)
def make(request: Any) -> Callable[..., Any]:
    return OPTIMIZERS[request.param]


def train(
    make: Callable[..., Any], *, before: str = "", inside: str = "", graph: bool = False
) -> list[Tensor]:
    """Make three steps, with the gradients cleared in one of several places."""
    model = network()
    optimizer = make(model.parameters())
    for step in range(3):
        clear(model, before)

        def closure(step: int = step) -> Tensor:
            clear(model, inside)
            loss = model(batch(step)).square().mean()
            loss.backward(create_graph=graph)
            return loss

        optimizer.step(closure)
    return [p.detach().clone() for p in model.parameters()]


def test_the_two_passes_are_never_summed() -> None:
    """At rho 0 both passes have the same gradient, and the update must use it once."""
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = SAM([weight], torch.optim.SGD, rho=0.0, lr=1.0, closure="both_passes")

    def closure() -> Tensor:
        loss = (weight * torch.tensor([3.0, 5.0])).sum()
        loss.backward()
        return loss

    for step in (1, 2, 3):  # the gradient that a step leaves counts as used
        optimizer.step(closure)
        assert weight.tolist() == [1.0 - 3.0 * step, -2.0 - 5.0 * step]
        assert weight.grad is not None
        assert weight.grad.tolist() == [3.0, 5.0]


@pytest.mark.parametrize("before", ["", "to none", "to zero"])
@pytest.mark.parametrize("inside", ["", "to none", "to zero"])
def test_the_closure_may_clear_gradients_at_any_place(
    before: str, inside: str, make: Callable[..., Any]
) -> None:
    expected = train(make, inside="to none")
    found = train(make, before=before, inside=inside)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("graph", [False, True], ids=["in place", "out of place"])
def test_a_gradient_of_an_earlier_micro_batch_is_refused(
    graph: bool, make: Callable[..., Any]
) -> None:
    model = network()
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = make(model.parameters())
    model(batch(0)).square().mean().backward(create_graph=graph)

    def closure() -> Tensor:
        loss = model(batch(1)).square().mean()
        loss.backward(create_graph=graph)
        return loss

    with pytest.raises(RuntimeError, match="micro-batch"):
        optimizer.step(closure)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), start, strict=True))
    assert not any(p._backward_hooks for p in model.parameters())
    optimizer.zero_grad()
    optimizer.step(closure)


def test_a_single_uncleared_gradient_is_refused(make: Callable[..., Any]) -> None:
    """Cleared for all parameters except one, which the closure uses or not."""
    for used in (True, False):
        model = network()
        extra = nn.Parameter(torch.ones(()))
        optimizer = make([*model.parameters(), extra])
        (model(batch(0)).square().mean() * extra).backward()

        def closure(used: bool = used, model: nn.Module = model, extra: Tensor = extra) -> Tensor:
            model.zero_grad()
            loss = model(batch(1)).square().mean() * (extra if used else 1.0)
            loss.backward()
            return loss

        with pytest.raises(RuntimeError, match="micro-batch"):
            optimizer.step(closure)


def test_earlier_gradients_that_the_closure_clears_are_accepted(make: Callable[..., Any]) -> None:
    for how in ("to none", "to zero"):
        model = network()
        optimizer = make(model.parameters())
        for step in range(3):
            model(batch(7)).square().sum().backward()  # a reference held by other code

            def closure(step: int = step, model: nn.Module = model, how: str = how) -> Tensor:
                clear(model, how)
                loss = model(batch(step)).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)
        found = [p.detach() for p in model.parameters()]
        expected = train(make, inside="to none")
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_frozen_parameter_may_keep_its_gradient() -> None:
    """Nothing is added to it."""
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, closure="both_passes")
    model(batch(0)).square().mean().backward()
    model[0].requires_grad_(False)
    model[2].zero_grad()

    def closure() -> Tensor:
        loss = model(batch(1)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)


def test_a_closure_that_raises_leaves_no_hook_behind(make: Callable[..., Any]) -> None:
    model = network()
    optimizer = make(model.parameters())
    model(batch(0)).square().mean().backward()

    def closure() -> Tensor:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        optimizer.step(closure)
    assert not any(p._backward_hooks for p in model.parameters())


def test_spent_gradients_are_not_kept_alive(make: Callable[..., Any]) -> None:
    """No tensor of a step outlives ``zero_grad``."""
    model = network()
    optimizer = make(model.parameters())

    def closure() -> Tensor:
        model.zero_grad()
        loss = model(batch(1)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    references = [reference for reference, _ in optimizer._closure_passes._spent.values()]
    assert len(references) == 4
    optimizer.zero_grad()
    assert all(reference() is None for reference in references)


def test_a_spent_gradient_that_was_accumulated_into_is_refused() -> None:
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, closure="both_passes")

    def closure() -> Tensor:
        loss = model(batch(1)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    model(batch(0)).square().mean().backward()
    with pytest.raises(RuntimeError, match="micro-batch"):
        optimizer.step(closure)


@pytest.fixture
def one_rank() -> Iterator[None]:
    """Create a process group with only this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")
@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("inside", ["", "to none", "to zero"])
def test_ddp_restores_cleared_gradients_as_the_same_objects(views: bool, inside: str) -> None:
    """With bucket views as gradients, the gradients do not show afterwards whether a closure cleared them."""
    module = network()
    model = DistributedDataParallel(module, gradient_as_bucket_view=views)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, closure="both_passes")

    def closure(step: int) -> Tensor:
        clear(module, inside)
        loss = model(batch(step)).square().mean()
        loss.backward()
        return loss

    for step in range(3):
        optimizer.step(partial(closure, step))
    expected = train(OPTIMIZERS["sam"], inside="to none")
    for a, b in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(a.detach(), b)
    model(batch(9)).square().mean().backward()
    if inside:
        optimizer.step(partial(closure, 9))
    else:
        with pytest.raises(RuntimeError, match="micro-batch"):
            optimizer.step(partial(closure, 9))


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")
@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("inside", ["", "to none", "to zero"])
def test_fsdp_adds_to_gradients_without_autograd(inside: str) -> None:
    """No hook runs before FSDP2 accumulates."""
    model = network()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, closure="both_passes")

    def closure(step: int) -> Tensor:
        clear(model, inside)
        loss = model(batch(step)).square().mean()
        loss.backward()
        return loss

    for step in range(3):
        optimizer.step(partial(closure, step))
    expected = train(OPTIMIZERS["sam"], inside="to none")
    for a, b in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(a.detach().full_tensor(), b)
    model.zero_grad(set_to_none=False)
    optimizer.step(partial(closure, 4))
    model(batch(9)).square().mean().backward()
    if inside == "to none":
        optimizer.step(partial(closure, 9))
    else:
        with pytest.raises(RuntimeError, match="micro-batch"):
            optimizer.step(partial(closure, 9))


# --- the weights are perturbed already ----------------------------------------------------------


@pytest.mark.parametrize("mode", ["second_pass", "both_passes"])
def test_a_closure_after_the_first_step_is_the_second_pass(mode: Any) -> None:
    expected, found = network(), network()
    two_calls = SAM(expected.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    closures = SAM(found.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, closure=mode)
    for step in range(3):
        for model, optimizer in ((expected, two_calls), (found, closures)):
            model(batch(step)).square().mean().backward()
            optimizer.first_step(zero_grad=True)
        # Existing gradients are kept: half of this pass was made before.
        for model in (expected, found):
            (model(batch(step)).square().mean() / 2).backward()
        (expected(batch(step)).square().mean() / 2).backward()
        two_calls.second_step(zero_grad=True)

        def closure(step: int = step) -> float:
            loss = found(batch(step)).square().mean() / 2
            loss.backward()
            return 3.5

        assert closures.step(closure) == 3.5
        closures.zero_grad()
    assert all(
        torch.equal(a, b) for a, b in zip(expected.parameters(), found.parameters(), strict=True)
    )


@pytest.mark.parametrize("mode", ["second_pass", "both_passes"])
def test_a_second_pass_that_raises_or_leaves_nothing_restores(mode: Any) -> None:
    model = network()
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, closure=mode)

    def failing() -> None:
        raise ArithmeticError

    for closure, error in ((failing, ArithmeticError), (lambda: None, RuntimeError)):
        model(batch(0)).square().mean().backward()
        optimizer.first_step(zero_grad=True)
        assert not torch.equal(model[0].weight, start[0])
        with pytest.raises(error):
            optimizer.step(closure)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), start, strict=True))


def test_a_second_step_without_a_gradient_can_be_repeated() -> None:
    model, other = network(), network()
    optimizers = [SAM(m.parameters(), torch.optim.SGD, rho=0.1, lr=0.1) for m in (model, other)]
    for m, optimizer in zip((model, other), optimizers, strict=True):
        m(batch(0)).square().mean().backward()
        optimizer.first_step(zero_grad=True)
    for call in (optimizers[0].second_step, optimizers[0].step):
        with pytest.raises(RuntimeError, match="second pass left no gradient"):
            call()
    for m, optimizer in zip((model, other), optimizers, strict=True):
        m(batch(0)).square().mean().backward()
        optimizer.second_step()
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )
    assert not torch.equal(model[0].weight, network()[0].weight)


def test_a_first_pass_without_a_gradient_makes_no_step() -> None:
    """As in torch.optim; Lightning's ``training_step`` may return None to skip a batch."""
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, closure="both_passes")
    calls: list[int] = []
    assert optimizer.step(lambda: calls.append(1)) is None
    assert calls == [1]
    assert torch.equal(model[0].weight, network()[0].weight)


def test_the_weights_are_restored_if_the_closure_calls_first_step() -> None:
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, closure="both_passes")

    def closure() -> None:
        model(batch(0)).square().mean().backward()
        optimizer.first_step()

    with pytest.raises(RuntimeError, match="called twice"):
        optimizer.step(closure)
    assert torch.equal(model[0].weight, network()[0].weight)


def test_second_step_does_not_call_a_replaced_step() -> None:
    """Hooks of ``step`` still fire once."""

    class Other(SAM):
        def step(self, closure: Any = None) -> Any:
            return super().step(lambda: None)

    model, expected = network(), network()
    optimizers = [
        Other(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1),
        SAM(expected.parameters(), torch.optim.SGD, rho=0.1, lr=0.1),
    ]
    calls: list[str] = []
    optimizers[0].register_step_pre_hook(lambda *_: calls.append("before"))
    optimizers[0].register_step_post_hook(lambda *_: calls.append("after"))
    for each, optimizer in zip((model, expected), optimizers, strict=True):
        each(batch(0)).square().mean().backward()
        optimizer.first_step(zero_grad=True)
        each(batch(0)).square().mean().backward()
        optimizer.second_step()
    assert calls == ["before", "after"]
    assert torch.equal(model[0].weight, expected[0].weight)
