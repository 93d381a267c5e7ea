"""All ways of calling the optimizer, and its errors."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, StepLR

from fastsam import SAM
from fastsam.kernels import sam as kernels
from fastsam.optim import PGD, LookSAM
from fastsam.optim.plain import PlainSAM
from python_tests.optim.trajectories import OracleSAM, Problem, assert_close, assert_same_bits, make

SHAPES = [(3, 5), (7,), (), (2, 3, 4)]
BASES = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (torch.optim.AdamW, {"lr": 0.05}),
    (torch.optim.RMSprop, {"lr": 0.02}),
]


@pytest.fixture(params=BASES, ids=lambda case: case[0].__name__)
def base(request):
    return request.param


def weights(parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    return [p.detach().clone() for p in parameters]


# --- step(closure) ------------------------------------------------------------------------------


def test_the_closure_makes_the_second_pass(base, seed):
    problem = Problem(SHAPES, seed=seed)
    optimizer, parameters = make(SAM, problem, base[0], **base[1])
    for step in range(4):
        calls = []

        def closure(step=step, calls=calls) -> float:
            calls.append(torch.is_grad_enabled())
            assert all(p.grad is None for p in parameters)
            problem.set_gradients(parameters, step, 1)
            return 3.5

        problem.set_gradients(parameters, step, 0)
        with torch.no_grad():
            assert optimizer.step(closure) == 3.5
        assert calls == [True]
    expected = problem.run(*make(SAM, problem, base[0], **base[1]), 4)
    assert_same_bits(weights(parameters), expected)


def test_the_closure_may_make_both_passes(base, seed):
    """As in torch.optim: the closure is called for each pass, and the loss of the first is returned."""
    problem = Problem(SHAPES, seed=seed)
    optimizer, parameters = make(SAM, problem, base[0], closure="both_passes", **base[1])
    for step in range(4):
        passes = iter((0, 1))

        def closure(step=step, passes=passes) -> int:
            which = next(passes)
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            problem.set_gradients(parameters, step, which)
            return 10 * step + which

        assert optimizer.step(closure) == 10 * step
        assert next(passes, None) is None
    expected = problem.run(*make(SAM, problem, base[0], **base[1]), 4)
    assert_same_bits(weights(parameters), expected)


def test_a_closure_for_the_second_pass_needs_the_first(base, seed):
    """A closure written for torch.optim would otherwise silently disable SAM."""
    problem = Problem(SHAPES, seed=seed)
    optimizer, parameters = make(SAM, problem, base[0], **base[1])
    calls = []

    def closure() -> None:
        calls.append(1)
        problem.set_gradients(parameters, 0, 1)

    with pytest.raises(RuntimeError, match='closure="both_passes"'):
        optimizer.step(closure)
    assert not calls
    assert_same_bits(weights(parameters), problem.start)
    assert not any(optimizer.state.values())
    problem.set_gradients(parameters, 0, 0, lambda i, s, w: None if i else True)
    optimizer.step(closure)  # one gradient suffices


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("mode", ["second_pass", "both_passes"])
def test_the_weights_are_restored_after_any_error_of_a_closure(error, mode, base, seed):
    problem = Problem(SHAPES, seed=seed)
    optimizer, parameters = make(SAM, problem, base[0], closure=mode, **base[1])
    passes = iter((0, 1) if mode == "both_passes" else (1,))

    def closure() -> None:
        which = next(passes)
        problem.set_gradients(parameters, 0, which)
        if which:
            assert not torch.equal(parameters[0], problem.start[0])
            raise error("in the second pass")

    problem.set_gradients(parameters, 0, 0)
    with pytest.raises(error):
        optimizer.step(closure)
    assert_same_bits(weights(parameters), problem.start)
    assert not any(optimizer.state.values())
    expected = problem.run(*make(SAM, problem, base[0], **base[1]), 2)
    assert_same_bits(problem.run(optimizer, parameters, 2), expected)


def test_the_weights_are_restored_if_a_closure_breaks_a_gradient(seed):
    problem = Problem([(4,)], seed=seed)
    optimizer, parameters = make(SAM, problem, torch.optim.SGD, lr=0.1)

    def closure() -> None:
        parameters[0].grad = torch.zeros(4).to_sparse()

    problem.set_gradients(parameters, 0, 0)
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step(closure)
    assert_same_bits(weights(parameters), problem.start)


def test_the_weights_are_restored_if_the_base_raises(seed):
    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise ArithmeticError

    problem = Problem([(4,)], seed=seed)
    optimizer, parameters = make(SAM, problem, Failing, lr=0.1)
    problem.set_gradients(parameters, 0, 0)
    with pytest.raises(ArithmeticError):
        optimizer.step(lambda: problem.set_gradients(parameters, 0, 1))
    assert_same_bits(weights(parameters), problem.start)


def test_step_without_a_closure_is_the_second_step(base, seed):
    problem = Problem(SHAPES, seed=seed)
    optimizer, parameters = make(SAM, problem, base[0], **base[1])
    for step in range(3):
        problem.set_gradients(parameters, step, 0)
        optimizer.first_step(zero_grad=True)
        problem.set_gradients(parameters, step, 1)
        assert optimizer.step() is None
    expected = problem.run(*make(SAM, problem, base[0], **base[1]), 3)
    assert_same_bits(weights(parameters), expected)


@pytest.mark.parametrize("zero_grad", [False, True])
def test_zero_grad_is_an_option_of_both_halves(zero_grad, seed):
    problem = Problem([(4,)], seed=seed)
    optimizer, parameters = make(SAM, problem, torch.optim.SGD, lr=0.1)
    for phase, finish in enumerate((optimizer.first_step, optimizer.second_step)):
        problem.set_gradients(parameters, 0, phase)
        finish(zero_grad=zero_grad)
        assert (parameters[0].grad is None) is zero_grad


# --- the order of calls -------------------------------------------------------------------------


def test_errors_of_calls_in_the_wrong_order_name_the_fix(base, seed):
    problem = Problem(SHAPES, seed=seed)
    optimizer, parameters = make(SAM, problem, base[0], **base[1])
    problem.set_gradients(parameters, 0, 0)
    for call in (optimizer.second_step, optimizer.step):
        with pytest.raises(RuntimeError, match="first_step"):
            call()
    assert_same_bits(weights(parameters), problem.start)
    optimizer.first_step()
    top = weights(parameters)
    new_group = {"params": [nn.Parameter(torch.ones(2))]}
    for call, message in (
        (optimizer.first_step, r"restore\(\)"),
        (optimizer.state_dict, "state_dict"),
        (lambda: optimizer.load_state_dict({}), "load_state_dict"),
        (lambda: optimizer.add_param_group(new_group), "add_param_group"),
        (lambda: setattr(optimizer, "param_groups", [new_group]), "param_groups"),
        (lambda: optimizer.__getstate__(), "pickling or copying"),
        (lambda: optimizer.ascent.step(), r"restore\(\)"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
        assert_same_bits(weights(parameters), top)
    problem.set_gradients(parameters, 0, 1)
    optimizer.second_step()
    expected = problem.run(*make(SAM, problem, base[0], **base[1]), 1)
    assert_same_bits(weights(parameters), expected)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("adaptive", [False, True])
def test_restore_is_bit_exact(dtype, adaptive, seed):
    problem = Problem([*SHAPES, (0,), (1003,)], dtype=dtype, seed=seed)
    optimizer, parameters = make(SAM, problem, torch.optim.SGD, rho=7.0, adaptive=adaptive, lr=0.1)
    with torch.no_grad():  # values that arithmetic could not restore
        parameters[-1][:4] = torch.tensor([float("inf"), float("nan"), -0.0, 1e-42])
    start = weights(parameters)
    optimizer.restore()  # nothing to do
    problem.set_gradients(parameters, 0, 0, lambda i, s, w: None if i == 1 else True)
    for p in parameters:
        if p.grad is not None:
            p.grad.nan_to_num_(1.0, 1.0, 1.0)
    optimizer.first_step()
    changed = not torch.equal(parameters[0], start[0])
    assert changed or adaptive  # |w| of inf makes the norm of ASAM not finite
    optimizer.restore()
    assert_same_bits(weights(parameters), start)
    optimizer.restore()
    problem.set_gradients(parameters, 0, 0)
    optimizer.first_step()


def test_the_two_calls_hold_the_weights_of_the_ascent_between_them(seed):
    problem = Problem(SHAPES, seed=seed)
    found, parameters = make(SAM, problem, torch.optim.SGD, rho=0.3, lr=0.1)
    oracle, twins = make(OracleSAM, problem, torch.optim.SGD, rho=0.3, lr=0.1)
    for optimizer, given in ((found, parameters), (oracle, twins)):
        problem.set_gradients(given, 0, 0)
        optimizer.first_step()
    assert_close(weights(parameters), weights(twins), 1e-6)


def test_addresses_never_change(base, seed):
    problem = Problem(SHAPES, seed=seed)
    optimizer, parameters = make(SAM, problem, base[0], **base[1])
    before = [p.data_ptr() for p in parameters]
    problem.run(optimizer, parameters, 3)
    assert [p.data_ptr() for p in parameters] == before


# --- storage that is replaced -------------------------------------------------------------------


def replace_storage(parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    """Replace the storage and return the old one, so that the allocator cannot reuse it."""
    old = [p.data for p in parameters]
    for p in parameters:
        p.data = p.data.clone()
    return old


def test_storage_replaced_between_the_halves(base, seed):
    problem = Problem(SHAPES, seed=seed)
    optimizer, parameters = make(SAM, problem, base[0], **base[1])
    problem.set_gradients(parameters, 0, 0)
    optimizer.first_step()
    old = replace_storage(parameters)
    problem.set_gradients(parameters, 0, 1)
    with pytest.raises(RuntimeError, match=r"replaced .* restore\(\)"):
        optimizer.second_step()
    optimizer.restore()
    assert_same_bits(weights(parameters), problem.start)
    expected = problem.run(*make(SAM, problem, base[0], **base[1]), 2)
    assert_same_bits(problem.run(optimizer, parameters, 2), expected)
    del old


@pytest.mark.parametrize("layout", ["transposed", "gaps"])
def test_a_restore_into_storage_of_another_layout(base, layout, seed):
    """The backup has the strides that the weights had when it was made."""
    problem = Problem([(5, 7)], seed=seed)
    optimizer, parameters = make(SAM, problem, base[0], **base[1])
    problem.set_gradients(parameters, 0, 0)
    optimizer.first_step()
    old = parameters[0].data
    if layout == "transposed":
        parameters[0].data = old.t().contiguous().t()
    else:
        parameters[0].data = torch.stack([old, old], dim=-1)[..., 0]
    optimizer.restore()
    assert_same_bits(weights(parameters), problem.start)
    expected = problem.run(*make(SAM, problem, base[0], **base[1]), 2)
    assert_same_bits(problem.run(optimizer, parameters, 2), expected)
    del old


def test_empty_storage_replaced_by_another_layout(base, seed):
    """Both storages are empty, so only the layout differs."""
    problem = Problem([(0,), (3,)], seed=seed)
    optimizer, parameters = make(SAM, problem, base[0], **base[1])
    problem.run(optimizer, parameters, 1, lambda i, s, w: True if i == 0 else None)
    parameters[0].data = torch.ones(1)[1::2]
    problem.run(optimizer, parameters, range(1, 2))  # checks the state of all parameters again
    assert parameters[0].stride() == (2,)


def test_storage_replaced_between_steps(base, seed):
    problem = Problem(SHAPES, seed=seed)
    optimizer, parameters = make(SAM, problem, base[0], **base[1])
    problem.run(optimizer, parameters, 2)
    old = replace_storage(parameters)
    expected = problem.run(*make(SAM, problem, base[0], **base[1]), 4)
    assert_same_bits(problem.run(optimizer, parameters, range(2, 4)), expected)
    del old


# --- autograd -----------------------------------------------------------------------------------


@pytest.mark.parametrize("half", ["first_step", "second_step", "restore"])
def test_a_graph_from_before_a_native_write_is_stale(half):
    weight = nn.Parameter(torch.randn(3, 3))
    optimizer = SAM([weight], torch.optim.SGD, lr=0.1)
    x = torch.randn(3, 3, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    if half != "first_step":
        optimizer.first_step()
    loss = (x @ weight).sum()
    getattr(optimizer, half)()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autograd_notices_native_writes_to_state():
    weight = nn.Parameter(torch.randn(3))
    optimizer = SAM([weight], torch.optim.SGD, lr=0.1, momentum=0.9)
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        optimizer.first_step()
        optimizer.second_step()
        buffer = optimizer.state[weight]["momentum_buffer"]
        version = buffer._version
    weight.grad = torch.ones_like(weight)
    optimizer.first_step()
    optimizer.second_step()
    assert buffer._version > version


# --- hooks and schedulers -----------------------------------------------------------------------


def test_hooks_fire_once_a_step(base, seed):
    problem = Problem([(4,)], seed=seed)
    optimizer, parameters = make(SAM, problem, base[0], **base[1])
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    problem.run(optimizer, parameters, 2)
    problem.set_gradients(parameters, 0, 0)
    optimizer.step(lambda: problem.set_gradients(parameters, 0, 1))
    assert seen == ["pre", "post"] * 3


def test_hooks_of_the_base_fire_and_change_nothing_else(base, seed):
    problem = Problem(SHAPES, seed=seed)
    optimizer, parameters = make(SAM, problem, base[0], **base[1])
    seen = []
    optimizer.base_optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.base_optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    found = problem.run(optimizer, parameters, 3)
    assert seen == ["pre", "post"] * 3
    assert_close(found, problem.run(*make(PlainSAM, problem, base[0], **base[1]), 3), 1e-5)


def test_state_dict_hooks_fire(seed):
    problem = Problem([(4,)], seed=seed)
    optimizer, _ = make(SAM, problem, torch.optim.SGD, lr=0.1)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda *_: seen.append("save"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("load"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["save", "load"]


SCHEDULES = {
    "step": lambda o: StepLR(o, 2, 0.5),
    "cosine": lambda o: CosineAnnealingLR(o, 6),
    "warm-up": lambda o: LambdaLR(o, lambda epoch: min(1.0, epoch / 3)),
    "one cycle": lambda o: OneCycleLR(o, 0.1, total_steps=10),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("on_base", [False, True])
@pytest.mark.parametrize("way", ["two calls", "closure"])
def test_schedulers_on_either_object(schedule, on_base, way, base, seed):
    """Warnings are errors; the learning rate, and the momentum of one cycle, reach the kernels."""
    problem = Problem(SHAPES, seed=seed)
    results = []
    if schedule == "one cycle" and base[0] is torch.optim.RMSprop:
        base = (base[0], {**base[1], "momentum": 0.5})
    for kind in (SAM, PlainSAM):
        optimizer, parameters = make(kind, problem, base[0], **base[1])
        target = optimizer.base_optimizer if on_base or kind is PlainSAM else optimizer
        scheduler = SCHEDULES[schedule](target)
        for step in range(6):
            if way == "closure" and kind is SAM:
                problem.set_gradients(parameters, step, 0)
                optimizer.step(lambda s=step, p=parameters: problem.set_gradients(p, s, 1))
            else:
                problem.run(optimizer, parameters, range(step, step + 1))
            scheduler.step()
        results.append(weights(parameters))
    assert_close(*results, 1e-5)


@pytest.mark.parametrize("on_base", [False, True])
def test_schedulers_do_not_warn_where_every_step_was_skipped(on_base, base, seed):
    problem = Problem(SHAPES, seed=seed)
    optimizer, parameters = make(SAM, problem, base[0], **base[1])
    scheduler = StepLR(optimizer.base_optimizer if on_base else optimizer, 1)
    problem.run(optimizer, parameters, 2, lambda i, s, w: float("nan"))
    scheduler.step()  # warnings are errors
    assert int(optimizer.skipped_steps) == 2


def test_a_scheduled_optimizer_copies_and_restores(base, seed):
    problem = Problem(SHAPES, seed=seed)
    optimizer, parameters = make(SAM, problem, base[0], **base[1])
    scheduler = StepLR(optimizer, 1, 0.5)
    problem.run(optimizer, parameters, 1)
    scheduler.step()
    optimizer.load_state_dict(optimizer.state_dict())
    problem.run(optimizer, parameters, range(1, 2))
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(base[1]["lr"] / 4)


# --- an existing base optimizer -----------------------------------------------------------------


def test_an_existing_base_optimizer(base, seed):
    problem = Problem(SHAPES, seed=seed)
    parameters = problem.parameters()
    ready = base[0](parameters, **base[1])
    optimizer = SAM(optimizer=ready, rho=0.2)
    assert optimizer.base_optimizer is ready
    expected = problem.run(*make(SAM, problem, base[0], rho=0.2, **base[1]), 3)
    assert_same_bits(problem.run(optimizer, parameters, 3), expected)


def test_a_used_base_optimizer_keeps_its_state(seed):
    problem = Problem(SHAPES, seed=seed)
    results = []
    for ready_made in (True, False):
        parameters = problem.parameters()
        ready = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, foreach=False)
        problem.set_gradients(parameters, 0, 0)
        ready.step()
        if ready_made:
            optimizer = SAM(optimizer=ready)
        else:
            optimizer = PlainSAM(parameters, torch.optim.SGD, lr=0.1, momentum=0.9, foreach=False)
            optimizer.base_optimizer.load_state_dict(ready.state_dict())
            optimizer.base_optimizer.param_groups[0].update(rho=0.05, adaptive=False)
            optimizer.param_groups = optimizer.base_optimizer.param_groups
        results.append(problem.run(optimizer, parameters, range(1, 4)))
    assert_close(*results, 1e-5)


def test_options_in_the_groups_of_an_existing_base(seed):
    """Existing options win; arguments and defaults fill in missing values."""
    p, q = (nn.Parameter(torch.ones(2)) for _ in range(2))
    groups = [{"params": [p], "rho": 0.3, "adaptive": True}, {"params": [q]}]
    ready = torch.optim.SGD(groups, lr=0.1)
    optimizer = SAM(optimizer=ready, eta=0.1)
    found = [(g["rho"], g["adaptive"], g["eta"]) for g in optimizer.param_groups]
    assert found == [(0.3, True, 0.1), (0.05, False, 0.1)]
    again = SAM(optimizer=ready)
    assert again.param_groups is optimizer.param_groups
    again.param_groups[1]["rho"] = 0.3
    SAM(optimizer=ready, rho=0.3, eta=0.1)
    groups = [{"params": [p], "rho": 0.3}, {"params": [q]}]
    mixed = SAM(optimizer=torch.optim.SGD(groups, lr=0.1), rho=0.7)
    assert [g["rho"] for g in mixed.param_groups] == [0.3, 0.7]
    loaded = torch.optim.SGD([q], lr=0.1)
    loaded.load_state_dict(SAM([p], torch.optim.SGD, rho=torch.tensor(0.4), lr=0.1).state_dict())
    assert SAM(optimizer=loaded, rho=0.4).param_groups[0]["rho"] == 0.4
    assert str(inspect.signature(SAM).parameters["rho"]).endswith("= 0.05")


@pytest.mark.parametrize(
    "option",
    [{"rho": 0.05}, {"adaptive": False}, {"eta": 0.0}, {"stochastic_rounding": False}],
    ids=lambda option: next(iter(option)),
)
def test_values_of_an_earlier_wrapper_win(option):
    ready = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    SAM(optimizer=ready, rho=0.5, adaptive=True, eta=0.2, stochastic_rounding=True)
    before = dict(ready.param_groups[0])
    assert SAM(optimizer=ready, **option).param_groups[0] == before


class LARS(torch.optim.SGD):
    """An optimizer with its own eta, like many."""

    def __init__(self, params: Any, lr: float, eta: float = 1e-3) -> None:
        super().__init__(params, lr=lr)
        self.defaults["eta"] = self.param_groups[0]["eta"] = eta


class Opaque(torch.optim.Optimizer):
    """An optimizer whose option shows in its defaults, but not in its constructor."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args, defaults={"lr": 0.1, "eta": 0.5})


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("rho", lambda groups: SAM(groups, torch.optim.Adadelta)),
        ("rho", lambda groups: SAM(groups, torch.optim.Adadelta, rho=0.05)),
        ("rho", lambda groups: SAM(groups, partial(torch.optim.Adadelta, lr=0.1))),
        ("eta", lambda groups: SAM(groups, LARS, lr=0.1)),
    ],
)
def test_a_base_with_an_option_of_the_same_name_is_refused(name, build):
    groups = [{"params": [nn.Parameter(torch.ones(2))]}]
    with pytest.raises(ValueError, match=f"both have an option named '{name}'"):
        build(groups)
    assert "adaptive" not in groups[0]  # no options of SAM


@pytest.mark.parametrize("base", [torch.optim.Adadelta, partial(LARS, lr=0.1), Opaque])
def test_an_existing_base_with_an_option_of_the_same_name_is_refused(base):
    ready = base([nn.Parameter(torch.ones(2))])
    before = dict(ready.param_groups[0])
    with pytest.raises(ValueError, match="both have an option named"):
        SAM(optimizer=ready)
    assert ready.param_groups[0] == before


def test_an_existing_lbfgs_is_refused_before_anything_changes():
    ready = torch.optim.LBFGS([nn.Parameter(torch.ones(2))])
    before = dict(ready.param_groups[0])
    with pytest.raises(TypeError, match="LBFGS"):
        SAM(optimizer=ready)
    assert ready.param_groups[0] == before
    with pytest.raises(TypeError, match="LBFGS"):
        SAM([nn.Parameter(torch.ones(2))], partial(torch.optim.LBFGS, lr=0.1))


@pytest.mark.parametrize(
    ("kind", "build"),
    [
        ("SAM", lambda base: SAM(optimizer=SAM(optimizer=base))),
        ("PGD", lambda base: SAM(optimizer=PGD(base, sigma=0.1))),
        ("LookSAM", lambda base: SAM(optimizer=LookSAM(base))),
        ("SAM", lambda base: LookSAM(SAM(optimizer=base))),
        ("AscentStep", lambda base: SAM(optimizer=SAM(optimizer=base).ascent)),
        ("SAM", lambda base: SAM(base.param_groups, partial(SAM, base_optimizer=torch.optim.SGD))),
        ("SAM", lambda base: SAM(base.param_groups, SAM)),
        ("SAM", lambda base: PGD(SAM(optimizer=base), sigma=0.1)),
    ],
)
def test_a_wrapper_is_refused_as_the_base(kind, build):
    """Its step() needs a closure or a first_step(), which an outer step does not call."""
    base = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(TypeError, match=f"is a {kind}, which wraps .*pass its base_optimizer"):
        build(base)


def test_a_callable_constructs_the_base(seed):
    """A partial class, or a function."""
    problem = Problem(SHAPES, seed=seed)
    expected = problem.run(*make(SAM, problem, torch.optim.SGD, lr=0.1, momentum=0.9), 3)

    def sgd(params: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=lr, momentum=0.9)

    for base, options in (
        (partial(torch.optim.SGD, lr=0.1), {"momentum": 0.9}),
        (partial(torch.optim.SGD, lr=0.1, momentum=0.9), {}),
        (sgd, {"lr": 0.1}),
    ):
        parameters = problem.parameters()
        optimizer = SAM(iter(parameters), base, **options)
        assert type(optimizer.base_optimizer) is torch.optim.SGD
        assert_same_bits(problem.run(optimizer, parameters, 3), expected)
    with pytest.raises(TypeError, match=r"must return a torch.optim.Optimizer.*got 3"):
        SAM(problem.parameters(), lambda params: 3)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [-0.1, float("nan"), float("inf"), torch.tensor(-1.0)])
def test_a_bad_rho_is_refused(rho, seed):
    problem = Problem([(4,)], seed=seed)
    with pytest.raises(ValueError, match="rho must be a finite number >= 0"):
        make(SAM, problem, torch.optim.SGD, rho=rho, lr=0.1)
    with pytest.raises(ValueError, match="rho must be"):
        SAM([{"params": problem.parameters(), "rho": rho}], torch.optim.SGD, lr=0.1)
    optimizer, parameters = make(SAM, problem, torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="rho must be"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "rho": rho})
    assert len(optimizer.param_groups) == 1
    state = optimizer.state_dict()
    state["param_groups"][0]["rho"] = rho
    with pytest.raises(ValueError, match="rho must be"):
        optimizer.load_state_dict(state)
    good = optimizer.param_groups[0]["rho"]
    for when in (0, 1):  # an invalid result of a schedule
        problem.set_gradients(parameters, 0, when)
        before = weights(parameters)
        optimizer.param_groups[0]["rho"] = rho
        with pytest.raises(ValueError, match="rho must be"):
            (optimizer.first_step, optimizer.second_step)[when]()
        assert_same_bits(weights(parameters), before)
        optimizer.param_groups[0]["rho"] = good
        (optimizer.first_step, optimizer.second_step)[when]()
    assert_same_bits(
        weights(parameters), problem.run(*make(SAM, problem, torch.optim.SGD, lr=0.1), 1)
    )


@pytest.mark.parametrize(
    ("error", "message", "build"),
    [
        (TypeError, "SAM\\(optimizer=", lambda p: SAM(p, torch.optim.SGD(p, lr=0.1))),
        (TypeError, "optimizer class", lambda p: SAM(p, "SGD", lr=0.1)),
        (TypeError, "optimizer class", lambda p: SAM(p, nn.Linear, lr=0.1)),
        (TypeError, "params and base_optimizer", lambda p: SAM(p)),
        (TypeError, "must be an optimizer instance", lambda p: SAM(optimizer=torch.optim.SGD)),
        (TypeError, "LBFGS", lambda p: SAM(p, torch.optim.LBFGS)),
        (TypeError, "not both", lambda p: SAM(p, optimizer=torch.optim.SGD(p, lr=0.1))),
        (TypeError, "not both", lambda p: SAM(optimizer=torch.optim.SGD(p, lr=0.1), lr=0.2)),
        (ValueError, "adaptive", lambda p: SAM(p, torch.optim.SGD, adaptive="weight", lr=0.1)),
        (ValueError, "eta", lambda p: SAM(p, torch.optim.SGD, eta=-1.0, lr=0.1)),
        (ValueError, "eta", lambda p: SAM(p, torch.optim.SGD, eta=float("nan"), lr=0.1)),
        (ValueError, "eta", lambda p: SAM(p, torch.optim.SGD, eta=float("inf"), lr=0.1)),
        (ValueError, "rho .*'0.05'", lambda p: SAM(p, torch.optim.SGD, rho="0.05", lr=0.1)),
        (ValueError, "rho .*None", lambda p: SAM(p, torch.optim.SGD, rho=None, lr=0.1)),
        (
            ValueError,
            "stochastic",
            lambda p: SAM(p, torch.optim.SGD, stochastic_rounding=1, lr=0.1),
        ),
        (ValueError, "closure", lambda p: SAM(p, torch.optim.SGD, closure="first", lr=0.1)),
        (ValueError, "empty parameter list", lambda p: SAM([], torch.optim.SGD, lr=0.1)),
        (ValueError, "learning rate", lambda p: SAM(p, torch.optim.SGD, lr=-0.1)),
        (TypeError, "unexpected keyword", lambda p: SAM(p, torch.optim.SGD, lr=0.1, betas=(0, 0))),
    ],
)
def test_bad_arguments(error, message, build):
    with pytest.raises(error, match=message):
        build([nn.Parameter(torch.ones(2))])


def test_a_dtype_without_kernels_is_refused():
    p = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"complex64.*float32"):
        SAM([p], torch.optim.SGD, lr=0.1).first_step()


@pytest.fixture
def fake_ranks():
    """Fake a world of two ranks in one process; the data of the other rank is not used."""
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    torch.distributed.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=2)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.usefixtures("fake_ranks")
def test_parameters_of_fsdp1_are_refused(use_orig_params):
    """They look whole but are parts, so the norm would be that of one rank."""
    model = FullyShardedDataParallel(
        nn.Linear(4, 3), device_id=torch.device("cpu"), use_orig_params=use_orig_params
    )
    with pytest.raises(ValueError, match="fully_shard"):
        SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    optimizer = SAM([nn.Parameter(torch.ones(2))], torch.optim.SGD, lr=0.1)
    optimizer.add_param_group({"params": model.parameters()})
    for p in optimizer.param_groups[1]["params"]:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="fully_shard"):
        optimizer.first_step()


def test_native_mode_refuses_a_device_without_kernels(monkeypatch):
    monkeypatch.setenv("FASTSAM_KERNELS", "native")
    p = nn.Parameter(torch.ones(2, device="meta"))
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="no kernels for 'meta' devices"):
        SAM([p], torch.optim.SGD, lr=0.1).first_step()


def test_parameters_that_share_memory_are_refused():
    flat = torch.zeros(6)
    one, other, part = map(nn.Parameter, (flat, flat.view(2, 3), flat[2:]))
    for shared in (
        [one, other],
        [one, part],
        [part, one],
        [{"params": [other], "perturb": False}, {"params": [one]}],
        [nn.Parameter(torch.zeros(1).expand(4))],
    ):
        optimizer = SAM(shared, torch.optim.SGD, lr=0.1)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        with pytest.raises(ValueError, match="shares memory"):
            optimizer.first_step()
    assert not bool(flat.any())


def test_parameters_of_one_buffer_need_not_share_memory():
    flat = torch.arange(6.0)
    parameters = [nn.Parameter(view) for view in (flat[0:4:2], flat[1:4:2], flat[4:])]
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer = SAM(parameters, torch.optim.SGD, lr=0.5)
    optimizer.first_step()
    optimizer.second_step()
    assert flat.tolist() == [-0.5, 0.5, 1.5, 2.5, 3.5, 4.5]


def two_buckets(seed: int) -> tuple[Problem, list[nn.Parameter], SAM]:
    """Return a float64 and a float32 parameter, which take two launches per phase."""
    problem = Problem([(4,), (5,)], dtype=torch.float64, seed=seed)
    parameters = [nn.Parameter(problem.start[0].clone()), nn.Parameter(problem.start[1].float())]
    return problem, parameters, SAM(parameters, torch.optim.SGD, lr=0.1)


def failing_in_float32(launch: Any) -> Any:
    def failing(table, *arguments, **options):
        if table.dtype is torch.float32:
            raise RuntimeError("launch failed")
        launch(table, *arguments, **options)

    return failing


def test_an_ascent_that_fails_midway_is_undone(monkeypatch, seed):
    """The launch for the second bucket fails after that for the first succeeded."""
    problem, parameters, optimizer = two_buckets(seed)
    before = weights(parameters)
    problem.set_gradients(parameters, 0, 0)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "perturb", failing_in_float32(kernels.perturb))
        with pytest.raises(RuntimeError, match="launch failed"):
            optimizer.first_step()
    assert_same_bits(weights(parameters), before)
    problem.run(optimizer, parameters, 1)


def test_a_descent_that_fails_midway_can_be_abandoned(monkeypatch, seed):
    """The first bucket is updated, the launch of the second fails: nothing stays perturbed."""
    problem, parameters, optimizer = two_buckets(seed)
    before = weights(parameters)
    problem.set_gradients(parameters, 0, 0)
    optimizer.first_step()
    problem.set_gradients(parameters, 0, 1)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "update", failing_in_float32(kernels.update))
        with pytest.raises(RuntimeError, match="launch failed"):
            optimizer.second_step()
    updated = before[0] - 0.1 * parameters[0].grad
    assert not torch.equal(parameters[1], before[1])
    optimizer.restore()
    assert_close(weights(parameters)[:1], [updated], 1e-15)
    assert_same_bits(weights(parameters)[1:], before[1:])
    problem.run(optimizer, parameters, 1)
