"""Between the halves: original and perturbed weights, ways to restore them, and m_sam_step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, RMSprop

from fastsam import SAM
from fastsam.optim import LookSAM, local_sam_step, m_sam_step
from python_tests.optim.test_state_machine import LAYOUTS, Memory
from python_tests.optim.trajectories import (
    TOLERANCE,
    OracleSAM,
    Problem,
    assert_close,
    assert_same_bits,
    make,
)

pytestmark = pytest.mark.filterwarnings("ignore:the ascent left")

SHAPES: list[tuple[int, ...]] = [(7, 5), (), (3, 4, 2), (0, 3), (129,)]
KEPT = (4,)
"""Parameters of the group that is not perturbed."""
GROUPS: list[tuple[int, dict[str, Any]]] = [(2, {}), (2, {"rho": 0.4}), (1, {"perturb": False})]
BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (SGD, {"lr": 0.1, "momentum": 0.9}),
    "AdamW": (AdamW, {"lr": 0.03}),
    "RMSprop": (RMSprop, {"lr": 0.01}),
}


def climbed(
    dtype: torch.dtype, seed: int, base: str = "SGD", **options: Any
) -> tuple[SAM, list[nn.Parameter], Problem]:
    """Return an optimizer after one whole step and the first half of the next."""
    problem = Problem(SHAPES, GROUPS, dtype=dtype, seed=seed)
    kind, own = BASES[base]
    if dtype is torch.float16 and kind is not SGD:
        options = {
            "eps": 1e-3,
            **options,
        }  # the default is 0 in this dtype, and so may be the squares
    optimizer, parameters = make(SAM, problem, kind, rho=0.3, **{**own, **options})
    problem.run(optimizer, parameters, 1)
    problem.set_gradients(parameters, 1, 0)
    return optimizer, parameters, problem


def bits(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


# --- views --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_original_and_perturbed_weights_can_be_read(dtype, seed):
    optimizer, parameters, _ = climbed(dtype, seed)
    before = bits(parameters)
    assert len(optimizer.unperturbed_weights) == len(optimizer.perturbation) == 0
    optimizer.first_step()
    after = bits(parameters)
    perturbed = [i for i in range(len(parameters)) if i not in KEPT]
    for mapping in (optimizer.unperturbed_weights, optimizer.perturbation):
        assert [id(p) for p in mapping] == [id(parameters[i]) for i in perturbed]
        assert parameters[KEPT[0]] not in mapping
    moved = []
    for i in perturbed:
        p = parameters[i]
        assert_same_bits([optimizer.unperturbed_weights[p]], [before[i]])
        difference = optimizer.perturbation[p]
        assert difference.dtype == (torch.float32 if dtype.itemsize == 2 else dtype)
        assert not difference.requires_grad
        exact = after[i].double() - before[i].double()
        assert_close([difference.double()], [exact], 1e-6 if dtype.itemsize < 8 else 1e-15)
        if p.numel():
            moved.append(bool(difference.any()))
    # Rounding may remove the whole ascent of a tensor with few 16-bit elements.
    assert any(moved) if dtype.itemsize == 2 else all(moved)
    optimizer.restore()
    assert len(optimizer.unperturbed_weights) == len(optimizer.perturbation) == 0


def test_parameters_without_a_gradient_are_not_in_the_mappings(seed):
    optimizer, parameters, _ = climbed(torch.float32, seed)
    parameters[0].grad = None
    optimizer.first_step()
    assert parameters[0] not in optimizer.unperturbed_weights
    assert parameters[2] in optimizer.unperturbed_weights


def test_no_write_reaches_the_backup(seed):
    optimizer, parameters, _ = climbed(torch.float32, seed)
    before = bits(parameters)
    optimizer.first_step()
    assert not hasattr(optimizer.unperturbed_weights, "__setitem__")
    for mapping in (optimizer.unperturbed_weights, optimizer.perturbation):
        for value in mapping.values():
            value.fill_(7.0)
    optimizer.restore()
    assert_same_bits(parameters, before)


def test_a_mapping_of_an_earlier_ascent_raises(seed):
    optimizer, parameters, problem = climbed(torch.float32, seed)
    optimizer.first_step()
    old = optimizer.unperturbed_weights
    problem.set_gradients(parameters, 1, 1)
    optimizer.second_step()
    for _ in range(2):  # after the ascent, and in another one
        with pytest.raises(RuntimeError, match="an earlier ascent"):
            old[parameters[0]]
        if not optimizer.native_step.climbed:
            optimizer.first_step()
    optimizer.restore()


def test_an_ascent_that_moved_nothing(seed):
    """If the first gradient is not finite, the weights do not move."""
    optimizer, parameters, _ = climbed(torch.float32, seed)
    parameters[0].grad.fill_(float("nan"))
    before = bits(parameters)
    optimizer.first_step()
    assert_same_bits(list(optimizer.unperturbed_weights.values()), before[:4])
    assert not any(bool(value.any()) for value in optimizer.perturbation.values())
    with optimizer.unperturbed():
        assert_same_bits(parameters, before)
    assert_same_bits(parameters, before)
    optimizer.restore()


# --- unperturbed --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_unperturbed_restores_and_perturbs_bit_for_bit(dtype, seed):
    """All layouts, and bits that arithmetic would not preserve: negative zeros and payloads of NaN."""
    torch.manual_seed(seed)
    memories = [Memory(torch.randn(2, 3, 4, 3).to(dtype), layout) for layout in LAYOUTS]
    parameters = [nn.Parameter(memory.view) for memory in memories]
    for p in parameters:
        p.detach()[0, 0, 0] = -0.0
        p.detach()[0, 0, 1].view({2: torch.int16, 4: torch.int32, 8: torch.int64}[p.itemsize]).add_(
            1
        )
    optimizer = SAM(parameters, SGD, rho=5.0, lr=0.1)
    for p in parameters:
        p.grad = torch.randn_like(p)
        p.grad[0, 0, 0] = 0.0
    before = bits(parameters)
    optimizer.first_step()
    after = bits(parameters)
    for _ in range(2):
        versions = [p._version for p in parameters]
        with optimizer.unperturbed():
            assert_same_bits(parameters, before)
            assert_same_bits(list(optimizer.unperturbed_weights.values()), before)
            exact = [a.double() - b.double() for a, b in zip(after, before, strict=True)]
            found = [value.double() for value in optimizer.perturbation.values()]
            assert_close(found, exact, 1e-6)
            assert all(p._version > v for p, v in zip(parameters, versions, strict=True))
        assert_same_bits(parameters, after)
    assert all(memory.is_intact() for memory in memories)
    optimizer.restore()
    assert_same_bits(parameters, before)


@pytest.mark.parametrize("base", BASES)
def test_the_step_continues_after_unperturbed(base, seed):
    results = []
    for looks in (True, False):
        optimizer, parameters, problem = climbed(torch.float32, seed, base)
        optimizer.first_step()
        problem.set_gradients(parameters, 1, 1)
        if looks:
            with optimizer.unperturbed(), optimizer.unperturbed():
                pass
        optimizer.second_step()
        results.append(bits(parameters))
    assert_same_bits(*results)


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_an_exception_perturbs_the_weights_again(error, seed):
    optimizer, parameters, _ = climbed(torch.float64, seed)
    before = bits(parameters)
    optimizer.first_step()
    after = bits(parameters)

    def nested() -> None:
        with optimizer.unperturbed():
            with pytest.raises(error), optimizer.unperturbed():
                raise error
            assert_same_bits(parameters, before)  # the outer context is still open
            raise error

    with pytest.raises(error):
        nested()
    assert_same_bits(parameters, after)
    optimizer.restore()
    assert_same_bits(parameters, before)


def test_unperturbed_does_nothing_without_a_perturbation(seed):
    optimizer, parameters, problem = climbed(torch.float32, seed)
    before = bits(parameters)
    with optimizer.unperturbed():
        optimizer.first_step()  # a step may begin inside
        problem.set_gradients(parameters, 1, 1)
        optimizer.second_step()
    fresh = SAM([nn.Parameter(torch.ones(2))], SGD, lr=0.1)
    with fresh.unperturbed():
        pass
    fresh.return_to_weights()
    assert not torch.equal(parameters[0], before[0])


def test_a_state_can_be_saved_where_the_weights_are_returned(seed):
    optimizer, parameters, problem = climbed(torch.float32, seed)
    before = optimizer.state_dict()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="the weights are perturbed"):
        optimizer.state_dict()
    optimizer.return_to_weights()
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert after["state"].keys() == before["state"].keys()
    problem.set_gradients(parameters, 1, 1)
    optimizer.second_step()


def test_a_step_cannot_be_finished_inside_unperturbed(seed):
    for base in BASES:
        optimizer, parameters, problem = climbed(torch.float32, seed, base)
        before = bits(parameters)
        optimizer.first_step()
        after = bits(parameters)
        problem.set_gradients(parameters, 1, 1)
        with optimizer.unperturbed():
            for call in (optimizer.second_step, optimizer.step):
                with pytest.raises(RuntimeError, match="leave the context first"):
                    call()
            with pytest.raises(RuntimeError, match="first_step"):
                optimizer.first_step()
            assert_same_bits(parameters, before)
        assert_same_bits(parameters, after)
        optimizer.second_step()


def test_restore_and_return_to_weights_work_inside_unperturbed(seed):
    for goes_on in (True, False):
        optimizer, parameters, problem = climbed(torch.float32, seed)
        before = bits(parameters)
        optimizer.first_step()
        with optimizer.unperturbed():
            (optimizer.return_to_weights if goes_on else optimizer.restore)()
            assert_same_bits(parameters, before)
            assert len(optimizer.unperturbed_weights) == 0
        assert_same_bits(parameters, before)
        if goes_on:
            problem.set_gradients(parameters, 1, 1)
            optimizer.second_step()
            assert not torch.equal(parameters[0], before[0])
        else:
            with pytest.raises(RuntimeError, match="first_step"):
                optimizer.second_step()


def test_changes_inside_unperturbed_are_kept(seed):
    optimizer, parameters, _ = climbed(torch.float32, seed)
    optimizer.first_step()
    after = bits(parameters)
    with optimizer.unperturbed():
        parameters[0].detach().fill_(3.0)
    assert_same_bits(parameters, after)
    optimizer.restore()
    assert bool((parameters[0] == 3.0).all())


def test_replaced_storage_is_refused(seed):
    optimizer, parameters, _ = climbed(torch.float32, seed)
    before = bits(parameters)
    optimizer.first_step()
    after = bits(parameters)
    parameters[0].data = parameters[0].detach().clone()
    refused = pytest.raises(RuntimeError, match="storage of a parameter was replaced")
    with refused, optimizer.unperturbed():
        pytest.fail("the body ran")
    assert_same_bits(parameters, after)
    optimizer.restore()
    assert_same_bits(parameters, before)
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="inside unperturbed"), optimizer.unperturbed():
        parameters[0].data = parameters[0].detach().clone()
    assert_same_bits(parameters, before)
    optimizer.first_step()  # the step was abandoned
    optimizer.restore()
    assert_same_bits(parameters, before)


def test_prepare_is_refused_between_the_halves(seed):
    """It would make new memory for the replaced storage and drop the backup."""
    optimizer, parameters, _ = climbed(torch.float32, seed)
    before = bits(parameters)
    optimizer.first_step()
    parameters[0].data = parameters[0].detach().clone()
    with pytest.raises(RuntimeError, match=r"prepare\(\) between first_step"):
        optimizer.prepare()
    optimizer.restore()
    assert_same_bits(parameters, before)
    optimizer.prepare()


def test_autograd_notices_the_exchange(seed):
    weight = nn.Parameter(torch.ones(3))
    optimizer = SAM([weight], SGD, lr=0.1)
    weight.grad = torch.ones(3)
    optimizer.first_step()
    loss = weight.square().sum()
    with optimizer.unperturbed(), pytest.raises(RuntimeError, match="modified by an inplace"):
        loss.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        loss.backward()


# --- return_to_weights --------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_the_update_after_return_to_weights_equals_second_step(dtype, base, seed):
    results = []
    for returns in (True, False):
        optimizer, parameters, problem = climbed(dtype, seed, base)
        before = bits(parameters)
        optimizer.first_step()
        problem.set_gradients(parameters, 1, 1)
        gradients = [p.grad for p in parameters]
        if returns:
            optimizer.return_to_weights()
            assert_same_bits(parameters, before)
            assert all(p.grad is g for p, g in zip(parameters, gradients, strict=True))
            optimizer.return_to_weights()  # there already
            optimizer.step()
        else:
            optimizer.second_step()
        results.append(bits(parameters))
        assert int(optimizer.skipped_steps) == 0
        problem.run(optimizer, parameters, range(2, 3))
        results[-1] += bits(parameters)
    assert_same_bits(*results)


def test_gradients_at_both_points_can_be_combined(seed):
    """As in ImbSAM: the gradient at the perturbed weights for one part of the loss, at w for another."""
    problem = Problem(SHAPES, dtype=torch.float64, seed=seed)
    optimizer, parameters = make(SAM, problem, SGD, rho=0.3, lr=0.1)
    start = bits(parameters)
    expected = []
    for step in range(3):
        problem.set_gradients(parameters, step, 0)
        first = [p.grad.clone() for p in parameters]
        norm = sum(float(g.square().sum()) for g in first) ** 0.5
        optimizer.first_step(zero_grad=True)
        problem.set_gradients(parameters, step, 1)
        optimizer.return_to_weights()
        for i, p in enumerate(parameters):
            p.grad += 2 * problem.gradient(i, p, step, 2)
        optimizer.second_step(zero_grad=True)
        expected = []
        for i, (w, g) in enumerate(zip(start, first, strict=True)):
            top = problem.gradient(i, w + 0.3 * g / norm, step, 1)
            expected.append(w - 0.1 * (top + 2 * problem.gradient(i, w, step, 2)))
        start = expected
    assert_close(bits(parameters), expected, 1e-12)


@pytest.mark.parametrize("base", BASES)
def test_non_finite_gradients_skip_after_return_to_weights(base, seed):
    for which in (0, 1):
        optimizer, parameters, problem = climbed(torch.float32, seed, base)
        before = bits(parameters)

        def broken(i: int, step: int, now: int, at: int = which) -> Any:
            return float("nan") if (i, now) == (0, at) else True

        for now in (0, 1):
            problem.set_gradients(parameters, 1, now, broken)
            if now == 0:
                optimizer.first_step()
        optimizer.return_to_weights()
        optimizer.second_step()
        assert int(optimizer.skipped_steps) == 1
        assert_same_bits(parameters, before)


def test_the_step_stays_open(seed):
    optimizer, parameters, _ = climbed(torch.float32, seed)
    before = bits(parameters)
    optimizer.first_step(zero_grad=True)
    optimizer.return_to_weights()
    with pytest.raises(RuntimeError, match="first_step"):
        optimizer.first_step()
    for call in (optimizer.second_step, optimizer.step):
        with pytest.raises(RuntimeError, match="left no gradient"):
            call()
    optimizer.restore()
    assert_same_bits(parameters, before)
    optimizer.state_dict()


# --- m_sam_step ---------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("base", ["SGD", "AdamW"])
def test_micro_batches_ascend_on_their_own_gradients(base, dtype, count, seed):
    kind, own = BASES[base]
    if dtype is torch.float16 and kind is AdamW:
        own = {**own, "eps": 1e-3}
    problem = Problem(SHAPES, GROUPS, dtype=dtype, seed=seed)
    optimizer, parameters = make(SAM, problem, kind, rho=0.3, **own)
    oracle, doubles = make(OracleSAM, problem, kind, rho=0.3, **own)
    for step in range(4):
        closures = [_micro_batch(problem, parameters, count * step + part) for part in range(count)]
        loss = m_sam_step(optimizer, closures)
        assert loss == pytest.approx(count * step + (count - 1) / 2)
        assert all(p.grad is None for p in parameters)
        assert not loss.requires_grad
        tops = []
        for part in range(count):
            problem.set_gradients(doubles, count * step + part, 0)
            oracle.first_step()
            problem.set_gradients(doubles, count * step + part, 1)
            tops.append([p.grad.double() for p in doubles])
            if part < count - 1:
                with torch.no_grad():
                    for p, before in zip(doubles, oracle.before, strict=True):
                        p.copy_(before)
        for p, *each in zip(doubles, *tops, strict=True):
            p.grad = torch.stack(each).mean(0).to(dtype)
        oracle.second_step()
    assert_close(bits(parameters), bits(doubles), TOLERANCE[dtype])


def _micro_batch(
    problem: Problem, parameters: list[nn.Parameter], step: int, gradients: Any = None
) -> Any:
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        assert torch.is_grad_enabled()
        assert all(p.grad is None for p in parameters)
        problem.set_gradients(parameters, step, calls, gradients or (lambda i, s, w: True))
        calls += 1
        return torch.tensor(float(step), requires_grad=True)

    return closure


def test_a_missing_gradient_counts_as_zero(seed):
    weights = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    optimizer = SAM(weights, SGD, rho=0.0, lr=1.0)

    def closure(*present: int) -> Any:
        def run() -> Tensor:
            for i in present:
                weights[i].grad = torch.full((2,), 2.0)
            return torch.zeros(())

        return run

    m_sam_step(optimizer, [closure(0), closure(0, 1)])
    assert_same_bits(weights, [torch.full((2,), -2.0), torch.full((2,), -1.0), torch.zeros(2)])


@pytest.mark.parametrize("check_finite", [True, False])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("part", "which"), [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0)])
def test_one_broken_micro_batch_skips_the_update(part, which, base, check_finite, seed):
    if which == 1 and not check_finite:
        return  # never read
    optimizer, parameters, problem = climbed(torch.float32, seed, base, check_finite=check_finite)
    before = bits(parameters)

    def broken(i: int, step: int, now: int) -> Any:
        return float("inf") if (i, now) == (0, which) else True

    closures = [
        _micro_batch(problem, parameters, 1 + i, broken if i == part else None) for i in range(3)
    ]
    m_sam_step(optimizer, closures)
    assert int(optimizer.skipped_steps) == 1
    assert_same_bits(parameters, before)
    m_sam_step(optimizer, [_micro_batch(problem, parameters, 1)])
    assert int(optimizer.skipped_steps) == 1
    assert not torch.equal(parameters[0], before[0])


@pytest.mark.parametrize("fails_at", range(4))
@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_a_closure_that_raises_restores_the_weights(fails_at, error, seed):
    optimizer, parameters, problem = climbed(torch.float32, seed)
    before = bits(parameters)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        if calls == fails_at:
            raise error
        calls += 1
        problem.set_gradients(parameters, 1, 0)
        return torch.zeros(())

    with pytest.raises(error):
        m_sam_step(optimizer, [closure, closure])
    assert_same_bits(parameters, before)
    optimizer.state_dict()  # no step is open


def test_micro_batches_follow_the_ascent_policy(seed):
    """One pass per closure if no ascent is due; a step counts once, whatever its number of closures."""
    problem = Problem(SHAPES, GROUPS, dtype=torch.float64, seed=seed)
    kind, own = BASES["SGD"]
    optimizer, parameters = make(SAM, problem, kind, rho=0.3, start=1, interval=2, **own)
    always, others = make(SAM, problem, kind, rho=0.3, **own)
    plain = SGD(others, foreach=False, **own)
    plain.state = always.state
    for step in range(4):
        due = step % 2 == 1
        assert optimizer.ascent_due is due
        calls: list[int] = []

        def counted(closure: Any, part: int, calls: list[int] = calls) -> Any:
            def run() -> Tensor:
                calls.append(part)
                return closure()

            return run

        closures = [_micro_batch(problem, parameters, 3 * step + part) for part in range(3)]
        loss = m_sam_step(optimizer, [counted(each, i) for i, each in enumerate(closures)])
        assert loss == pytest.approx(3 * step + 1)
        assert calls == ([0, 0, 1, 1, 2, 2] if due else [0, 1, 2])
        assert optimizer.attempted_steps == step + 1
        assert all(p.grad is None for p in parameters)
        expected = [_micro_batch(problem, others, 3 * step + part) for part in range(3)]
        if due:
            m_sam_step(always, expected)
        else:
            sums = [torch.zeros_like(p) for p in others]
            for closure in expected:
                plain.zero_grad()
                closure()
                for total, p in zip(sums, others, strict=True):
                    total += p.grad
            for total, p in zip(sums, others, strict=True):
                p.grad = total / 3
            plain.step()
            plain.zero_grad()
        assert_close(bits(parameters), bits(others), 1e-13)


def test_micro_batches_keep_to_the_decision_of_their_step():
    weight = nn.Parameter(torch.ones(2))
    for first, then in ((0.0, 0.5), (0.5, 0.0)):
        optimizer = SAM([weight], SGD, rho=first, lr=0.1)
        calls = 0

        def closure(optimizer: SAM = optimizer, then: float = then) -> Tensor:
            nonlocal calls
            calls += 1
            optimizer.param_groups[0]["rho"] = then
            weight.grad = torch.ones(2)
            return torch.zeros(())

        m_sam_step(optimizer, [closure, closure])
        assert calls == (4 if first else 2)
        assert optimizer.attempted_steps == 1
        assert optimizer.ascent_due is (then != 0.0)


@pytest.mark.parametrize("base", BASES)
def test_a_broken_micro_batch_skips_a_step_without_ascent(base, seed):
    optimizer, parameters, problem = climbed(torch.float32, seed, base, start=1, stop=2)
    problem.run(optimizer, parameters, 1)
    before = bits(parameters)
    optimizer.zero_grad()
    for part in range(2):
        broken = [None, None]
        broken[part] = lambda i, step, now: float("nan") if i == 0 else True
        m_sam_step(optimizer, [_micro_batch(problem, parameters, i, broken[i]) for i in range(2)])
        assert_same_bits(parameters, before)
        assert int(optimizer.skipped_steps) == part + 1
    m_sam_step(optimizer, [_micro_batch(problem, parameters, 1)])
    assert not torch.equal(parameters[0], before[0])


def test_without_an_ascent_there_is_nothing_to_return_from(seed):
    optimizer, parameters, problem = climbed(torch.float32, seed, start=2)
    before = bits(parameters)
    assert not optimizer.ascent_due
    optimizer.first_step(zero_grad=True)
    assert len(optimizer.unperturbed_weights) == len(optimizer.perturbation) == 0
    with optimizer.unperturbed():
        assert_same_bits(parameters, before)
    optimizer.return_to_weights()
    assert_same_bits(parameters, before)
    with pytest.raises(RuntimeError, match="called twice"):  # the step is still open
        optimizer.first_step()
    with pytest.raises(RuntimeError, match="finish that step"):
        m_sam_step(optimizer, [_micro_batch(problem, parameters, 1)])
    problem.set_gradients(parameters, 1, 1)
    optimizer.second_step()
    assert optimizer.attempted_steps == 2
    assert optimizer.ascent_due


def test_m_sam_step_refuses_invalid_arguments(seed):
    optimizer, parameters, problem = climbed(torch.float32, seed)
    closure = _micro_batch(problem, parameters, 1)
    with pytest.raises(ValueError, match="got none"):
        m_sam_step(optimizer, [])
    with pytest.raises(TypeError, match="got LookSAM"):
        m_sam_step(LookSAM(SGD(parameters, lr=0.1)), [closure])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"local_sam_step .*got LookSAM"):
        local_sam_step(nn.Linear(1, 1), LookSAM(SGD(parameters, lr=0.1)), closure)  # type: ignore[arg-type]
    before = bits(parameters)
    optimizer.first_step()
    after = bits(parameters)
    with pytest.raises(RuntimeError, match="finish that step"):
        m_sam_step(optimizer, [closure])
    assert_same_bits(parameters, after)
    optimizer.restore()

    def without_loss() -> Any:
        problem.set_gradients(parameters, 1, 0)

    with pytest.raises(TypeError, match="returned None"):
        m_sam_step(optimizer, [without_loss])
    calls = 0

    def only_once() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 1:
            problem.set_gradients(parameters, 1, 0)
        return torch.zeros(())

    with pytest.raises(RuntimeError, match="left no gradient"):
        m_sam_step(optimizer, [only_once])
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        m_sam_step(optimizer, [lambda: torch.zeros(())])
    assert_same_bits(parameters, before)
