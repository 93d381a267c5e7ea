"""Checkpoints, copies and pickles: an interrupted run equals an uninterrupted one."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp

from fastsam import SAM
from fastsam.optim.plain import PlainSAM
from fastsam.optim.variants.looksam import LookSAM
from fastsam.optim.variants.pgd import PGD
from python_tests.optim.trajectories import OracleSAM, Problem, assert_close, assert_same_bits, make

SHAPES = [(3, 5), (7,), (), (0,), (2, 3, 4)]
BASES = [
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    (torch.optim.Adam, {"lr": 0.05}),
    (torch.optim.AdamW, {"lr": 0.05, "amsgrad": True}),
    (torch.optim.RMSprop, {"lr": 0.02}),
]


@pytest.fixture(params=BASES, ids=lambda case: "-".join([case[0].__name__, *case[1]]))
def base(request):
    return request.param


def through_a_file(value: Any) -> Any:
    """Save an object with ``torch.save`` and load it with the safe ``torch.load``."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def continued(problem, base, first, parameters, state, *, kind=SAM):
    """Run steps 4 to 7 with a new optimizer over copies of ``parameters`` that loads ``state``."""
    twins = [nn.Parameter(p.detach().clone()) for p in parameters]
    optimizer = kind([{"params": twins}], base[0], rho=0.1, **base[1])
    (optimizer if kind is SAM else optimizer.base_optimizer).load_state_dict(state)
    return problem.run(optimizer, twins, range(4, 8))


def halfway(problem, base, kind=SAM):
    optimizer, parameters = make(kind, problem, base[0], rho=0.1, **base[1])
    problem.run(optimizer, parameters, 4)
    return optimizer, parameters


def test_own_checkpoint(base, seed):
    problem = Problem(SHAPES, seed=seed)
    optimizer, parameters = halfway(problem, base)
    state = through_a_file(optimizer.state_dict())
    found = continued(problem, base, optimizer, parameters, state)
    assert_same_bits(found, problem.run(optimizer, parameters, range(4, 8)))


def test_loading_into_a_used_optimizer_replaces_its_state(base, seed):
    problem = Problem(SHAPES, seed=seed)
    optimizer, parameters = halfway(problem, base)
    saved = through_a_file(optimizer.state_dict())
    weights = [p.detach().clone() for p in parameters]
    expected = problem.run(optimizer, parameters, range(4, 8))
    with torch.no_grad():
        for p, w in zip(parameters, weights, strict=True):
            p.copy_(w)
    optimizer.load_state_dict(saved)
    assert_same_bits(problem.run(optimizer, parameters, range(4, 8)), expected)


def test_torch_loads_the_state_of_a_run(base, seed):
    """Plain PyTorch resumes our checkpoint."""
    problem = Problem(SHAPES, seed=seed)
    optimizer, parameters = halfway(problem, base)
    found = continued(
        problem, base, optimizer, parameters, through_a_file(optimizer.state_dict()), kind=PlainSAM
    )
    assert_close(found, problem.run(optimizer, parameters, range(4, 8)), 1e-5)


def test_a_base_checkpoint_of_torch(base, seed):
    problem = Problem(SHAPES, seed=seed)
    plain, parameters = halfway(problem, base, PlainSAM)
    state = through_a_file(plain.base_optimizer.state_dict())
    for group in state["param_groups"]:  # as torch.optim would have written it
        del group["rho"], group["adaptive"]
    found = continued(problem, base, plain, parameters, state)
    assert_close(found, problem.run(plain, parameters, range(4, 8)), 1e-5)


def test_a_checkpoint_of_the_reference_implementation(base, seed):
    """It has copies of the weights and no momentum: training resumes without momentum, as it does there."""
    problem = Problem(SHAPES, seed=seed)
    plain, parameters = halfway(problem, base, PlainSAM)
    twins = [nn.Parameter(p.detach().clone()) for p in parameters]
    reference = PlainSAM([{"params": twins}], base[0], rho=0.1, **base[1])
    old = reference.state_dict()
    old["state"] = {
        i: {"old_p": torch.randn_like(p), "e_w": torch.randn_like(p)} for i, p in enumerate(twins)
    }
    found = continued(problem, base, plain, parameters, through_a_file(old))
    assert_close(found, problem.run(reference, twins, range(4, 8)), 1e-5)


class EightBit(torch.optim.Optimizer):
    """An optimizer with 8-bit momentum, which torch would load as float32, like bitsandbytes and torchao."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                codes = self.state[p].get("codes", torch.full_like(p, 128, dtype=torch.uint8))
                assert codes.dtype is torch.uint8
                momentum = 0.9 * (codes.float() - 128) / 16 + p.grad
                p.sub_(group["lr"] * momentum)
                self.state[p]["codes"] = (momentum * 16 + 128).round().clamp(0, 255).byte()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "bits": 8}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert state_dict["bits"] == 8
        super().load_state_dict(state_dict)
        for entry in self.state.values():
            entry["codes"] = entry["codes"].byte()


@pytest.mark.parametrize("wrap", [SAM, PGD], ids=lambda kind: kind.__name__)
def test_a_base_saves_and_loads_in_its_own_way(wrap, seed):
    problem = Problem([(4, 3), (5,)], seed=seed)

    def build(parameters: list[nn.Parameter]) -> Any:
        base = EightBit(parameters, lr=0.05)
        return SAM(optimizer=base) if wrap is SAM else PGD(base, sigma=0.1)

    def run(optimizer: Any, parameters: list[nn.Parameter], steps: range) -> list[torch.Tensor]:
        if wrap is SAM:
            return problem.run(optimizer, parameters, steps)
        for step in steps:
            optimizer.step(lambda s=step: problem.set_gradients(parameters, s, 0))
        return [p.detach().clone() for p in parameters]

    parameters = problem.parameters()
    optimizer = build(parameters)
    run(optimizer, parameters, range(3))
    saved = through_a_file(optimizer.state_dict())
    assert saved["bits"] == 8
    twins = [nn.Parameter(p.detach().clone()) for p in parameters]
    resumed = build(twins)
    resumed.load_state_dict(saved)
    assert resumed.state is resumed.base_optimizer.state
    found = run(resumed, twins, range(3, 6))
    assert_same_bits(found, run(optimizer, parameters, range(3, 6)))


@pytest.mark.parametrize(
    "wrap", [lambda base: SAM(optimizer=base), lambda base: PGD(base, sigma=0)], ids=["SAM", "PGD"]
)
def test_hooks_of_both_fire_when_saving_and_loading(wrap):
    """Hooks of the outer optimizer run around those of the base, and their results are used."""
    outer = wrap(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1))
    seen = []
    for name, one in (("outer", outer), ("base", outer.base_optimizer)):
        one.register_state_dict_pre_hook(lambda _, n=name: seen.append(f"{n} saves"))
        one.register_state_dict_post_hook(lambda _, saved, n=name: {**saved, n: True})
        one.register_load_state_dict_pre_hook(
            lambda _, saved, n=name: seen.append(f"{n} loads {saved.pop(n)}")
        )
        one.register_load_state_dict_post_hook(lambda _, n=name: seen.append(f"{n} loaded"))
    saved = outer.state_dict()
    assert {"outer", "base"} < saved.keys()
    outer.load_state_dict(saved)
    assert seen[:4] == ["outer saves", "base saves", "outer loads True", "base loads True"]
    assert seen[4:] == ["base loaded", "outer loaded"]
    assert "outer" in saved  # hooks work on a copy


def test_loading_an_unfit_state_changes_nothing(base, seed):
    problem = Problem(SHAPES, seed=seed)
    optimizer, parameters = halfway(problem, base)
    groups, state = optimizer.param_groups, optimizer.state
    good = optimizer.state_dict()
    fewer = {**good, "param_groups": [{**good["param_groups"][0], "params": [0]}]}
    for bad in (
        fewer,
        {**good, "param_groups": []},
        {**good, "param_groups": fewer["param_groups"] * 2},
    ):
        with pytest.raises(ValueError, match="parameter group"):
            optimizer.load_state_dict(bad)
        assert optimizer.param_groups is groups
        assert optimizer.state is state
    twin, twins = halfway(problem, base)
    assert_same_bits(
        problem.run(optimizer, parameters, range(4, 6)), problem.run(twin, twins, range(4, 6))
    )


def test_looksam_saves_no_momentum_before_the_first_update(seed):
    """Like the SAM that it wraps."""
    p = nn.Parameter(torch.ones(3))
    optimizer = LookSAM(torch.optim.SGD([p], lr=0.1, momentum=0.9, dampening=0.5))

    def closure() -> torch.Tensor:
        p.grad = torch.full((3,), float("nan"))
        return torch.zeros(())

    optimizer.step(closure)
    assert optimizer.state_dict()["state"][0]["momentum_buffer"] is None


def test_momentum_buffers_may_be_none(seed):
    problem = Problem(SHAPES, seed=seed)
    base = (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5})
    optimizer, parameters = make(SAM, problem, base[0], rho=0.1, **base[1])
    state = optimizer.state_dict()
    state["state"] = {i: {"momentum_buffer": None} for i in range(len(SHAPES))}
    optimizer.load_state_dict(state)
    twin = make(SAM, problem, base[0], rho=0.1, **base[1])
    assert_same_bits(problem.run(optimizer, parameters, 3), problem.run(*twin, 3))


@pytest.mark.parametrize("rebuild", [False, True])
def test_a_first_update_that_was_skipped_leaves_no_momentum(rebuild, seed):
    """Torch's first update copies the gradient without dampening, also after a skipped step."""
    problem = Problem([(4,), (3,)], seed=seed)
    base = (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5})
    optimizer, parameters = make(SAM, problem, base[0], rho=0.1, **base[1])
    problem.run(optimizer, parameters, 1, lambda *_: float("nan"))
    if rebuild:
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    else:
        assert all(
            entry["momentum_buffer"] is None for entry in optimizer.state_dict()["state"].values()
        )
        optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    found = problem.run(optimizer, parameters, range(1, 3))
    expected = problem.run(*make(SAM, problem, base[0], rho=0.1, **base[1]), range(1, 3))
    assert_same_bits(found, expected)


def test_state_has_no_weights_and_shares_everything_with_the_base(base, seed):
    problem = Problem(SHAPES, seed=seed)
    optimizer, _ = halfway(problem, base)
    twin, _ = halfway(problem, base, PlainSAM)
    for _ in range(2):
        assert optimizer.param_groups is optimizer.base_optimizer.param_groups
        assert optimizer.state is optimizer.base_optimizer.state
        assert optimizer.ascent.param_groups is optimizer.param_groups
        expected = twin.base_optimizer.state_dict()["state"]
        found = optimizer.state_dict()["state"]
        assert {i: set(entry) for i, entry in found.items()} == {
            i: set(entry) for i, entry in expected.items()
        }
        optimizer.load_state_dict(through_a_file(optimizer.state_dict()))


def test_replaced_cleared_and_edited_state_is_noticed(seed):
    """The kernels cache addresses of state, which users may replace."""
    problem = Problem([(4,), (5,)], seed=seed)
    optimizer, parameters = make(SAM, problem, torch.optim.SGD, lr=0.1, momentum=0.9)
    oracle, twins = make(OracleSAM, problem, torch.optim.SGD, lr=0.1, momentum=0.9)
    for runner, given in ((optimizer, parameters), (oracle, twins)):
        problem.run(runner, given, 2)
    optimizer.state.clear()
    oracle.base.state.clear()
    for runner, given in ((optimizer, parameters), (oracle, twins)):
        problem.run(runner, given, range(2, 4))
    optimizer.state[parameters[0]]["momentum_buffer"] = torch.full((4,), 0.25)
    oracle.base.state[oracle.doubles[0]]["momentum_buffer"] = torch.full((4,), 0.25).double()
    found, expected = (
        problem.run(runner, given, range(4, 6))
        for runner, given in ((optimizer, parameters), (oracle, twins))
    )
    assert_close(found, expected, 1e-5)


def test_a_replaced_step_counter_is_noticed(seed):
    problem = Problem([(4,)], seed=seed)
    results = []
    for kind in (SAM, PlainSAM):
        optimizer, parameters = make(kind, problem, torch.optim.Adam, lr=0.1)
        problem.run(optimizer, parameters, 2)
        optimizer.base_optimizer.state[parameters[0]]["step"] = torch.tensor(40.0)
        results.append(problem.run(optimizer, parameters, range(2, 4)))
    assert_close(*results, 1e-5)


@pytest.mark.parametrize("which", [[0], [0, 1]], ids=["one", "all"])
@pytest.mark.parametrize(
    ("base", "options"),
    [(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), (torch.optim.Adam, {"lr": 0.1})],
    ids=["SGD", "Adam"],
)
def test_replaced_storage_of_state_is_noticed(base, options, which, seed):
    """Offloading assigns to ``.data``: the tensor object stays, and its old memory is freed."""
    problem = Problem([(4,), (5,)], seed=seed)
    results, states = [], []
    for kind in (SAM, PlainSAM):
        optimizer, parameters = make(kind, problem, base, **options)
        problem.run(optimizer, parameters, 2)
        for i in which:
            for value in optimizer.base_optimizer.state[parameters[i]].values():
                value.data = value.detach() * 0.5 + 0.25
        results.append(problem.run(optimizer, parameters, range(2, 4)))
        entries = [optimizer.base_optimizer.state[p] for p in parameters]
        states.append([entry[key] for entry in entries for key in sorted(entry)])
    assert_close(*results, 1e-5)
    assert_close(*states, 1e-5)


def test_empty_parameters_count_their_updates(seed):
    """An empty shard's counter is saved for the shards that are not empty."""
    problem = Problem([(0,), (4,)], seed=seed)
    optimizer, parameters = make(SAM, problem, torch.optim.Adam, lr=0.1)
    problem.run(optimizer, parameters, 3)
    assert [float(optimizer.state[p]["step"]) for p in parameters] == [3.0, 3.0]


def test_state_in_another_layout_is_converted(seed):
    problem = Problem([(4, 6)], seed=seed)
    optimizer, parameters = make(SAM, problem, torch.optim.SGD, lr=0.1, momentum=0.9)
    twin = make(SAM, problem, torch.optim.SGD, lr=0.1, momentum=0.9)
    problem.run(optimizer, parameters, 2)
    problem.run(*twin, 2)
    entry = optimizer.state[parameters[0]]
    entry["momentum_buffer"] = entry["momentum_buffer"].t().contiguous().t()
    assert_same_bits(
        problem.run(optimizer, parameters, range(2, 4)), problem.run(*twin, range(2, 4))
    )


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_state_that_does_not_fit_is_refused_every_time(base, seed):
    problem = Problem([(4,), (3,)], seed=seed)
    options = {"lr": 0.1, "momentum": 0.9} if base is torch.optim.SGD else {"lr": 0.1}
    optimizer, parameters = make(SAM, problem, base, **options)
    problem.run(optimizer, parameters, 1)
    before = [p.detach().clone() for p in parameters]
    key = "momentum_buffer" if base is torch.optim.SGD else "exp_avg_sq"
    good = optimizer.state[parameters[1]][key]
    optimizer.state[parameters[1]][key] = torch.ones(2)
    problem.set_gradients(parameters, 1, 0)
    optimizer.first_step()
    problem.set_gradients(parameters, 1, 1)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"optimizer state of shape \(2,\)"):
            optimizer.second_step()
    optimizer.restore()
    assert_same_bits([p.detach() for p in parameters], before)
    optimizer.state[parameters[1]][key] = good
    twin, twins = make(SAM, problem, base, **options)
    problem.run(twin, twins, 1)
    assert_same_bits(
        problem.run(optimizer, parameters, range(1, 3)), problem.run(twin, twins, range(1, 3))
    )


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))])
def test_copies_are_independent(base, copier, seed):
    problem = Problem(SHAPES, seed=seed)
    optimizer, parameters = halfway(problem, base)
    twins, twin = copier((parameters, optimizer))
    assert twin.param_groups is twin.base_optimizer.param_groups
    assert all(
        a is b
        for a, b in zip(
            twins, [p for group in twin.param_groups for p in group["params"]], strict=True
        )
    )
    before = [p.detach().clone() for p in parameters]
    found = problem.run(twin, twins, range(4, 8))
    assert_same_bits([p.detach() for p in parameters], before)
    assert_same_bits(found, problem.run(optimizer, parameters, range(4, 8)))


def test_add_param_group_mid_run(base, seed):
    problem = Problem(SHAPES, seed=seed)
    late = Problem([(5,)], seed=seed + 1)
    results = []
    for through_base in (False, True, None):
        kind = PlainSAM if through_base is None else SAM
        optimizer, parameters = make(kind, problem, base[0], rho=0.1, **base[1])
        problem.run(optimizer, parameters, 2)
        new = late.parameters()
        adder = optimizer.base_optimizer if through_base in (True, None) else optimizer
        settings = {} if through_base else {"rho": 0.4}
        adder.add_param_group({"params": new, "rho": 0.1, **({"adaptive": False} | settings)})
        assert optimizer.param_groups[-1]["lr"] == base[1]["lr"]
        optimizer.param_groups[-1]["rho"] = 0.4
        everything = Problem([*SHAPES, (5,)], seed=seed)
        results.append(everything.run(optimizer, [*parameters, *new], range(2, 5)))
    assert_same_bits(results[0], results[1])
    assert_close(results[0], results[2], 1e-5)


def test_a_group_added_to_the_base_gets_sams_defaults(seed):
    optimizer = SAM([nn.Parameter(torch.ones(2))], torch.optim.SGD, rho=0.3, adaptive=True, lr=0.1)
    optimizer.base_optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert optimizer.param_groups[-1]["rho"] == 0.3
    assert optimizer.param_groups[-1]["adaptive"] is True


def test_the_skip_counter_survives_new_groups_and_loading(seed):
    problem = Problem([(4,)], seed=seed)
    optimizer, parameters = make(SAM, problem, torch.optim.SGD, lr=0.1)
    problem.run(optimizer, parameters, 2, lambda *_: float("nan"))
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    problem.run(optimizer, parameters, 1, lambda *_: float("nan"))
    assert int(optimizer.skipped_steps) == 3


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("adam", [False, True])
def test_distributed_checkpoint_saves_and_loads(momentum, adam, seed):
    """Also into an optimizer that has made no step: torch fills its state by a step with lr 0."""
    torch.manual_seed(seed)
    options = {"lr": 0.1} if adam else {"lr": 0.1, "momentum": momentum}
    base = torch.optim.AdamW if adam else torch.optim.SGD

    def build() -> tuple[nn.Module, SAM]:
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
        return model, SAM(model.parameters(), base, rho=0.1, **options)

    def run(model: nn.Module, optimizer: SAM, steps: int) -> list[torch.Tensor]:
        for step in range(steps):
            x = torch.arange(12.0).reshape(3, 4).sin() + step
            for finish in (optimizer.first_step, optimizer.second_step):
                model(x).square().mean().backward()
                finish(zero_grad=True)
        return [p.detach().clone() for p in model.parameters()]

    model, optimizer = build()
    assert dcp.get_optimizer_state_dict(*build())  # of a fresh optimizer
    run(model, optimizer, 3)
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer))
    other, fresh = build()
    other.load_state_dict(model.state_dict())
    dcp.set_optimizer_state_dict(other, fresh, saved)
    assert_same_bits(run(other, fresh, 3), run(model, optimizer, 3))


@pytest.mark.parametrize(
    "variant", [lambda base: LookSAM(base, every=2), lambda base: PGD(base, sigma=0.1)]
)
def test_distributed_checkpoint_of_variants(variant, seed):
    torch.manual_seed(seed)

    def build() -> tuple[nn.Module, Any]:
        model = nn.Linear(4, 2)
        return model, variant(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))

    def run(model: nn.Module, optimizer: Any, steps: int) -> list[torch.Tensor]:
        for _ in range(steps):
            for _ in optimizer.passes():
                optimizer.zero_grad()
                model(torch.arange(12.0).reshape(3, 4).sin()).square().mean().backward()
        return [p.detach().clone() for p in model.parameters()]

    model, optimizer = build()
    assert dcp.get_optimizer_state_dict(*build())  # of a fresh optimizer
    run(model, optimizer, 4)  # the next step of LookSAM finds a new direction
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer))
    other, fresh = build()
    other.load_state_dict(model.state_dict())
    dcp.set_optimizer_state_dict(other, fresh, saved)
    assert_same_bits(run(other, fresh, 3), run(model, optimizer, 3))
    with pytest.raises(TypeError, match="needs a closure"):
        build()[1].step()


@pytest.mark.parametrize("later", ["save", "copy", "new group"])
def test_a_momentum_loaded_into_the_base_after_prepare_is_kept(later, seed):
    p = nn.Parameter(torch.ones(3))
    plain = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    p.grad = torch.full((3,), 2.0)
    plain.step()
    optimizer = SAM([nn.Parameter(torch.ones(3))], torch.optim.SGD, lr=0.1, momentum=0.9)
    optimizer.prepare()
    optimizer.base_optimizer.load_state_dict(plain.state_dict())
    if later == "save":
        kept = optimizer.state_dict()["state"][0]
    elif later == "copy":
        (kept,) = copy.deepcopy(optimizer).state.values()
    else:
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
        optimizer.prepare()
        (kept, _) = optimizer.state.values()
    assert kept["momentum_buffer"].tolist() == [2.0, 2.0, 2.0]


def test_a_learning_rate_of_zero_does_not_excuse_a_missing_first_step(seed):
    """Warm-up often starts at 0: only a step that would merely create state passes."""
    problem = Problem([(4,)], seed=seed)
    optimizer, parameters = make(SAM, problem, torch.optim.SGD, lr=0.0, momentum=0.9)
    with pytest.raises(RuntimeError, match="first_step"):
        optimizer.step()
    problem.set_gradients(parameters, 0, 0)
    with pytest.raises(RuntimeError, match="first_step"):
        optimizer.step()
    assert not optimizer.state
    problem.run(optimizer, parameters, 1)
    parameters[0].grad = torch.zeros(4)  # would create nothing: the state is there
    with pytest.raises(RuntimeError, match="first_step"):
        optimizer.step()
