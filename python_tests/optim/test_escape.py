"""PGD, LPF-SGD, Entropy-SGD and LookSAM against trajectories written out in float64 NumPy."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from fastsam import SAM
from fastsam.optim._engine.noise import add_normal
from fastsam.optim.variants import looksam
from fastsam.optim.variants.entropy_sgd import EntropySGD
from fastsam.optim.variants.looksam import LookSAM
from fastsam.optim.variants.lpf_sgd import LPFSGD
from fastsam.optim.variants.pgd import PGD

Build = Callable[[Optimizer], Any]
BUILDERS: dict[str, Build] = {
    "pgd gradient": lambda sgd: PGD(sgd, sigma=0.1, seed=3),
    "pgd weights": lambda sgd: PGD(sgd, sigma=0.1, noise_on="weights", seed=3),
    "lpf": lambda sgd: LPFSGD(sgd, gamma=0.1, parts=3, seed=3),
    "entropy": lambda sgd: EntropySGD(sgd, steps=4, noise=0.1, seed=3),
    "looksam": lambda sgd: LookSAM(sgd, rho=0.1, every=3),
}


def problem(seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    inputs = torch.randn(11, 5, generator=generator)
    return model, inputs, torch.randint(3, (11,), generator=generator)


def closure_of(
    optimizer: Optimizer, model: nn.Module, inputs: Tensor, targets: Tensor
) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        return loss

    return closure


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("name", BUILDERS)
def test_a_reloaded_run_continues_with_the_same_bits(name: str) -> None:
    model, inputs, targets = problem()
    optimizer = BUILDERS[name](SGD(model.parameters(), lr=0.05, momentum=0.9))
    run = closure_of(optimizer, model, inputs, targets)
    state = torch.random.get_rng_state()
    for _ in range(4):
        optimizer.step(run)
    saved, model_state = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    for _ in range(3):
        optimizer.step(run)
    assert torch.equal(state, torch.random.get_rng_state())
    again, _, _ = problem(1)
    again.load_state_dict(model_state)
    resumed = BUILDERS[name](SGD(again.parameters(), lr=7.0, momentum=0.9))
    resumed.load_state_dict(saved)
    assert resumed.steps_taken == 4
    second = closure_of(resumed, again, inputs, targets)
    for _ in range(3):
        resumed.step(second)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(again), strict=True))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))])
@pytest.mark.parametrize("name", BUILDERS)
def test_copies_are_independent(name: str, copier: Callable[[Any], Any]) -> None:
    """Also after a scheduler has wrapped ``step``, which no file can hold."""
    model, inputs, targets = problem()
    optimizer = BUILDERS[name](SGD(model.parameters(), lr=0.05, momentum=0.9))
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    run = closure_of(optimizer, model, inputs, targets)
    for _ in range(4):
        optimizer.step(run)
    twin_model, twin = copier((model, optimizer))
    assert twin.param_groups is twin.base_optimizer.param_groups
    assert twin.state is twin.base_optimizer.state
    assert twin.steps_taken == 4
    before = weights(model)
    second = closure_of(twin, twin_model, inputs, targets)
    for _ in range(3):
        twin.step(second)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    for _ in range(3):
        optimizer.step(run)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(twin_model), strict=True))
    if name == "looksam":
        assert twin.sam is twin.base_optimizer
        assert twin.sam.base_optimizer.param_groups is twin.param_groups


@pytest.mark.parametrize("name", BUILDERS)
def test_groups_are_shared_and_a_closure_is_needed(name: str) -> None:
    model, _, _ = problem()
    sgd = SGD(model.parameters(), lr=0.05)
    optimizer = BUILDERS[name](sgd)
    assert optimizer.param_groups is sgd.param_groups
    torch.optim.lr_scheduler.StepLR(sgd, 1)
    with pytest.raises(TypeError, match="closure"):
        optimizer.step()


class BrokenPassError(Exception):
    """Raised by a closure in the middle of a step."""


@pytest.mark.parametrize(
    ("name", "broken"),
    [*((name, 1) for name in BUILDERS), ("lpf", 2), ("entropy", 2), ("looksam", 2)],
)
def test_a_failing_closure_leaves_the_weights(name: str, broken: int) -> None:
    """In the first pass, and in the second pass of optimizers that have one."""
    model, inputs, targets = problem()
    optimizer = BUILDERS[name](SGD(model.parameters(), lr=0.05))
    run = closure_of(optimizer, model, inputs, targets)
    before = weights(model)
    calls = 0

    def failing() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == broken:
            raise BrokenPassError
        return run()

    with pytest.raises(BrokenPassError):
        optimizer.step(failing)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


def noise_like(tensors: list[Tensor], seed: int, position: int) -> list[Tensor]:
    """Return standard normal noise as the optimizers draw it."""
    drawn = [torch.zeros_like(tensor) for tensor in tensors]
    ones = [torch.ones(1, dtype=torch.float64)] * len(tensors)
    add_normal(drawn, ones, seed=seed, position=position)
    return drawn


def test_noise_is_standard_normal_and_differs_by_position() -> None:
    like = [torch.empty(200, 300), torch.empty(0), torch.empty(200, 300)]
    noise, nothing, third = noise_like(like, 2**62 + 1, 5)
    assert nothing.numel() == 0
    assert torch.equal(noise, noise_like(like, 2**62 + 1, 5)[0])
    assert abs(float(noise.mean())) < 5 / math.sqrt(60000)
    assert abs(float(noise.std()) - 1) < 5 / math.sqrt(120000)
    others = [third, noise_like(like, 2**62 + 1, 6)[0], noise_like(like, 2**62, 5)[0]]
    for other in others:
        assert abs(float((noise * other).mean())) < 5 / math.sqrt(60000)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = noise_like(like, 2**62 + 1, 5)[0]
    torch.set_num_threads(threads)
    assert torch.equal(noise, alone)


def test_noise_has_one_deviation_for_each_filter() -> None:
    filters = torch.zeros(3, 100, 100)
    add_normal([filters], [torch.tensor([1.0, 0.0, 5.0])], seed=1, position=0)
    assert filters[0].std() == pytest.approx(1, abs=0.05)
    assert not filters[1].any()
    assert filters[2].std() == pytest.approx(5, abs=0.25)


def test_without_noise_the_variants_equal_sgd() -> None:
    builders: list[Build] = [
        lambda sgd: PGD(sgd, sigma=0.0),
        lambda sgd: PGD(sgd, sigma=0.0, noise_on="weights"),
        lambda sgd: LPFSGD(sgd, gamma=0.0),
    ]
    finals = []
    for build in [lambda sgd: sgd, *builders]:
        model, inputs, targets = problem()
        optimizer = build(SGD(model.parameters(), lr=0.1, momentum=0.9))
        for _ in range(5):
            optimizer.step(closure_of(optimizer, model, inputs, targets))
        finals.append(weights(model))
    for final in finals[1:]:
        assert all(torch.equal(a, b) for a, b in zip(finals[0], final, strict=True))


def quadratic(dimension: int, seed: int) -> tuple[np.ndarray, nn.Parameter, Callable[[], Tensor]]:
    """Return f(w) = w' A w / 2 with an indefinite A."""
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(dimension, dimension))
    matrix = (matrix + matrix.T) / 2
    parameter = nn.Parameter(torch.from_numpy(rng.normal(size=dimension)))

    def closure() -> Tensor:
        parameter.grad = None
        loss = 0.5 * parameter @ torch.from_numpy(matrix) @ parameter
        loss.backward()
        return loss

    return matrix, parameter, closure


@pytest.mark.parametrize("noise_on", ["gradient", "weights"])
def test_pgd_trajectory(noise_on: str, seed: int) -> None:
    matrix, parameter, closure = quadratic(6, seed)
    optimizer = PGD(SGD([parameter], lr=0.1), sigma=0.3, noise_on=noise_on, seed=5)
    w = parameter.detach().numpy().copy()
    for step in range(4):
        xi = 0.3 * noise_like([parameter.detach()], 5, step)[0].numpy()
        if noise_on == "gradient":
            w = w - 0.1 * (matrix @ w + xi)
        else:
            w = w + xi
            w = w - 0.1 * matrix @ w
        optimizer.step(closure)
    assert parameter.detach().numpy() == pytest.approx(w, rel=1e-10)


def test_lpf_trajectory_and_filter_norms(seed: int) -> None:
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(3, 4, 2))
    b = rng.normal(size=4)
    parameters = [
        nn.Parameter(torch.from_numpy(w.copy())),
        nn.Parameter(torch.from_numpy(b.copy())),
    ]
    factors = [2.0, -1.0]
    optimizer = LPFSGD(SGD(parameters, lr=0.1), gamma=0.2, parts=2, seed=9)
    part = 0

    def closure() -> Tensor:
        nonlocal part
        optimizer.zero_grad()
        loss = factors[part % 2] * sum(p.pow(3).sum() for p in parameters)
        part += 1
        loss.backward()
        return loss

    for step in range(2):
        gradients = [np.zeros_like(w), np.zeros_like(b)]
        for m in range(2):
            noises = noise_like([p.detach() for p in parameters], 9, 2 * step + m)
            for i, value in enumerate((w, b)):
                noise = noises[i].numpy()
                if i == 0:
                    size = np.array([np.sqrt((value[f] ** 2).sum()) for f in range(3)])
                    moved = value + 0.2 * size[:, None, None] * noise
                else:
                    moved = value + 0.2 * np.sqrt((value**2).sum()) * noise
                gradients[i] += factors[m] * 3 * moved**2 / 2
        w, b = w - 0.1 * gradients[0], b - 0.1 * gradients[1]
        optimizer.step(closure)
    assert parameters[0].detach().numpy() == pytest.approx(w, rel=1e-9)
    assert parameters[1].detach().numpy() == pytest.approx(b, rel=1e-9)


def test_entropy_trajectory(seed: int) -> None:
    matrix, parameter, closure = quadratic(5, seed)
    optimizer = EntropySGD(
        SGD([parameter], lr=0.7), steps=3, inner_lr=0.2, gamma=0.4, noise=0.05, alpha=0.6, seed=2
    )
    x = parameter.detach().numpy().copy()
    for step in range(3):
        prime, mean = x.copy(), x.copy()
        for inner in range(3):
            noise = noise_like([parameter.detach()], 2, 3 * step + inner)[0].numpy()
            prime = prime - 0.2 * (matrix @ prime + 0.4 * (prime - x)) + 0.2**0.5 * 0.05 * noise
            mean = 0.6 * mean + 0.4 * prime
        first = 0.5 * x @ matrix @ x
        x = x - 0.7 * (x - mean)
        assert float(optimizer.step(closure)) == pytest.approx(first)
    assert parameter.detach().numpy() == pytest.approx(x, rel=1e-9)


def test_looksam_trajectory(seed: int) -> None:
    matrix, parameter, closure = quadratic(6, seed)
    optimizer = LookSAM(SGD([parameter], lr=0.05, momentum=0.5), rho=0.3, every=3, alpha=0.6)
    w = parameter.detach().numpy().copy()
    momentum, direction = np.zeros(6), np.zeros(6)
    for step in range(8):
        g = matrix @ w
        size = np.sqrt(g @ g)
        if step % 3 == 0:
            above = matrix @ (w + 0.3 * g / size)
            cosine = above @ g / (np.sqrt(above @ above) * size)
            direction = above - np.sqrt(above @ above) * cosine * g / size
            update = above
        else:
            update = g + 0.6 * size / np.sqrt(direction @ direction) * direction
        momentum = update if step == 0 else 0.5 * momentum + update
        w = w - 0.05 * momentum
        optimizer.step(closure)
    assert parameter.detach().numpy() == pytest.approx(w, rel=1e-8)


def spoiled(closure: Callable[[], Tensor], parameter: Tensor, passes: dict[int, float]) -> Any:
    """Return the closure with a gradient element replaced in some passes, counted from 0."""
    count = iter(range(10**6))

    def run() -> Tensor:
        loss = closure()
        value = passes.get(next(count))
        if value is not None:
            assert parameter.grad is not None
            parameter.grad[1] = value
        return loss

    return run


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("broken", [4, 5], ids=["first pass", "second pass"])
def test_looksam_keeps_its_direction_over_a_skipped_step(
    broken: int, value: float, seed: int
) -> None:
    """Passes 0 and 1 are a SAM step, 2 and 3 plain, 4 and 5 a SAM step that is skipped."""
    matrix, parameter, closure = quadratic(6, seed)
    optimizer = LookSAM(SGD([parameter], lr=0.05), rho=0.3, every=3, alpha=0.6)
    run = spoiled(closure, parameter, {broken: value})
    w = parameter.detach().numpy().copy()
    direction = np.zeros(6)
    for step in range(6):
        g = matrix @ w
        size = np.sqrt(g @ g)
        if step == 0:
            above = matrix @ (w + 0.3 * g / size)
            direction = above - (above @ g) * g / size**2
            w = w - 0.05 * above
        elif step != 3:
            w = w - 0.05 * (g + 0.6 * size / np.sqrt(direction @ direction) * direction)
        optimizer.step(run)
    assert parameter.detach().numpy() == pytest.approx(w, rel=1e-8)
    assert optimizer.sam.skipped_steps == 1


def test_looksam_without_a_direction_is_the_base_optimizer(seed: int) -> None:
    matrix, parameter, closure = quadratic(6, seed)
    optimizer = LookSAM(SGD([parameter], lr=0.05), rho=0.3, every=3)
    run = spoiled(closure, parameter, {0: math.nan})
    w = parameter.detach().numpy().copy()
    for step in range(3):
        w = w if step == 0 else w - 0.05 * matrix @ w
        optimizer.step(run)
    assert parameter.detach().numpy() == pytest.approx(w, rel=1e-10)


def test_looksam_s_phase_counts_from_start(seed: int) -> None:
    """Before start and from stop on, a step is the base optimizer's, without a direction."""
    matrix, parameter, closure = quadratic(6, seed)
    base = SGD([parameter], lr=0.05)
    optimizer = LookSAM(base, rho=0.3, every=3, alpha=0.6, start=2, stop=7)
    w = parameter.detach().numpy().copy()
    direction = np.zeros(6)
    for step in range(9):
        g = matrix @ w
        size = np.sqrt(g @ g)
        assert optimizer.sam.ascent_due is (step in (2, 5))
        if step in (2, 5):
            above = matrix @ (w + 0.3 * g / size)
            direction = above - (above @ g) * g / size**2
            w = w - 0.05 * above
        elif 2 < step < 7:
            w = w - 0.05 * (g + 0.6 * size / np.sqrt(direction @ direction) * direction)
        else:
            w = w - 0.05 * g
        optimizer.step(closure)
        assert ("flat_direction" in optimizer.state[parameter]) is (2 <= step < 7)
    assert parameter.detach().numpy() == pytest.approx(w, rel=1e-8)


@pytest.mark.parametrize("change", [{"start": 9}, {"stop": 2}, {"rho": 0.0}], ids=str)
def test_looksam_drops_a_stale_direction(change: dict[str, Any], seed: int) -> None:
    matrix, parameter, closure = quadratic(6, seed)
    optimizer = LookSAM(SGD([parameter], lr=0.05), rho=0.3, every=4)
    for _ in range(2):
        optimizer.step(closure)
    assert "flat_direction" in optimizer.state[parameter]
    optimizer.param_groups[0].update(change)
    w = parameter.detach().numpy().copy()
    optimizer.step(closure)
    assert parameter.detach().numpy() == pytest.approx(w - 0.05 * matrix @ w, rel=1e-10)
    assert "flat_direction" not in optimizer.state[parameter]


def test_looksam_resumes_in_the_middle_of_its_interval(seed: int) -> None:
    """Also from a checkpoint of a version without a counter in SAM, and after a run of SAM."""
    states = []
    for kind in ("whole", "resumed", "old", "groups only"):
        _, parameter, closure = quadratic(6, seed)
        optimizer = LookSAM(SGD([parameter], lr=0.05, momentum=0.9), rho=0.3, every=3)
        for step in range(8):
            if step == 4 and kind != "whole":
                saved = optimizer.state_dict()
                if kind != "resumed":
                    del saved["attempted_steps"]
                if kind == "old":
                    for name in ("attempted_steps", "start", "interval", "stop"):
                        del saved["param_groups"][0][name]
                optimizer = LookSAM(SGD([parameter], lr=0.05, momentum=0.9), rho=0.3, every=3)
                optimizer.load_state_dict(saved)
            optimizer.step(closure)
        states.append(parameter.detach().clone())
    assert all(torch.equal(states[0], other) for other in states[1:])
    plain = SAM([parameter], SGD, lr=0.05, momentum=0.9)
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.every == 3


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_looksam_spreads_no_gradient_that_is_not_finite(value: float, seed: int) -> None:
    """A plain step is skipped like a SAM step: weights, direction and base state do not change."""
    _, parameter, closure = quadratic(6, seed)
    optimizer = LookSAM(SGD([parameter], lr=0.05, momentum=0.9), rho=0.3, every=3)
    optimizer.step(closure)
    before = parameter.detach().clone()
    state = copy.deepcopy(optimizer.state[parameter])
    optimizer.step(spoiled(closure, parameter, {0: value}))
    assert torch.equal(parameter, before)
    assert optimizer.skips_nonfinite_steps
    assert int(optimizer.skipped_steps) == 1
    assert all(torch.equal(optimizer.state[parameter][name], state[name]) for name in state)
    optimizer.step(closure)
    assert not torch.equal(parameter, before)
    assert bool(parameter.isfinite().all())


def test_looksam_accepts_gradients_that_come_and_go() -> None:
    """One parameter has none at the SAM step, the other one none after it."""
    early, late = (nn.Parameter(torch.tensor([x, 2.0], dtype=torch.float64)) for x in (1.0, 3.0))
    optimizer = LookSAM(SGD([early, late], lr=0.1), rho=0.1, every=3)
    used = early

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = used.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    before, used = early.detach().clone(), late
    optimizer.step(closure)
    assert torch.equal(early, before)
    torch.testing.assert_close(late.detach(), 0.8 * torch.tensor([3.0, 2.0], dtype=torch.float64))
    optimizer.step(closure)
    late.grad = None
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        optimizer.step(lambda: torch.zeros(()))
    torch.testing.assert_close(late.detach(), 0.64 * torch.tensor([3.0, 2.0], dtype=torch.float64))
    assert optimizer.steps_taken == 3


@pytest.mark.parametrize("base", [torch.optim.RMSprop, torch.optim.NAdam, torch.optim.Adam])
def test_looksam_on_bases_that_initialize_empty_state(base: type[Optimizer], seed: int) -> None:
    """Their first update, here after a skipped one, must not mistake the direction for initialized state."""
    _, parameter, closure = quadratic(4, seed)
    optimizer = LookSAM(base([parameter], lr=0.01), every=2)  # type: ignore[call-arg]
    run = spoiled(closure, parameter, {0: math.nan})
    before = parameter.detach().clone()
    optimizer.step(run)
    assert torch.equal(parameter, before)
    alone = nn.Parameter(before.clone())
    optimizer.step(run)
    alone.grad = parameter.grad
    base([alone], lr=0.01).step()  # type: ignore[call-arg]
    torch.testing.assert_close(parameter, alone)
    optimizer.step(run)
    assert "flat_direction" in optimizer.state_dict()["state"][0]


def test_looksam_with_every_1_equals_sam() -> None:
    finals = []
    for build in (
        lambda sgd: LookSAM(sgd, rho=0.1, every=1),
        lambda sgd: SAM(optimizer=sgd, rho=0.1, closure="both_passes"),
    ):
        model, inputs, targets = problem()
        optimizer = build(SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01))
        for _ in range(5):
            optimizer.step(closure_of(optimizer, model, inputs, targets))
        finals.append(weights(model))
    assert all(torch.equal(a, b) for a, b in zip(*finals, strict=True))


@pytest.mark.parametrize(
    "build",
    [
        lambda sgd: PGD(sgd, sigma=-1.0),
        lambda sgd: PGD(sgd, sigma=math.nan),
        lambda sgd: PGD(sgd, sigma=1.0, noise_on="loss"),
        lambda sgd: LPFSGD(sgd, gamma=math.inf),
        lambda sgd: LPFSGD(sgd, parts=0),
        lambda sgd: EntropySGD(sgd, alpha=1.5),
        lambda sgd: EntropySGD(sgd, steps=0),
        lambda sgd: LookSAM(sgd, every=0),
        lambda sgd: LookSAM(sgd, rho=-0.1),
    ],
)
def test_options_out_of_range_are_refused(build: Build) -> None:
    with pytest.raises(ValueError, match=r"must be"):
        build(SGD([nn.Parameter(torch.zeros(1))], lr=0.1))


OPTIONS: dict[str, tuple[Build, Build]] = {
    "pgd": (lambda sgd: PGD(sgd, sigma=0.1), lambda sgd: PGD(sgd, sigma=0.2)),
    "lpf": (lambda sgd: LPFSGD(sgd, gamma=0.1), lambda sgd: LPFSGD(sgd, gamma=0.002)),
    "entropy": (lambda sgd: EntropySGD(sgd, alpha=0.5), lambda sgd: EntropySGD(sgd, alpha=0.75)),
    "looksam": (lambda sgd: LookSAM(sgd, alpha=0.5), lambda sgd: LookSAM(sgd, alpha=0.7)),
    "looksam rho": (lambda sgd: LookSAM(sgd, rho=0.5), lambda sgd: LookSAM(sgd, rho=0.05)),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_values_of_an_earlier_wrapper_win(name: str) -> None:
    first, other = OPTIONS[name]
    sgd = SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    first(sgd)
    before = dict(sgd.param_groups[0])
    assert other(sgd).param_groups[0] == before
    assert first(sgd).param_groups[0] == before


class OwnSigma(SGD):
    """An optimizer with its own sigma."""

    def __init__(self, params: Any, sigma: float = 3.0) -> None:
        super().__init__(params, lr=0.1)
        self.defaults["sigma"] = self.param_groups[0]["sigma"] = sigma


def test_a_base_with_an_option_of_the_same_name_is_refused_by_all() -> None:
    base = OwnSigma([nn.Parameter(torch.zeros(1))])
    before = dict(base.param_groups[0])
    with pytest.raises(ValueError, match="OwnSigma and PGD both have an option named 'sigma'"):
        PGD(base, sigma=0.1)
    with pytest.raises(ValueError, match="both have an option named 'rho'"):
        LookSAM(torch.optim.Adadelta([nn.Parameter(torch.zeros(1))]))
    assert base.param_groups[0] == before
    # RMSprop's alpha is the decay of its squares, not Entropy-SGD's alpha.
    EntropySGD(torch.optim.RMSprop([nn.Parameter(torch.zeros(1))], alpha=0.9), alpha=0.5)


def test_two_wrappers_of_one_base_read_their_own_options() -> None:
    sgd = SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    LPFSGD(sgd)
    EntropySGD(sgd)
    (group,) = sgd.param_groups
    assert (group["lpf_gamma"], group["entropy_gamma"]) == (0.002, 0.03)


class OwnAlpha(SGD):
    """An optimizer with its own look_alpha."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.defaults["look_alpha"] = self.param_groups[0]["look_alpha"] = 0.5


@pytest.mark.parametrize("options", [{"alpha": -1.0}, {"every": 0}, {"rho": -1.0}, {}])
def test_a_refused_looksam_leaves_the_groups_alone(options: dict[str, Any]) -> None:
    kind = functools.partial(SGD, lr=0.1) if options else OwnAlpha
    base = kind([nn.Parameter(torch.zeros(1))])
    before, defaults = dict(base.param_groups[0]), dict(base.defaults)
    with pytest.raises(ValueError, match=next(iter(options), "look_alpha")):
        LookSAM(base, **options)
    assert base.param_groups[0] == before
    assert base.defaults == defaults


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda sgd: LPFSGD(sgd, gamma=-1.0), "published: 0.002 for ResNets on CIFAR"),
        (lambda sgd: EntropySGD(sgd, alpha=1.5), "published: 0.75, section 4.2 of Chaudhari"),
        (lambda sgd: LookSAM(sgd, every=0), "published: 5 to 10, Liu et al. 2022"),
    ],
)
def test_errors_name_a_published_value(build: Build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(SGD([nn.Parameter(torch.zeros(1))], lr=0.1))


@pytest.mark.parametrize("kind", [LPFSGD, PGD, EntropySGD, LookSAM])
def test_every_argument_of_a_variant_is_declared(kind: type) -> None:
    """LookSAM's rho, policy and process group are checked by SAM."""
    of_sam = {"optimizer", "rho", "start", "stop", "first_attempt", "process_group"}
    arguments = inspect.signature(kind).parameters.keys() - of_sam
    assert arguments == kind.declared.keys()


def test_looksam_weighs_the_direction_by_the_alpha_of_the_group() -> None:
    """With the same gradients, only the reused direction differs, in proportion to alpha."""

    def weights(alphas: tuple[float, float]) -> list[Tensor]:
        parameters = [nn.Parameter(torch.tensor([1.0, 2.0])) for _ in alphas]
        groups = [
            {"params": [parameter], "look_alpha": alpha}
            for parameter, alpha in zip(parameters, alphas, strict=True)
        ]
        optimizer = LookSAM(SGD(groups, lr=0.1), rho=0.1, every=2)
        for _ in range(2):
            for _ in optimizer.passes():
                optimizer.zero_grad()
                sum(parameter.pow(4).sum() for parameter in parameters).backward()
        return [parameter.detach() for parameter in parameters]

    (a0, b0), (a1, b1), (a2, b2) = (weights((0.3, alpha)) for alpha in (0.0, 1.0, 2.0))
    assert torch.equal(a0, a1)
    assert torch.equal(a0, a2)
    assert not torch.equal(b0, b1)
    assert torch.allclose(b2 - b0, 2 * (b1 - b0), rtol=1e-3)


def test_looksam_refuses_a_mixture_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSAM_KERNELS", "torch")
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, device="meta"))]
    optimizer = LookSAM(SGD(parameters, lr=0.1))
    steps = optimizer.passes()
    next(steps)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ValueError, match="one device"):
        next(steps)
    assert torch.equal(parameters[0], torch.ones(2))


@pytest.mark.parametrize("scale", [1.0, 1e-5, 1e-9])
def test_looksam_direction_is_orthogonal_at_any_scale(scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second = scale * torch.randn(2, 50, generator=generator, dtype=torch.float64)
    parameter = nn.Parameter(torch.zeros(50, dtype=torch.float64))
    optimizer = LookSAM(SGD([parameter], lr=0.1), rho=0.1, every=3)
    for _, gradient in zip(optimizer.passes(), (first, second), strict=True):
        parameter.grad = gradient.clone()
    direction = optimizer.state[parameter]["flat_direction"]
    cosine = direction @ first / (direction.norm() * first.norm())
    assert abs(float(cosine)) < 1e-12


def test_looksam_computes_no_norm_that_it_does_not_use(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    norm = looksam._norm
    monkeypatch.setattr(looksam, "_norm", lambda tensors: (called.append(1), norm(tensors))[1])
    parameter = nn.Parameter(torch.ones(3))
    optimizer = LookSAM(SGD([parameter], lr=0.1), rho=0.1, every=2, start=2, stop=4)
    counts = []
    for _ in range(6):
        for _ in optimizer.passes():
            parameter.grad = torch.ones(3)
        counts.append(len(called))
        called.clear()
    assert [count > 0 for count in counts] == [False, False, True, True, False, False]


@pytest.mark.parametrize("name", ["pgd gradient", "entropy", "looksam"])
@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_gradients_that_cannot_be_used_are_named(name: str, kind: str) -> None:
    dtype = torch.complex64 if kind == "complex" else torch.float32
    weight = nn.Parameter(torch.ones(4, 2, dtype=dtype))
    optimizer = BUILDERS[name](SGD([weight], lr=0.1))

    def closure() -> Tensor:
        weight.grad = torch.ones(4, 2, dtype=dtype)
        if kind == "sparse":
            weight.grad = weight.grad.to_sparse()
        return torch.zeros(())

    match = "to_dense" if kind == "sparse" else "complex64; expected float32"
    with pytest.raises(ValueError, match=match):
        optimizer.step(closure)
    assert (weight == 1).all()
