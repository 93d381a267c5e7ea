"""Autocast and GradScaler, through their public calls only."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.amp import GradScaler, autocast

from fastsam import SAM
from python_tests.optim.trajectories import Problem, assert_close, assert_same_bits, make

SHAPES = [(3, 5), (7,)]
BASES = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (torch.optim.AdamW, {"lr": 0.05}),
    (torch.optim.RMSprop, {"lr": 0.02}),
]


@pytest.fixture(params=BASES, ids=lambda case: case[0].__name__)
def base(request):
    return request.param


def scaled_step(problem, optimizer, parameters, scaler, step, *, overflow=(), unscale=()):
    """Make one step as in the documentation; ``overflow`` and ``unscale`` list passes."""
    for which, target in enumerate((optimizer.ascent, optimizer)):
        problem.set_gradients(parameters, step, which)
        factor = scaler.scale(torch.ones(()))
        for p in parameters:
            p.grad.mul_(factor)
        if which in overflow:
            parameters[1].grad[3] = float("inf")
        if which in unscale:
            scaler.unscale_(target)
            nn.utils.clip_grad_norm_(parameters, 1e6)
        scaler.step(target)
        target.zero_grad()
    scaler.update()


@pytest.mark.parametrize("unscale", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_scaled_run_equals_the_unscaled_one(base, unscale, adaptive, seed):
    problem = Problem(SHAPES, seed=seed)
    optimizer, parameters = make(SAM, problem, base[0], adaptive=adaptive, **base[1])
    scaler = GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    for step in range(5):
        scaled_step(problem, optimizer, parameters, scaler, step, unscale=unscale)
    twin = make(SAM, problem, base[0], adaptive=adaptive, **base[1])
    assert_close([p.detach() for p in parameters], problem.run(*twin, 5), 1e-6)
    assert scaler.get_scale() == 2048.0


@pytest.mark.parametrize("unscale", [(), (0,)])
def test_the_norm_of_the_ascent_excludes_the_loss_scale(unscale, seed):
    """Also after the scale has changed: here it doubles at every update."""
    problem = Problem(SHAPES, seed=seed)
    optimizer, parameters = make(SAM, problem, torch.optim.SGD, lr=0.1)
    scaler = GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    for step in range(3):
        gradients = [problem.gradient(i, p, step, 0).double() for i, p in enumerate(parameters)]
        expected = sum(float(g.square().sum()) for g in gradients) ** 0.5
        scaled_step(problem, optimizer, parameters, scaler, step, unscale=unscale)
        assert float(optimizer.ascent_norm) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("overflow", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("unscale", [(), (0, 1)])
def test_overflow_restores_skips_and_lowers_the_scale_once(base, overflow, unscale, seed):
    problem = Problem(SHAPES, seed=seed)
    optimizer, parameters = make(SAM, problem, base[0], **base[1])
    scaler = GradScaler("cpu", init_scale=1024.0)
    scaled_step(problem, optimizer, parameters, scaler, 0)
    before = [p.detach().clone() for p in parameters]
    state = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in parameters]
    scaled_step(problem, optimizer, parameters, scaler, 1, overflow=overflow, unscale=unscale)
    assert_same_bits([p.detach() for p in parameters], before)
    for p, entry in zip(parameters, state, strict=True):
        assert all(torch.equal(optimizer.state[p][key], value) for key, value in entry.items())
    assert scaler.get_scale() == 512.0
    assert int(optimizer.skipped_steps) == 1
    scaled_step(problem, optimizer, parameters, scaler, 2)
    twin, twins = make(SAM, problem, base[0], **base[1])
    problem.run(twin, twins, 1)
    problem.run(twin, twins, range(2, 3))
    assert_close([p.detach() for p in parameters], [p.detach() for p in twins], 1e-6)


def test_an_overflow_that_the_user_hides_still_skips(seed):
    """The scaler found it in pass one; replacing the gradient afterwards must not undo that."""
    problem = Problem(SHAPES, seed=seed)
    optimizer, parameters = make(SAM, problem, torch.optim.SGD, lr=0.1)
    scaler = GradScaler("cpu", init_scale=64.0)
    problem.set_gradients(parameters, 0, 0)
    parameters[1].grad[3] = float("inf")
    scaler.scale(torch.zeros(()))
    scaler.unscale_(optimizer.ascent)
    parameters[1].grad.nan_to_num_(posinf=1.0)
    scaler.step(optimizer.ascent)
    problem.set_gradients(parameters, 0, 1)
    scaler.step(optimizer)
    scaler.update()
    assert_same_bits([p.detach() for p in parameters], problem.start)
    assert scaler.get_scale() == 32.0


def test_a_disabled_scaler_changes_nothing(base, seed):
    problem = Problem(SHAPES, seed=seed)
    optimizer, parameters = make(SAM, problem, base[0], **base[1])
    scaler = GradScaler("cpu", enabled=False)
    for step in range(3):
        for which, target in enumerate((optimizer.ascent, optimizer)):
            problem.set_gradients(parameters, step, which)
            scaler.step(target)
        scaler.update()
    twin = make(SAM, problem, base[0], **base[1])
    assert_same_bits([p.detach() for p in parameters], problem.run(*twin, 3))


def test_a_scaled_step_is_repeated_after_an_error_in_the_second_half():
    """A scaler leaves its scale on an optimizer whose step raises, and multiplies the next one by it."""
    weight = nn.Parameter(torch.tensor([3.0]))
    optimizer = SAM([weight], torch.optim.SGD, lr=0.1)
    scaler = GradScaler("cpu", init_scale=4.0)

    def half(target: torch.optim.Optimizer) -> None:
        weight.grad = scaler.scale(torch.tensor([1.0]))
        scaler.step(target)

    half(optimizer.ascent)
    weight.data = weight.detach().clone()
    with pytest.raises(RuntimeError, match="storage of a parameter was replaced"):
        half(optimizer)
    optimizer.restore()
    scaler.update()
    half(optimizer.ascent)
    half(optimizer)
    assert weight.item() == pytest.approx(3.0 - 0.1)


def test_a_scaled_step_is_repeated_after_an_error_in_the_first_half():
    weight = nn.Parameter(torch.tensor([3.0]))
    optimizer = SAM([weight], torch.optim.SGD, lr=0.1)
    scaler = GradScaler("cpu", init_scale=4.0)
    weight.grad = scaler.scale(torch.tensor([2.0]))
    with pytest.raises(RuntimeError, match="needs first_step"):
        scaler.step(optimizer)
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="called twice"):
        scaler.step(optimizer.ascent)
    optimizer.restore()
    scaler.update()
    for target in (optimizer.ascent, optimizer):
        weight.grad = scaler.scale(torch.tensor([2.0]))
        scaler.step(target)
    assert float(optimizer.ascent_norm) == 2.0
    assert weight.item() == pytest.approx(3.0 - 0.2)


def test_the_ascent_property_always_returns_one_object(seed):
    problem = Problem(SHAPES, seed=seed)
    optimizer, _ = make(SAM, problem, torch.optim.SGD, lr=0.1)
    ascent = optimizer.ascent
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert optimizer.ascent is ascent
    assert ascent.param_groups is optimizer.param_groups
    with pytest.raises(TypeError, match="no closure"):
        ascent.step(lambda: None)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))


@pytest.mark.parametrize("outer", ["one context", "abandoned", "disabled inside"])
def test_one_autocast_context_around_everything(outer, base, seed):
    """Its cache of 16-bit weights must not be reused in pass two, whose weights differ."""
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(seed))
    results = []
    for shared in (True, False):
        model = network(seed)
        optimizer = SAM(model.parameters(), base[0], rho=0.5, **base[1])

        def backward(model=model) -> None:
            model(x).float().square().mean().backward()

        def step(model=model, optimizer=optimizer, backward=backward) -> None:
            for finish in (optimizer.first_step, optimizer.second_step):
                with autocast("cpu", dtype=torch.bfloat16):
                    backward()
                if outer == "disabled inside":
                    with autocast("cpu", enabled=False):
                        finish(zero_grad=True)
                else:
                    finish(zero_grad=True)
            if outer == "abandoned":
                with autocast("cpu", dtype=torch.bfloat16):
                    backward()
                    optimizer.first_step()
                    backward()
                    optimizer.restore()
                optimizer.zero_grad()

        with autocast("cpu", dtype=torch.bfloat16) if shared else nullcontext():
            for _ in range(3):
                step()
        results.append([p.detach() for p in model.parameters()])
    assert_same_bits(*results)


def test_autocast_with_a_scaler_trains_like_float32(seed):
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(seed))
    results = []
    for mixed in (True, False):
        model = network(seed)
        optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
        scaler = GradScaler("cpu", enabled=mixed)
        for _ in range(5):
            for target in (optimizer.ascent, optimizer):
                with autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
                    loss = model(x).float().square().mean()
                scaler.scale(loss).backward()
                scaler.step(target)
                target.zero_grad()
            scaler.update()
        results.append([p.detach() for p in model.parameters()])
    assert_close(*results, 2e-2)
