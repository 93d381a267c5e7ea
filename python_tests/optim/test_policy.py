"""The ascent policy: steps without an ascent equal the base optimizer's, in every form of calling."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint.state_dict as dcp
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.optim.lr_scheduler import ExponentialLR

from fastsam import SAM
from fastsam.optim import RhoScheduler, StepSchedule, capture, capture_step
from fastsam.optim.rehearsal import rehearsal
from python_tests.optim.test_memory import live_bytes
from python_tests.optim.trajectories import (
    Problem,
    assert_close,
    assert_same_bits,
    assert_torch_bits,
    make,
)

NAN = float("nan")


def weight(value: float = 1.0) -> nn.Parameter:
    p = nn.Parameter(torch.full((3,), value))
    p.grad = torch.ones(3)
    return p


def two_calls(optimizer: SAM, p: nn.Parameter) -> None:
    """Make a step with two-call code that ignores the policy."""
    p.grad = torch.ones_like(p)
    optimizer.first_step(zero_grad=True)
    p.grad = torch.ones_like(p)
    optimizer.second_step()


def due_steps(optimizer: SAM, p: nn.Parameter, count: int) -> list[int]:
    found = []
    for n in range(count):
        assert optimizer.attempted_steps == n
        if optimizer.ascent_due:
            found.append(n)
        two_calls(optimizer, p)
    return found


# --- the policy ---------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("interval", [1, 4])
@pytest.mark.parametrize("stop", [None, 4, 9])
def test_an_ascent_is_due_by_the_formula(start: int, interval: int, stop: int | None) -> None:
    p = weight()
    optimizer = SAM([p], SGD, lr=0.1, start=start, interval=interval, stop=stop)
    end = 20 if stop is None else stop
    expected = [n for n in range(20) if start <= n < end and (n - start) % interval == 0]
    assert due_steps(optimizer, p, 20) == expected


def test_the_default_ascends_in_every_step() -> None:
    p = weight()
    optimizer = SAM([p], SGD, lr=0.1)
    assert due_steps(optimizer, p, 4) == [0, 1, 2, 3]
    (group,) = optimizer.param_groups
    assert (group["start"], group["interval"], group["stop"]) == (0, 1, None)


def test_rho_zero_in_all_groups_makes_no_ascent() -> None:
    p, q = weight(), weight()
    optimizer = SAM([{"params": [p], "rho": 0.0}, {"params": [q]}], SGD, rho=0.0, lr=0.1)
    assert optimizer.ascent_due is False
    optimizer.restore()
    optimizer.param_groups[1]["rho"] = 0.1
    assert optimizer.ascent_due is True


@pytest.mark.parametrize("value", [0.0, 0.2])
def test_a_rho_on_the_cpu_is_read(value: float) -> None:
    optimizer = SAM([weight()], SGD, rho=torch.tensor(value), lr=0.1)
    assert optimizer.ascent_due is (value != 0)


def test_a_rho_on_a_device_counts_as_nonzero() -> None:
    """It must not be read; a meta tensor has no data to read."""
    optimizer = SAM([weight()], SGD, lr=0.1)
    optimizer.param_groups[0]["rho"] = torch.zeros((), device="meta")
    assert optimizer.ascent_due is True


def test_a_decision_holds_until_the_step_ends() -> None:
    p = weight()
    optimizer = SAM([p], SGD, rho=0.0, lr=0.1)
    assert optimizer.ascent_due is False
    optimizer.param_groups[0]["rho"] = 0.1
    assert optimizer.ascent_due is False
    optimizer.step()
    assert optimizer.ascent_due is True
    optimizer.first_step()
    optimizer.param_groups[0].update(rho=0.0, start=100)
    assert optimizer.ascent_due is True
    optimizer.step()
    assert optimizer.ascent_due is False
    assert optimizer.attempted_steps == 2


def test_a_rho_schedule_takes_effect_at_the_next_step() -> None:
    p = weight()
    optimizer = SAM([p], SGD, lr=0.1)
    scheduler = RhoScheduler(optimizer, StepSchedule((2,), (0.0, 0.1)))
    found = []
    for _ in range(4):
        found.append(optimizer.ascent_due)
        two_calls(optimizer, p)
        scheduler.step()
    assert found == [False, False, True, True]


def test_skipped_steps_count_and_restored_ones_do_not() -> None:
    p = weight()
    optimizer = SAM([p], SGD, lr=0.1, start=1)
    p.grad = torch.full((3,), NAN)
    optimizer.step()
    assert (optimizer.attempted_steps, int(optimizer.skipped_steps)) == (1, 1)
    p.grad = torch.ones(3)
    optimizer.first_step()
    optimizer.restore()
    assert optimizer.attempted_steps == 1

    def fails() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(fails)
    assert optimizer.attempted_steps == 1


@pytest.mark.parametrize("options", [{}, {"start": 5}], ids=["due", "not due"])
@pytest.mark.parametrize("base", [{"momentum": 0.9}, {}], ids=["momentum", "no state"])
def test_the_blank_step_of_distributed_checkpoints_does_not_count(
    options: dict[str, int], base: dict[str, float], seed: int
) -> None:
    torch.manual_seed(seed)
    model = nn.Linear(2, 2)
    optimizer = SAM(model.parameters(), SGD, lr=0.1, **base, **options)
    for _ in range(2):
        dcp.set_optimizer_state_dict(
            model, optimizer, dcp.get_optimizer_state_dict(model, optimizer)
        )
        assert optimizer.attempted_steps == 0


@pytest.mark.parametrize("flatten", [False, True])
def test_distributed_checkpoints_carry_the_policy(flatten: bool, seed: int) -> None:
    torch.manual_seed(seed)
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, twin = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = SAM(model.parameters(), SGD, lr=0.1, momentum=0.9, start=2, interval=3, stop=9)
    for _ in range(4):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step(lambda: model(torch.ones(1, 2)).sum().backward())
    saved = dcp.get_optimizer_state_dict(model, optimizer, options=options)
    other = SAM(twin.parameters(), SGD, lr=0.1, momentum=0.9)
    dcp.set_optimizer_state_dict(twin, other, saved, options=options)
    assert other.attempted_steps == 4
    assert [other.param_groups[0][name] for name in ("start", "interval", "stop")] == [2, 3, 9]


# --- options, checkpoints, copies ---------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"start": -1}, "start must be an integer >= 0, got -1"),
    ({"start": 1.5}, "start must be an integer >= 0, got 1.5"),
    ({"start": True}, "start must be an integer"),
    ({"start": "3"}, "start must be an integer"),
    ({"start": NAN}, "start must be"),
    ({"start": None}, "start must be an integer"),
    ({"interval": 0}, "interval must be an integer >= 1, got 0"),
    ({"interval": 2.0}, "interval must be an integer >= 1, got 2.0"),
    ({"stop": 0}, "stop must be greater than start, got start=0 and stop=0"),
    ({"start": 4, "stop": 4}, "stop must be greater than start"),
    ({"stop": -3}, "stop must be an integer >= 0, got -3"),
    ({"stop": 7.0}, "stop must be an integer >= 0, got 7.0"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=str)
def test_wrong_options_are_refused_before_anything_changes(
    options: dict[str, Any], message: str
) -> None:
    ready = SGD([weight()], lr=0.1)
    before = dict(ready.param_groups[0])
    with pytest.raises(ValueError, match=message):
        SAM(optimizer=ready, **options)
    assert ready.param_groups[0] == before
    with pytest.raises(ValueError, match=message):
        SAM([{"params": [weight()], **options}], SGD, lr=0.1)
    optimizer = SAM([weight()], SGD, lr=0.1)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [weight()], **options})
    assert len(optimizer.param_groups) == 1
    saved = optimizer.state_dict()
    saved["param_groups"][0].update(options)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    optimizer.param_groups[0].update(options)
    with pytest.raises(ValueError, match=message):
        _ = optimizer.ascent_due
    with pytest.raises(ValueError, match=message):
        optimizer.first_step()


@pytest.mark.parametrize("count", [-1, 0.5, True, "1", None])
def test_a_wrong_first_attempt_is_refused(count: Any) -> None:
    with pytest.raises(ValueError, match="first_attempt must be an integer >= 0"):
        SAM([weight()], SGD, lr=0.1, first_attempt=count)


@pytest.mark.parametrize(("name", "value"), [("start", 5), ("interval", 2), ("stop", 9)])
def test_groups_must_agree(name: str, value: int) -> None:
    message = f"parameter groups must agree on {name}"
    with pytest.raises(ValueError, match=message):
        SAM([{"params": [weight()], name: value}, {"params": [weight()]}], SGD, lr=0.1)
    optimizer = SAM([weight()], SGD, lr=0.1)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [weight()], name: value})
    optimizer.add_param_group({"params": [weight()]})
    saved = optimizer.state_dict()
    saved["param_groups"][1][name] = value
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match=message):
        optimizer.param_groups = [{**optimizer.param_groups[0], name: value}, {"params": []}]
    optimizer.param_groups[1][name] = value
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert optimizer.attempted_steps == 0


@pytest.mark.parametrize("through_base", [False, True])
@pytest.mark.parametrize("loaded", [False, True])
def test_a_group_that_is_added_later_has_the_policy_of_the_others(
    loaded: bool, through_base: bool
) -> None:
    p = weight()
    optimizer = SAM([p], SGD, lr=0.1, start=1)
    if loaded:
        other = SAM([weight()], SGD, lr=0.1, start=2, interval=3, stop=9, first_attempt=6)
        optimizer.load_state_dict(other.state_dict())
    else:
        optimizer.param_groups[0].update(start=2, interval=3, stop=9)
        for _ in range(6):
            two_calls(optimizer, p)
    target = optimizer.base_optimizer if through_base else optimizer
    target.add_param_group({"params": [weight()]})
    assert optimizer.ascent_due is False
    assert optimizer.param_groups[1]["start"] == 2
    two_calls(optimizer, p)
    assert [group["attempted_steps"] for group in optimizer.param_groups] == [7, 7]


def test_a_state_dict_carries_counter_and_options() -> None:
    p = weight()
    optimizer = SAM([p], SGD, lr=0.1, start=2, interval=3, stop=9, first_attempt=4)
    two_calls(optimizer, p)
    saved = optimizer.state_dict()
    assert saved["attempted_steps"] == 5
    fresh = SAM([weight()], SGD, lr=0.1)
    fresh.load_state_dict(saved)
    assert fresh.attempted_steps == 5
    assert fresh.ascent_due is True
    del saved["attempted_steps"]  # wrappers keep state and groups only
    fresh = SAM([weight()], SGD, lr=0.1)
    fresh.load_state_dict(saved)
    assert fresh.attempted_steps == 5


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_carry_counter_and_options(copied: Callable[[Any], Any]) -> None:
    p = weight()
    optimizer = SAM([p], SGD, lr=0.1, start=2, first_attempt=1)
    assert optimizer.ascent_due is False
    twin_p, twin = copied((p, optimizer))
    two_calls(twin, twin_p)
    assert (twin.attempted_steps, optimizer.attempted_steps) == (2, 1)
    assert twin.ascent_due is True
    assert optimizer.ascent_due is False
    twin.load_state_dict(SGD([weight()], lr=0.1).state_dict())
    assert twin.attempted_steps == 1


def test_the_checkpoint_of_a_plain_run_continues_with_first_attempt() -> None:
    plain = SGD([weight()], lr=0.1, momentum=0.9)
    plain.step()
    for first in (0, 7):
        p = weight()
        optimizer = SAM([p], SGD, lr=0.1, momentum=0.9, start=7, first_attempt=first)
        two_calls(optimizer, p)
        optimizer.load_state_dict(plain.state_dict())
        assert optimizer.attempted_steps == first
        assert optimizer.ascent_due is (first == 7)
        assert optimizer.state[p]["momentum_buffer"].tolist() == [1.0, 1.0, 1.0]


def test_torch_loads_the_checkpoint_of_sam() -> None:
    p = weight()
    optimizer = SAM([p], SGD, lr=0.1, momentum=0.9, start=3)
    two_calls(optimizer, p)
    plain = SGD([weight()], lr=0.5, momentum=0.1)
    plain.load_state_dict(optimizer.state_dict())
    assert plain.param_groups[0]["lr"] == 0.1


def test_loading_resets_the_decision() -> None:
    optimizer = SAM([weight()], SGD, lr=0.1, start=5)
    assert optimizer.ascent_due is False
    optimizer.load_state_dict(SAM([weight()], SGD, lr=0.1).state_dict())
    assert optimizer.ascent_due is True


# --- the step without ascent --------------------------------------------------------------------

BASES = [
    (SGD, {"lr": 0.1}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.01}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (Adam, {"lr": 0.05, "amsgrad": True}),
    (AdamW, {"lr": 0.05}),
    (RMSprop, {"lr": 0.01}),
]
SHAPES = [(3, 5), (7,), (), (0,), (1003,)]


@pytest.mark.parametrize("base", BASES, ids=lambda case: f"{case[0].__name__} {case[1]}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_step_without_ascent_is_the_update_of_a_step_with_one(
    base: tuple[Any, dict[str, Any]], dtype: torch.dtype, seed: int
) -> None:
    """With fixed gradients in the second pass, the ascent does not affect weights and state."""
    problem = Problem(SHAPES, dtype=dtype, seed=seed)
    plain, weights = make(SAM, problem, base[0], start=100, **base[1])
    ascending, twins = make(SAM, problem, base[0], rho=0.5, **base[1])
    for step in range(5):
        problem.set_gradients(weights, step, 0)
        for p, twin in zip(weights, twins, strict=True):
            twin.grad = p.grad.clone()
        ascending.first_step()
        ascending.second_step()
        plain.step()
        assert_same_bits([p.detach() for p in weights], [p.detach() for p in twins])
        for p, twin in zip(weights, twins, strict=True):
            for key, value in ascending.state[twin].items():
                assert torch.equal(torch.as_tensor(plain.state[p][key]), torch.as_tensor(value))


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_no_backup_exists_before_the_first_ascent(kind: str, seed: int) -> None:
    problem = Problem([(200, 333), (1001,)], seed=seed)
    elements = sum(w.numel() for w in problem.start)
    base, state = {"SGD": (SGD, 0), "AdamW": (AdamW, 2)}[kind]
    optimizer, parameters = make(SAM, problem, base, lr=0.1, start=2)
    problem.set_gradients(parameters, 0, 0)
    before = live_bytes() + 4 * elements * state
    for _ in range(2):
        optimizer.step()
        assert live_bytes() - before == pytest.approx(0, abs=4096)
    optimizer.first_step()
    assert live_bytes() - before == pytest.approx(4 * elements, abs=4096)
    optimizer.second_step()


def test_prepare_allocates_the_backup_and_changes_nothing(seed: int) -> None:
    problem = Problem([(200, 333), (1001,)], seed=seed)
    elements = sum(w.numel() for w in problem.start)
    found = []
    for prepares in (False, True):
        optimizer, parameters = make(SAM, problem, SGD, lr=0.1, momentum=0.9, start=1)
        before = live_bytes()
        if prepares:
            optimizer.prepare()
            assert live_bytes() - before == pytest.approx(8 * elements, abs=4096)
        for step in range(3):
            problem.set_gradients(parameters, step, 0)
            optimizer.first_step()
            optimizer.second_step()
        found.append([p.detach() for p in parameters])
    assert_same_bits(*found)


@pytest.mark.parametrize("base", [SGD, RMSprop])
def test_the_flag_of_a_nan_ascent_does_not_skip_plain_steps(base: Any) -> None:
    p = weight()
    optimizer = SAM([p], base, lr=0.1, stop=1)
    p.grad = torch.full((3,), NAN)
    optimizer.first_step()
    p.grad = torch.ones(3)
    optimizer.second_step()
    assert p.tolist() == [1.0, 1.0, 1.0]
    assert int(optimizer.skipped_steps) == 1
    p.grad = torch.ones(3)
    optimizer.step()
    assert bool((p < 1).all())
    assert int(optimizer.skipped_steps) == 1


@pytest.mark.parametrize("base", [SGD, RMSprop])
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_gradients_that_are_not_finite_skip_plain_steps(base: Any, value: float) -> None:
    p = weight()
    optimizer = SAM([p], base, lr=0.1, start=9)
    p.grad[1] = value
    optimizer.step()
    assert p.tolist() == [1.0, 1.0, 1.0]
    assert int(optimizer.skipped_steps) == 1


def test_without_the_check_plain_steps_are_those_of_torch() -> None:
    p = weight()
    optimizer = SAM([p], SGD, lr=0.1, start=9, check_finite=False)
    p.grad[1] = NAN
    optimizer.step()
    assert p.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("base", [SGD, RMSprop])
@pytest.mark.parametrize("overflow", [False, True])
def test_a_scaler_alone_makes_a_plain_step(base: Any, overflow: bool) -> None:
    p = weight()
    optimizer = SAM([p], base, lr=0.1, start=9)
    plain_p = weight()
    plain = base([plain_p], lr=0.1)
    scaler = GradScaler("cpu", init_scale=8.0)
    p.grad = None
    scaler.scale((p * (float("inf") if overflow else 1.0)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    if not overflow:
        plain.step()
    assert_close([p.detach()], [plain_p.detach()], 1e-6)
    assert scaler.get_scale() == (4.0 if overflow else 8.0)
    assert (optimizer.attempted_steps, int(optimizer.skipped_steps)) == (1, int(overflow))


def test_the_norm_of_the_last_ascent_stays() -> None:
    p = weight()
    optimizer = SAM([p], SGD, lr=0.1, stop=1)
    optimizer.ascent.grad_scale = torch.tensor(4.0)
    optimizer.ascent.step()
    norm = float(optimizer.ascent_norm)
    optimizer.step()
    optimizer.step()
    assert float(optimizer.ascent_norm) == norm == pytest.approx(3**0.5 / 4)


# --- every form of calling ----------------------------------------------------------------------

INPUTS, TARGETS = 6, 3


def network(seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(INPUTS, 8), nn.Tanh(), nn.Linear(8, TARGETS)).to(dtype)


class Trained:
    """A model, its optimizer and its batches, in any form of calling.

    Attributes:
        passes: forward and backward passes of each step.
    """

    def __init__(self, make_optimizer: Callable[..., Any], seed: int, dtype: torch.dtype) -> None:
        self.model = network(seed, dtype)
        self.optimizer = make_optimizer(self.model.parameters())
        self.dtype = dtype
        self.seed = seed
        self.passes: list[int] = []
        self.scaler = GradScaler("cpu", init_scale=2.0**6)
        self.captured: Any = None

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1000 + step)
        x = torch.randn(12, INPUTS, generator=generator, dtype=torch.float64).to(self.dtype)
        return x, torch.randint(TARGETS, (12,), generator=generator)

    def loss(self, step: int, part: int = 0, parts: int = 1) -> Tensor:
        if part == 0:
            self.passes[-1] += 1
        x, y = (each.chunk(parts)[part] for each in self.batch(step))
        return nn.functional.cross_entropy(self.model(x), y) / parts

    def run(self, form: Callable[[Trained, int], None], steps: range) -> Trained:
        for step in steps:
            self.passes.append(0)
            form(self, step)
            self.optimizer.zero_grad()
        return self

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def asking(run: Trained, step: int) -> None:
    run.loss(step).backward()
    if run.optimizer.ascent_due:
        run.optimizer.first_step(zero_grad=True)
        run.loss(step).backward()
    run.optimizer.step()


def asking_second_step(run: Trained, step: int) -> None:
    run.loss(step).backward()
    if run.optimizer.ascent_due:
        run.optimizer.first_step(zero_grad=True)
        run.loss(step).backward()
    run.optimizer.second_step(zero_grad=True)


def not_asking(run: Trained, step: int) -> None:
    run.loss(step).backward()
    run.optimizer.first_step(zero_grad=True)
    run.loss(step).backward()
    run.optimizer.second_step(zero_grad=True)


def not_asking_step(run: Trained, step: int) -> None:
    run.loss(step).backward()
    run.optimizer.first_step(zero_grad=True)
    run.loss(step).backward()
    run.optimizer.step()


def second_pass_closure(run: Trained, step: int) -> None:
    run.loss(step).backward()
    run.optimizer.step(lambda: run.loss(step).backward())


def both_passes(run: Trained, step: int) -> None:
    run.optimizer.closure = "both_passes"

    def closure() -> Tensor:
        run.optimizer.zero_grad()
        loss = run.loss(step)
        loss.backward()
        return loss

    assert run.optimizer.step(closure).requires_grad


def needs(run: Trained, step: int) -> None:
    for _ in run.optimizer.passes():
        run.optimizer.zero_grad()
        run.loss(step).backward()


def scaled(run: Trained, step: int) -> None:
    run.scaler.scale(run.loss(step)).backward()
    if run.optimizer.ascent_due:
        run.scaler.step(run.optimizer.ascent)
        run.optimizer.zero_grad()
        run.scaler.scale(run.loss(step)).backward()
    run.scaler.step(run.optimizer)
    run.scaler.update()


def scaled_not_asking(run: Trained, step: int) -> None:
    for half in (run.optimizer.ascent, run.optimizer):
        run.scaler.scale(run.loss(step)).backward()
        run.scaler.step(half)
        run.optimizer.zero_grad()
    run.scaler.update()


def one_call(run: Trained, step: int) -> None:
    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        run.passes[-1] += 1
        return nn.functional.cross_entropy(outputs, targets)

    capture_step(run.model, loss_fn, run.optimizer, run.batch(step))(run.batch(step))


def accumulated(run: Trained, step: int) -> None:
    def backward() -> None:
        for part in range(3):
            run.loss(step, part, 3).backward()

    backward()
    if run.optimizer.ascent_due:
        run.optimizer.first_step(zero_grad=True)
        backward()
    run.optimizer.step()


FORMS = {
    form.__name__: form
    for form in (
        asking,
        asking_second_step,
        not_asking,
        not_asking_step,
        second_pass_closure,
        both_passes,
        needs,
        scaled,
        scaled_not_asking,
        one_call,
        accumulated,
    )
}
ONE_PASS = FORMS.keys() - {"not_asking", "not_asking_step", "scaled_not_asking"}


def plainly(run: Trained, step: int) -> None:
    run.loss(step).backward()
    run.optimizer.step()


def plainly_accumulated(run: Trained, step: int) -> None:
    for part in range(3):
        run.loss(step, part, 3).backward()
    run.optimizer.step()


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return request.param


START = 4
SGD_OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


def sam(parameters: Any, **options: Any) -> SAM:
    return SAM(parameters, SGD, **{"rho": 0.3, "start": START, **SGD_OPTIONS, **options})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_run_has_the_bits_of_the_base_until_start(
    form: str, dtype: torch.dtype, seed: int
) -> None:
    """And then the bits of SAM started from there."""
    run = Trained(sam, seed, dtype).run(FORMS[form], range(START))
    plain = Trained(lambda p: SGD(p, foreach=True, **SGD_OPTIONS), seed, dtype)
    plain.run(plainly_accumulated if form == "accumulated" else plainly, range(START))
    assert_torch_bits(run.weights(), plain.weights())
    assert run.passes == [1 if form in ONE_PASS else 2] * START
    run.run(FORMS[form], range(START, START + 3))
    assert run.passes[START:] == [2] * 3
    late = Trained(lambda p: sam(p, start=0), seed, dtype)
    late.model.load_state_dict(plain.model.state_dict())
    late.optimizer.load_state_dict({**plain.optimizer.state_dict(), "attempted_steps": START})
    late.run(accumulated if form == "accumulated" else not_asking, range(START, START + 3))
    assert_close(run.weights(), late.weights(), 1e-6)
    plain.run(plainly, range(START, START + 3))
    assert not torch.allclose(run.weights()[0], plain.weights()[0], rtol=1e-4)


@pytest.mark.parametrize("at", [START - 2, START + 1], ids=["before start", "after start"])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(form: str, at: int, seed: int) -> None:
    whole = Trained(sam, seed, torch.float32).run(FORMS[form], range(START + 3))
    first = Trained(sam, seed, torch.float32).run(FORMS[form], range(at))
    resumed = Trained(sam, seed + 1, torch.float32)
    resumed.seed = seed
    resumed.model.load_state_dict(first.model.state_dict())
    resumed.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    resumed.run(FORMS[form], range(at, START + 3))
    assert_same_bits(resumed.weights(), whole.weights())


def test_all_forms_make_the_same_run(form: str, seed: int) -> None:
    """With intervals, a stop and skipped steps."""

    def intermittent(parameters: Any) -> SAM:
        return sam(parameters, start=1, interval=3, stop=8)

    found = Trained(intermittent, seed, torch.float64).run(FORMS[form], range(10))
    expected = Trained(intermittent, seed, torch.float64).run(not_asking, range(10))
    assert_close(found.weights(), expected.weights(), 1e-12)
    if form in ONE_PASS:
        assert found.passes == [1, 2, 1, 1, 2, 1, 1, 2, 1, 1]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("through_base", [False, True])
def test_no_form_makes_a_scheduler_warn(form: str, through_base: bool, seed: int) -> None:
    run = Trained(sam, seed, torch.float32)
    target = run.optimizer.base_optimizer if through_base else run.optimizer
    scheduler = ExponentialLR(target, 0.5)
    for step in range(START + 2):
        run.run(FORMS[form], range(step, step + 1))
        scheduler.step()
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5 ** (START + 2))


def test_hooks_of_step_fire_once_a_step(form: str, seed: int) -> None:
    if form == "needs":
        pytest.skip("its gradients are answered outside of step()")
    run = Trained(sam, seed, torch.float32)
    seen: list[int] = []
    run.optimizer.register_step_post_hook(lambda *_: seen.append(run.optimizer.attempted_steps))
    run.run(FORMS[form], range(START + 2))
    assert seen == list(range(1, START + 3))


# --- what is refused ----------------------------------------------------------------------------


def test_step_alone_raises_exactly_when_an_ascent_is_due() -> None:
    p = weight()
    optimizer = SAM([p], SGD, lr=0.1, start=1, stop=2)
    optimizer.step()
    for call in (optimizer.step, optimizer.second_step):
        with pytest.raises(
            RuntimeError, match=r"needs first_step\(\) before it, because an ascent"
        ):
            call()
    assert optimizer.attempted_steps == 1
    optimizer.first_step()
    optimizer.step()
    optimizer.step()
    optimizer.second_step()
    assert optimizer.attempted_steps == 4


def test_a_closure_for_the_second_pass_is_not_called_without_an_ascent() -> None:
    p = weight()
    optimizer = SAM([p], SGD, lr=0.1, start=1)
    assert optimizer.step(lambda: pytest.fail("the closure was called")) is None
    assert optimizer.attempted_steps == 1
    optimizer.zero_grad()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="found no gradient of the first"):
            optimizer.step(lambda: pytest.fail("the closure was called"))
        optimizer.param_groups[0]["start"] = 9
    assert optimizer.attempted_steps == 1


@pytest.mark.parametrize("call", ["step", "second_step", "first_step"])
def test_a_plain_step_needs_a_gradient(call: str) -> None:
    p = weight()
    optimizer = SAM([p], SGD, lr=0.1, start=9)
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        getattr(optimizer, call)()
    assert optimizer.attempted_steps == 0


def test_an_unconditional_second_pass_needs_a_gradient_too() -> None:
    p = weight()
    optimizer = SAM([p], SGD, lr=0.1, start=9)
    optimizer.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match="second pass left no gradient"):
        optimizer.second_step()
    p.grad = torch.ones(3)
    optimizer.second_step()
    assert optimizer.attempted_steps == 1


def test_a_step_that_moves_nothing_begins_once() -> None:
    p = weight()
    optimizer = SAM([p], SGD, lr=0.1, start=9)
    for begin in (optimizer.first_step, optimizer.ascent.step):
        begin()
        assert p.tolist() == [1.0, 1.0, 1.0]
        with pytest.raises(RuntimeError, match=r"first_step\(\) was called twice"):
            optimizer.first_step()
        optimizer.restore()
    assert optimizer.attempted_steps == 0


def test_gradients_of_an_earlier_micro_batch_are_refused_from_the_first_step_on() -> None:
    p = weight()
    optimizer = SAM([p], SGD, lr=0.1, start=9, closure="both_passes")

    def closure() -> Tensor:
        loss = p.sum()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="did not clear"):
        optimizer.step(closure)
    assert p.tolist() == [1.0, 1.0, 1.0]
    assert optimizer.attempted_steps == 0


def test_a_batch_that_a_closure_skips_does_not_count() -> None:
    p = weight()
    optimizer = SAM([p], SGD, lr=0.1, start=9, closure="both_passes")
    optimizer.zero_grad()
    assert optimizer.step(lambda: None) is None
    assert optimizer.attempted_steps == 0


def test_replays_choose_count_and_follow_the_options(seed: int) -> None:
    """Tests the host's part of a replay with eager steps in place of CUDA graphs."""
    run = Trained(lambda p: sam(p, start=1, interval=2), seed, torch.float32)
    optimizer = run.optimizer
    static = run.batch(0)
    chosen: list[bool] = []
    fresh = True

    def graph(due: bool) -> capture._Graph:
        loss = torch.zeros(())

        def replay() -> None:
            chosen.append(due)
            loss.fill_(float(static[0].sum()))

        return capture._Graph(replay, loss)

    graphs = {due: graph(due) for due in (True, False)}
    step = capture.replaying(optimizer, graphs, static, lambda: fresh)
    for n in range(4):
        assert float(step(run.batch(n))) == pytest.approx(float(run.batch(n)[0].sum()))
    assert chosen == [False, True, False, True]
    assert optimizer.attempted_steps == 4
    optimizer.param_groups[0]["interval"] = 1
    step(run.batch(4))
    optimizer.param_groups[0]["rho"] = 0.0
    step(run.batch(5))
    assert chosen[4:] == [True, False]
    optimizer.param_groups[0]["interval"] = 0
    with pytest.raises(ValueError, match="interval must be an integer >= 1"):
        step(run.batch(6))
    optimizer.param_groups[0]["interval"] = 1
    fresh = False
    with pytest.raises(RuntimeError, match="call capture_step again"):
        step(run.batch(6))
    assert len(chosen) == optimizer.attempted_steps == 6


@pytest.mark.gpu
def test_captured_steps_equal_eager_ones_with_and_without_ascents(seed: int) -> None:
    """Nothing is allocated by the first ascent."""
    models, optimizers = [], []
    for _ in range(2):
        models.append(network(seed).cuda())
        optimizers.append(sam(models[-1].parameters(), start=2, interval=3))
    run = Trained(sam, seed, torch.float32)
    batches = [tuple(part.cuda() for part in run.batch(n)) for n in range(9)]
    captured = capture_step(models[0], nn.functional.cross_entropy, optimizers[0], batches[0])
    assert optimizers[0].attempted_steps == 0
    allocated = []
    for n, batch in enumerate(batches):
        assert optimizers[0].ascent_due is (n in (2, 5, 8))
        captured(batch)
        allocated.append(torch.cuda.memory_allocated())
        for need in optimizers[1].passes():
            assert need.part == (0, 1)
            optimizers[1].zero_grad()
            nn.functional.cross_entropy(models[1](batch[0]), batch[1]).backward()
    assert optimizers[0].attempted_steps == 9
    assert allocated[1] == allocated[2]
    assert_close(
        [p.detach().cpu() for p in models[0].parameters()],
        [p.detach().cpu() for p in models[1].parameters()],
        1e-5,
    )


def test_a_rehearsal_does_not_count(seed: int) -> None:
    run = Trained(sam, seed, torch.float32).run(asking, range(2))
    with rehearsal(run.model, run.optimizer):
        run.run(asking, range(2, 5))
    assert run.optimizer.attempted_steps == 2
    assert run.optimizer.ascent_due is False
