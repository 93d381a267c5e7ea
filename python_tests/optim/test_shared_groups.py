"""Groups and state that an optimizer shares with its base, when either is replaced, loaded or copied."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR

from fastsam import SAM
from fastsam.optim import LPFSGD, PGD, EntropySGD, FunctionSchedule, LookSAM, RhoScheduler

COPIERS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
}
OWN: dict[str, tuple[Callable[[Optimizer], Any], dict[str, Any]]] = {
    "sam": (
        lambda base: SAM(optimizer=base, rho=0.2, adaptive=True, eta=0.5),
        {"rho": 0.2, "adaptive": True, "eta": 0.5, "stochastic_rounding": False},
    ),
    "looksam": (
        lambda base: LookSAM(base, rho=0.2, every=2, alpha=0.3),
        {"rho": 0.2, "look_alpha": 0.3, "steps_taken": 2},
    ),
    "pgd": (lambda base: PGD(base, sigma=0.2), {"sigma": 0.2, "steps_taken": 2}),
    "lpf": (lambda base: LPFSGD(base, gamma=0.2), {"lpf_gamma": 0.2, "steps_taken": 2}),
    "entropy": (
        lambda base: EntropySGD(base, steps=2, inner_lr=0.2, noise=0.3),
        {"entropy_lr": 0.2, "entropy_noise": 0.3, "steps_taken": 2},
    ),
    "sam in looksam": (
        lambda base: LookSAM(SAM(optimizer=base, rho=0.2).base_optimizer, alpha=0.3),
        {"rho": 0.2, "look_alpha": 0.3, "steps_taken": 2},
    ),
}


class Deaf(SGD):
    """An optimizer that overrides loading and ignores torch's hooks."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            saved = {**saved, "params": group["params"]}
            self.param_groups = [saved if each is group else each for each in self.param_groups]


def two_parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 2), (4,))]


def groups_of(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": [p]} for p in parameters]


def step(optimizer: Any, scale: float = 1.0) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = [(p * scale).square().sum() for g in optimizer.param_groups for p in g["params"]]
        loss = torch.stack(losses).sum()
        loss.backward()
        return loss

    if isinstance(optimizer, SAM):
        closure()
    optimizer.step(closure)


@pytest.fixture(params=OWN)
def member(request: Any) -> tuple[Callable[[Optimizer], Any], dict[str, Any]]:
    return OWN[request.param]


@pytest.mark.parametrize("kind", [SGD, Deaf])
def test_own_options_survive_loading_into_the_base(member: Any, kind: Any) -> None:
    """As when a run that began without SAM is resumed through the base optimizer."""
    make, own = member
    plain = SGD(groups_of(two_parameters()), lr=0.03, momentum=0.9)
    step(plain)
    base = kind(groups_of(two_parameters()), lr=0.1)
    optimizer = make(base)
    for _ in range(2):
        step(optimizer)
    radii = (
        RhoScheduler(optimizer, FunctionSchedule(lambda epoch: 0.2 + (epoch - 1)))
        if "rho" in own
        else None
    )
    optimizer.param_groups[1]["own"] = "user"
    changed = next(iter(own))
    optimizer.param_groups[1][changed] = True if changed == "adaptive" else 0.7
    base.load_state_dict(plain.state_dict())
    saved = optimizer.state_dict()["param_groups"]
    for groups in (saved, optimizer.param_groups, base.param_groups):
        assert [group["lr"] for group in groups] == [0.03, 0.03]
        assert {name: groups[0][name] for name in own} == own
        assert groups[1][changed] == (True if changed == "adaptive" else 0.7)
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    if radii is not None:
        radii.step()
        assert [group["rho"] for group in base.param_groups] == [1.2, 1.2]
    step(optimizer)


def test_a_run_continues_with_sam_unchanged(seed: int) -> None:
    """The same weights as a SAM that loaded the plain state itself."""
    plain_parameters = two_parameters(seed)
    plain = SGD(groups_of(plain_parameters), lr=0.1, momentum=0.9)
    for _ in range(3):
        step(plain)
    found = []
    for through_base in (True, False):
        parameters = copy.deepcopy(plain_parameters)
        optimizer = SAM(optimizer=SGD(groups_of(parameters), lr=7.0, momentum=0.1), rho=0.2)
        loaded = optimizer.base_optimizer if through_base else optimizer
        loaded.load_state_dict(copy.deepcopy(plain.state_dict()))  # torch shares its tensors
        for _ in range(3):
            step(optimizer)
        found.append(parameters)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("which", ["outer", "base"])
def test_assigned_groups_are_followed(member: Any, which: str) -> None:
    make, _ = member
    parameters = two_parameters()
    optimizer = make(SGD(groups_of(parameters), lr=0.1, momentum=0.9))
    for _ in range(2):
        step(optimizer)
    before = [p.detach().clone() for p in parameters]
    kept = {**optimizer.param_groups[1], "lr": 0.0}
    target = optimizer if which == "outer" else optimizer.base_optimizer
    target.param_groups = [kept]
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups
    assert optimizer.param_groups[0] is kept
    step(optimizer)
    assert torch.equal(parameters[0], before[0])  # is in no group
    assert torch.equal(parameters[1], before[1])  # has no learning rate
    kept["lr"] = 0.1
    step(optimizer)
    assert torch.equal(parameters[0], before[0])
    assert not torch.equal(parameters[1], before[1])


def test_assigned_groups_inherit_missing_options(member: Any) -> None:
    make, own = member
    optimizer = make(SGD(groups_of(two_parameters()), lr=0.1, momentum=0.9))
    for _ in range(2):
        step(optimizer)
    fresh = two_parameters(1)
    optimizer.param_groups = [{"params": [p]} for p in fresh]
    assert {name: optimizer.param_groups[0][name] for name in own} == own
    assert optimizer.param_groups[1]["momentum"] == 0.9
    before = [p.detach().clone() for p in fresh]
    step(optimizer)
    assert not any(torch.equal(a, b) for a, b in zip(before, fresh, strict=True))


def test_groups_may_be_added_through_either_object(member: Any) -> None:
    make, own = member
    base = SGD(groups_of(two_parameters()), lr=0.1)
    optimizer = make(base)
    extra = two_parameters(1)
    optimizer.add_param_group({"params": [extra[0]]})
    base.add_param_group({"params": [extra[1]]})
    assert len(optimizer.param_groups) == len(base.param_groups) == 4
    assert all(own.keys() <= group.keys() for group in base.param_groups)
    before = [p.detach().clone() for p in extra]
    step(optimizer)
    assert not any(torch.equal(a, b) for a, b in zip(before, extra, strict=True))


def test_state_and_defaults_are_shared_too(member: Any) -> None:
    make, _ = member
    base = SGD(groups_of(two_parameters()), lr=0.1, momentum=0.9)
    optimizer = make(base)
    step(optimizer)
    optimizer.state = {}
    assert base.state is optimizer.state
    optimizer.defaults = {**optimizer.defaults, "lr": 0.5}
    assert base.defaults["lr"] == 0.5


def test_schedulers_on_either_object_see_every_step(member: Any) -> None:
    """Schedulers warn if they missed a step, and pytest turns warnings into errors."""
    make, _ = member
    for outer in (True, False):
        base = SGD(groups_of(two_parameters()), lr=0.1)
        optimizer = make(base)
        scheduler = StepLR(optimizer if outer else base, 1)
        step(optimizer)
        scheduler.step()
        assert base.param_groups[0]["lr"] == pytest.approx(0.01)


# --- a first update that was skipped ------------------------------------------------------------

BASES: dict[str, Callable[[Any], Optimizer]] = {
    "dampening": lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.7),
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: Adam(p, lr=0.1),
    "amsgrad": lambda p: AdamW(p, lr=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize(
    "kind", [lambda base: SAM(optimizer=base), LookSAM], ids=["sam", "looksam"]
)
@pytest.mark.parametrize("copier", COPIERS)
@pytest.mark.parametrize("base", BASES)
def test_a_copy_before_the_first_update_starts_fresh(base: str, copier: str, kind: Any) -> None:
    """torch does not dampen the first update, and a skipped update does not count as the first."""
    parameters = two_parameters()
    optimizer = kind(BASES[base](groups_of(parameters)))
    step(optimizer, scale=float("nan"))
    twins, twin = COPIERS[copier]((parameters, optimizer))
    expected_parameters = two_parameters()
    expected = kind(BASES[base](groups_of(expected_parameters)))
    if kind is LookSAM:
        for each in (twin, optimizer):
            for group in each.param_groups:
                group["steps_taken"] = group["attempted_steps"] = 0
    for _ in range(3):
        for each in (optimizer, twin, expected):
            step(each)
    for found in (twins, parameters):
        assert all(torch.equal(a, b) for a, b in zip(found, expected_parameters, strict=True))


@pytest.mark.parametrize("copier", COPIERS)
def test_a_copy_knows_which_parameters_were_updated(copier: str) -> None:
    """One parameter was updated; the other had no gradient at first and a broken one later."""
    first, second = parameters = two_parameters()
    optimizer = SAM(parameters, SGD, lr=0.1, momentum=0.9, dampening=0.5)
    for gradients in ((1.0, None), (float("nan"), 1.0)):
        for half in (optimizer.first_step, optimizer.second_step):
            for p, value in zip(parameters, gradients, strict=True):
                p.grad = None if value is None else torch.full_like(p, value)
            half()
    twins, twin = COPIERS[copier]((parameters, optimizer))
    assert torch.is_tensor(twin.state[twins[0]]["momentum_buffer"])
    assert twin.state[twins[1]]["momentum_buffer"] is None
    assert torch.is_tensor(optimizer.state[second]["momentum_buffer"])
    for each, (one, two) in ((optimizer, (first, second)), (twin, twins)):
        before = two.detach().clone()
        for half in (each.first_step, each.second_step):
            one.grad, two.grad = torch.ones_like(one), torch.ones_like(two)
            half()
        torch.testing.assert_close(before - two.detach(), torch.full_like(before, 0.1))


def test_looksam_is_saved_after_a_first_step_that_was_skipped() -> None:
    """The direction is not part of the base's state, and is kept."""
    parameters = two_parameters()
    optimizer = LookSAM(SGD(parameters, lr=0.1, momentum=0.9), every=2)
    step(optimizer, scale=float("nan"))
    twins, twin = copy.deepcopy((parameters, optimizer))
    resumed_parameters = copy.deepcopy(parameters)
    resumed = LookSAM(SGD(resumed_parameters, lr=0.1, momentum=0.9), every=2)
    resumed.load_state_dict(optimizer.state_dict())
    for _ in range(3):
        for each in (optimizer, twin, resumed):
            step(each)
    for found in (twins, resumed_parameters):
        assert all(torch.equal(a, b) for a, b in zip(found, parameters, strict=True))
