"""Groups with ``perturb=False``: excluded from norm, perturbation and backup, included in the update."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, RMSprop

from fastsam import SAM, capture_step
from fastsam.optim import LookSAM, perturb_only
from fastsam.optim.capture import _frozen
from python_tests.optim.test_memory import live_bytes
from python_tests.optim.trajectories import (
    TOLERANCE,
    OracleSAM,
    Problem,
    assert_close,
    assert_same_bits,
    assert_torch_bits,
    make,
)

SHAPES: list[tuple[int, ...]] = [(7, 5), (11,), (3, 4, 2), (1,), (0, 3), (129,)]
GROUPS: list[tuple[int, dict[str, Any]]] = [
    (2, {"perturb": False}),
    (2, {"rho": 0.4}),
    (1, {"perturb": True}),
    (1, {"perturb": False}),
]
KEPT = (0, 1, 5)
"""Parameters of the groups that are not perturbed."""

BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "Adam": (Adam, {"lr": 0.03}),
    "AdamW": (AdamW, {"lr": 0.03, "weight_decay": 0.1}),
    "RMSprop": (RMSprop, {"lr": 0.01}),
}
WIDE = [torch.float32, torch.float64]


def problem_of(dtype: torch.dtype, seed: int) -> Problem:
    return Problem(SHAPES, GROUPS, dtype=dtype, seed=seed)


@pytest.mark.filterwarnings("ignore:the ascent left")
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("base", BASES)
def test_trajectories_equal_the_oracle(base, dtype, adaptive, seed):
    kind, options = BASES[base]
    if dtype is torch.float16 and kind is not SGD:
        options = {**options, "eps": 1e-3}
    problem = problem_of(dtype, seed)
    found, expected = (
        problem.run(*make(each, problem, kind, rho=0.2, adaptive=adaptive, **options), steps=8)
        for each in (SAM, OracleSAM)
    )
    # RMSprop runs in the dtype of the weights, the oracle in float64.
    assert_close(found, expected, TOLERANCE[dtype] * (5 if kind is RMSprop else 1))


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_the_ascent_excludes_groups_with_perturb_false(dtype, seed):
    problem = problem_of(dtype, seed)
    optimizer, parameters = make(SAM, problem, SGD, rho=0.2, adaptive=True, lr=0.1)
    problem.set_gradients(parameters, 0, 0)
    versions = [p._version for p in parameters]
    squares = sum(
        float((p.detach().double() * p.grad.double()).square().sum())
        for i, p in enumerate(parameters)
        if i not in KEPT
    )
    optimizer.first_step()
    assert float(optimizer.ascent_norm) == pytest.approx(squares**0.5, rel=1e-6)
    for i, (p, start) in enumerate(zip(parameters, problem.start, strict=True)):
        if p.numel():
            assert torch.equal(p, start) == (i in KEPT)
            assert (p._version == versions[i]) == (i in KEPT)
    optimizer.restore()
    assert_same_bits(parameters, problem.start)


@pytest.mark.parametrize("base", BASES)
def test_a_gradient_that_is_not_finite_counts_where_it_is_used(base, seed):
    """The first pass ignores gradients of unperturbed parameters; the second uses all."""
    kind, options = BASES[base]
    problem = problem_of(torch.float64, seed)

    def planted(parameter: int, which: int, value: float) -> Any:
        return lambda i, step, pass_: value if (i, step, pass_) == (parameter, 1, which) else True

    for value in (float("nan"), float("inf")):
        for parameter in (KEPT[0], 2):
            for which in (0, 1):
                optimizer, parameters = make(SAM, problem, kind, rho=0.2, **options)
                problem.run(optimizer, parameters, range(1))
                before = [p.detach().clone() for p in parameters]
                gradients = planted(parameter, which, value)
                found = problem.run(optimizer, parameters, range(1, 2), gradients)
                harmless = parameter in KEPT and which == 0
                assert int(optimizer.skipped_steps) == (not harmless)
                if harmless:
                    twin, others = make(SAM, problem, kind, rho=0.2, **options)
                    assert_same_bits(found, problem.run(twin, others, 2))
                else:
                    assert_same_bits(found, before)
                # The flag is cleared in the next step.
                problem.run(optimizer, parameters, range(2, 3))
                assert int(optimizer.skipped_steps) == (not harmless)


def test_a_scaler_skips_for_the_gradients_that_are_used(seed):
    problem = problem_of(torch.float32, seed)
    for parameter, skips in ((KEPT[0], 0), (2, 1)):
        optimizer, parameters = make(SAM, problem, SGD, rho=0.2, lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.ones(()))
        problem.set_gradients(
            parameters, 0, 0, lambda i, step, which, at=parameter: float("inf") if i == at else True
        )
        scaler.step(optimizer.ascent)
        problem.set_gradients(parameters, 0, 1)
        scaler.step(optimizer)
        scaler.update()
        assert int(optimizer.skipped_steps) == skips
        assert scaler.get_scale() == 2.0  # the scaler still lowers the scale


@pytest.mark.filterwarnings("ignore:the ascent left")
@pytest.mark.parametrize(("dtype", "bytes_each"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_excluded_parameters_have_no_backup(dtype, bytes_each):
    perturbed = nn.Parameter(torch.ones(1000, dtype=dtype))
    kept = nn.Parameter(torch.ones(100_000, dtype=dtype))
    optimizer = SAM(
        [{"params": [perturbed]}, {"params": [kept], "perturb": False}], SGD, rho=9.0, lr=0.1
    )
    for p in (perturbed, kept):
        p.grad = torch.ones_like(p)
    before = live_bytes()
    optimizer.first_step()
    optimizer.second_step()
    gc.collect()
    assert live_bytes() - before == pytest.approx(1000 * bytes_each, abs=4096)


# --- the option ---------------------------------------------------------------------------------


def pair() -> list[dict[str, Any]]:
    return [
        {"params": [nn.Parameter(torch.ones(2))], "perturb": perturb} for perturb in (True, False)
    ]


def test_perturb_is_an_option_of_the_groups():
    optimizer = SAM([nn.Parameter(torch.ones(2))], SGD, lr=0.1)
    assert optimizer.param_groups[0]["perturb"] is True
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "perturb": False})
    optimizer.base_optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert [g["perturb"] for g in optimizer.state_dict()["param_groups"]] == [True, False, True]
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert [g["perturb"] for g in twin.param_groups] == [True, False, True]
    ready = SGD(pair(), lr=0.1)
    assert [g["perturb"] for g in SAM(optimizer=ready).param_groups] == [True, False]


def test_perturb_survives_base_checkpoints_and_is_loaded_from_sam_checkpoints():
    optimizer = SAM(pair(), SGD, lr=0.1)
    plain = SGD([{"params": g["params"]} for g in pair()], lr=0.2).state_dict()
    optimizer.load_state_dict(plain)
    assert [g["perturb"] for g in optimizer.param_groups] == [True, False]
    optimizer.base_optimizer.load_state_dict(plain)
    assert [g["perturb"] for g in optimizer.param_groups] == [True, False]
    other = SAM([{"params": g["params"]} for g in pair()], SGD, lr=0.1)
    other.load_state_dict(optimizer.state_dict())
    assert [g["perturb"] for g in other.param_groups] == [True, False]


@pytest.mark.parametrize("value", [1, 0, "no", None, np.bool_(False), torch.tensor(False)])
def test_perturb_must_be_true_or_false(value):
    groups = [{"params": [nn.Parameter(torch.ones(2))], "perturb": value}]
    with pytest.raises(ValueError, match="perturb must be True or False"):
        SAM(groups, SGD, lr=0.1)
    with pytest.raises(ValueError, match="perturb must be True or False"):
        SAM(pair(), SGD, lr=0.1).add_param_group(groups[0])


def test_one_group_must_be_perturbed():
    message = "perturb=False in every parameter group.*perturb=True"
    none = [{**group, "perturb": False} for group in pair()]
    with pytest.raises(ValueError, match=message):
        SAM([dict(group) for group in none], SGD, lr=0.1)
    ready = SGD([dict(group) for group in none], lr=0.1)
    with pytest.raises(ValueError, match=message):
        SAM(optimizer=ready)
    assert "rho" not in ready.param_groups[0]
    assert "rho" not in ready.defaults

    optimizer = SAM(pair(), SGD, lr=0.1)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["perturb"] = False
    state["param_groups"][0]["lr"] = 7.0
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match=message):
        optimizer.param_groups = [{**group, "perturb": False} for group in optimizer.param_groups]
    swapped = SAM(pair()[::-1], SGD, lr=0.1)
    with pytest.raises(
        ValueError, match=message
    ):  # it would inherit the option of the previous group
        swapped.param_groups = [{"params": [nn.Parameter(torch.ones(2))], "lr": 0.1}]
    assert [g["perturb"] for g in optimizer.param_groups] == [True, False]
    assert optimizer.param_groups[0]["lr"] == 0.1

    # A change that does not call SAM is detected when the step begins.
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    for change in (
        lambda: optimizer.param_groups[0].update(perturb=False),
        lambda: optimizer.base_optimizer.load_state_dict(state),
    ):
        change()
        for p in weights:
            p.grad = torch.ones_like(p)
        with pytest.raises(ValueError, match=message):
            optimizer.first_step()
        assert_same_bits(weights, [torch.ones(2)] * 2)
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "perturb": False})
        optimizer.param_groups[0].update(perturb=True, lr=0.1)
        optimizer.first_step()
        optimizer.restore()


@pytest.mark.parametrize("base", BASES)
def test_perturb_may_change_between_steps(base, seed):
    kind, options = BASES[base]
    problem = problem_of(torch.float64, seed)
    results = []
    for each in (SAM, OracleSAM):
        optimizer, parameters = make(each, problem, kind, rho=0.2, **options)
        groups = optimizer.groups if each is OracleSAM else optimizer.param_groups
        problem.run(optimizer, parameters, range(3))
        groups[0]["perturb"], groups[1]["perturb"] = True, False
        problem.run(optimizer, parameters, range(3, 5))
        groups[1]["perturb"] = True
        results.append(problem.run(optimizer, parameters, range(5, 7)))
    assert_close(*results, TOLERANCE[torch.float64])


def test_a_captured_step_notices_a_change_of_perturb():
    optimizer = SAM(pair(), SGD, lr=0.1)
    before = _frozen(optimizer)
    assert _frozen(optimizer) == before
    optimizer.param_groups[1]["perturb"] = True
    assert _frozen(optimizer) != before


def test_a_step_of_capture_step_on_the_cpu(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)).double()
    twin = copy.deepcopy(model)
    batch = torch.randn(16, 4, dtype=torch.float64), torch.randint(3, (16,))
    loss_fn = nn.CrossEntropyLoss()
    options: dict[str, Any] = {"rho": 0.5, "lr": 0.1, "momentum": 0.9}
    step = capture_step(
        model, loss_fn, SAM(perturb_only(model, "normalization"), SGD, **options), batch
    )
    oracle = OracleSAM(
        [
            {"params": list(twin[1].parameters())},
            {"params": [*twin[0].parameters(), *twin[2].parameters()], "perturb": False},
        ],
        SGD,
        **options,
    )
    for _ in range(4):
        step(batch)
        for half in (oracle.first_step, oracle.second_step):
            loss_fn(twin(batch[0]), batch[1]).backward()
            half(zero_grad=True)
    assert_close(*([p.detach() for p in m.parameters()] for m in (model, twin)), 1e-12)


# --- with the ascent policy ---------------------------------------------------------------------


@pytest.mark.parametrize("prepares", [False, True])
@pytest.mark.parametrize("base", ["SGD", "AdamW"])
def test_no_backup_exists_before_the_first_ascent_nor_for_excluded_parameters(base, prepares, seed):
    kind, options = BASES[base]
    problem = problem_of(torch.float64, seed)
    optimizer, parameters = make(SAM, problem, kind, rho=0.3, start=2, **options)

    def backups() -> dict[bool, list[bool]]:
        found: dict[bool, list[bool]] = {True: [], False: []}
        for bucket in optimizer.native_step._buckets:
            found[bucket.perturbs].append(bucket.backup is not None)
        return found

    if prepares:
        optimizer.prepare()
        assert backups() == {True: [True], False: [False]}
    for step in range(4):
        problem.set_gradients(parameters, step, 0)
        if optimizer.ascent_due:
            optimizer.first_step(zero_grad=True)
            problem.set_gradients(parameters, step, 1)
        optimizer.step()
        assert backups() == {True: [prepares or step >= 2], False: [False]}


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_a_step_without_ascent_updates_excluded_parameters_like_the_others(dtype, seed):
    kind, options = BASES["SGD"]
    problem = problem_of(dtype, seed)
    runs = []
    for each, own in ((SAM, {"rho": 0.3, "start": 3}), (SGD, {"foreach": False})):
        parameters = problem.parameters()
        groups = problem.param_groups(parameters)
        if each is SAM:
            optimizer: Any = SAM(groups, kind, **own, **options)
        else:
            optimizer = SGD(parameters, **own, **options)
        for step in range(3):
            problem.set_gradients(parameters, step, 0)
            optimizer.step()
        runs.append([p.detach() for p in parameters])
    assert_torch_bits(*runs)


def test_trajectories_with_an_interval_equal_the_oracle(seed):
    kind, options = BASES["SGD"]
    problem = problem_of(torch.float64, seed)
    optimizer, parameters = make(SAM, problem, kind, rho=0.3, start=1, interval=2, **options)
    oracle, doubles = make(OracleSAM, problem, kind, rho=0.3, **options)
    for step in range(6):
        due = step % 2 == 1
        assert optimizer.ascent_due is due
        for which in range(1 + due):
            for each, weights in ((optimizer, parameters), (oracle, doubles)):
                problem.set_gradients(weights, step, which)
                if which < due:
                    each.first_step(zero_grad=True)
        optimizer.step()
        if due:
            oracle.second_step()
        else:
            for p, double in zip(doubles, oracle.doubles, strict=True):
                double.grad = None if p.grad is None else p.grad.double()
            oracle.base.step()
            with torch.no_grad():
                for p, double in zip(doubles, oracle.doubles, strict=True):
                    p.copy_(double)
    assert_close([p.detach() for p in parameters], [p.detach() for p in doubles], 1e-12)


def test_the_rho_of_excluded_groups_makes_no_ascent_due():
    groups = [{**pair()[0], "rho": 0.0}, {**pair()[1], "rho": 0.5}]
    optimizer = SAM(groups, SGD, lr=0.1)
    assert not optimizer.ascent_due
    optimizer.restore()
    optimizer.param_groups[0]["rho"] = 0.5
    assert optimizer.ascent_due


def test_gradients_of_excluded_parameters_suffice_where_no_ascent_is_due():
    groups = pair()
    perturbed, kept = (group["params"][0] for group in groups)
    optimizer = SAM(groups, SGD, lr=0.25, start=2)
    for call in (optimizer.step, optimizer.second_step):
        kept.grad = torch.ones(2)
        optimizer.first_step()
        call()
    assert_same_bits([perturbed, kept], [torch.ones(2), torch.full((2,), 0.5)])
    with pytest.raises(RuntimeError, match="only parameters of groups with perturb=False"):
        optimizer.first_step()
    kept.grad = None
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        optimizer.first_step()
    perturbed.grad = torch.ones(2)
    optimizer.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match="second pass left no gradient"):
        optimizer.step()


def test_both_checks_of_all_groups_run_wherever_groups_change():
    perturbed, kept = pair()
    wrong: dict[str, list[dict[str, Any]]] = {
        "must agree on start": [{**perturbed, "start": 1}, {**kept, "start": 2}],
        "perturb=False in every": [
            {**perturbed, "perturb": False, "start": 1},
            {**kept, "start": 1},
        ],
    }
    for message, groups in wrong.items():
        with pytest.raises(ValueError, match=message):
            SAM(copy.deepcopy(groups), SGD, lr=0.1)
        with pytest.raises(ValueError, match=message):
            SAM(optimizer=SGD(copy.deepcopy(groups), lr=0.1))
        optimizer = SAM(pair(), SGD, lr=0.1, start=1)
        before = [dict(group) for group in optimizer.param_groups]
        with pytest.raises(ValueError, match=message):
            optimizer.param_groups = [
                {**now, **group} for now, group in zip(before, groups, strict=True)
            ]
        state = copy.deepcopy(optimizer.state_dict())
        for saved, group in zip(state["param_groups"], groups, strict=True):
            saved |= {name: value for name, value in group.items() if name != "params"}
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
        for group, now in zip(before, optimizer.param_groups, strict=True):
            assert group["params"] is now["params"]
            assert {k: v for k, v in group.items() if k != "params"} == {
                k: v for k, v in now.items() if k != "params"
            }
    optimizer = SAM(pair()[:1], SGD, lr=0.1, start=1)
    with pytest.raises(ValueError, match="must agree on start"):
        optimizer.add_param_group({**kept, "start": 2})
    optimizer.add_param_group(kept)
    assert optimizer.param_groups[1]["start"] == 1
    optimizer.param_groups[0]["perturb"] = False
    for call in (lambda: optimizer.ascent_due, optimizer.prepare):
        with pytest.raises(ValueError, match="perturb=False in every"):
            call()


# --- other parts of a step ----------------------------------------------------------------------


def test_an_ascent_with_gradients_of_excluded_parameters_only_is_refused():
    groups = pair()
    optimizer = SAM(groups, SGD, lr=0.1)
    groups[1]["params"][0].grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="only parameters of groups with perturb=False"):
        optimizer.first_step()
    groups[1]["params"][0].grad = None
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        optimizer.first_step()
    # No gradient in the first pass, as after a pass over a part of the network, is no error.
    groups[0]["params"][0].grad = torch.ones(2)
    optimizer.first_step(zero_grad=True)
    groups[1]["params"][0].grad = torch.ones(2)
    optimizer.second_step()
    assert_same_bits([groups[0]["params"][0]], [torch.ones(2)])
    assert_close([groups[1]["params"][0].detach()], [torch.full((2,), 0.9)], 1e-6)


def test_frozen_excluded_parameters_may_have_any_dtype(seed):
    frozen = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    groups = pair()
    groups[1]["params"].append(frozen)
    optimizer = SAM(groups, SGD, lr=0.1)
    for half in (optimizer.first_step, optimizer.second_step):
        for group in groups:
            group["params"][0].grad = torch.ones(2)
        half(zero_grad=True)
    assert torch.equal(frozen, torch.ones(3, dtype=torch.int8))
    assert float(groups[1]["params"][0].detach()[0]) == pytest.approx(0.9)


@pytest.mark.parametrize("closure", ["second_pass", "both_passes"])
def test_closures(closure, seed):
    problem = problem_of(torch.float64, seed)
    optimizer, parameters = make(SAM, problem, SGD, rho=0.2, lr=0.1, closure=closure)
    which = 1 if closure == "second_pass" else 0

    def run() -> float:
        nonlocal which
        optimizer.zero_grad()
        problem.set_gradients(parameters, 0, which)
        which += 1
        return 1.0

    if closure == "second_pass":
        problem.set_gradients(parameters, 0, 0)
    assert optimizer.step(run) == 1.0
    assert which == 2
    expected = problem.run(*make(OracleSAM, problem, SGD, rho=0.2, lr=0.1), steps=1)
    assert_close([p.detach() for p in parameters], expected, 1e-12)


def test_rounding_counts_only_perturbed_weights(seed):
    """Neither stochastic rounding nor the warning about lost ascents affects the others."""
    lost = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    moved = nn.Parameter(torch.ones(10))
    optimizer = SAM(
        [{"params": [moved]}, {"params": [lost], "perturb": False, "stochastic_rounding": True}],
        SGD,
        rho=1e-3,
        lr=0.25,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for half in (optimizer.first_step, optimizer.second_step):
            moved.grad, lost.grad = torch.ones_like(moved), torch.ones_like(lost)
            half()
            assert float(optimizer.unchanged_share) == 0.0
            if half == optimizer.first_step:
                assert_same_bits([lost], [torch.ones(1000, dtype=torch.bfloat16)])
    assert_same_bits([lost], [torch.full((1000,), 0.75, dtype=torch.bfloat16)])
    both = SAM(
        [{"params": [lost]}, {"params": [nn.Parameter(lost.detach().clone())], "perturb": False}],
        SGD,
        rho=1e-6,
        lr=0.1,
    )
    lost.grad = torch.ones_like(lost)
    with pytest.warns(UserWarning, match="the ascent left 100%"):
        both.first_step()
    assert float(both.unchanged_share) == 1.0
    both.restore()


def test_weights_with_gaps_and_a_step_without_ascent(seed):
    memory = torch.randn(4, 12, dtype=torch.float64)
    start = memory.clone()
    gaps = nn.Parameter(memory[:, ::2])
    plain = nn.Parameter(torch.randn(5, dtype=torch.float64))
    before = plain.detach().clone()
    groups = [{"params": [plain]}, {"params": [gaps], "perturb": False}]
    optimizer = SAM(groups, SGD, lr=0.5, start=1)
    gaps.grad, plain.grad = torch.ones_like(gaps), torch.ones_like(plain)
    optimizer.step()
    start[:, ::2] -= 0.5
    assert_same_bits([memory, plain], [start, before - 0.5])
    optimizer.first_step()
    assert_same_bits([memory], [start])
    optimizer.second_step()
    start[:, ::2] -= 0.5
    assert_same_bits([memory, plain], [start, before - 1.0])


def test_the_direction_of_looksam_includes_all_parameters(seed):
    """Perturbing some parameters changes the gradients of all, and the update uses all."""
    problem = problem_of(torch.float64, seed)
    parameters = problem.parameters()
    optimizer = LookSAM(SGD(problem.param_groups(parameters), lr=0.1), rho=0.2, every=2, alpha=0.3)
    oracle, doubles = make(OracleSAM, problem, SGD, rho=0.2, lr=0.1)
    directions: list[Tensor] = []
    for step in range(4):
        for which, _ in enumerate(optimizer.passes()):
            problem.set_gradients(parameters, step, which)
        problem.set_gradients(doubles, step, 0)
        first = [p.grad.clone() for p in doubles]
        norm = _norm(first)
        oracle.first_step()
        if step % 2 == 0:
            problem.set_gradients(doubles, step, 1)
            second = [p.grad for p in doubles]
            share = sum(float((a * b).sum()) for a, b in zip(first, second, strict=True)) / norm**2
            parts = [b - share * a for a, b in zip(first, second, strict=True)]
            directions = [part / _norm(parts) for part in parts]
        else:
            for p, gradient, direction in zip(doubles, first, directions, strict=True):
                p.grad = gradient + 0.3 * norm * direction
        oracle.second_step()
    assert_close([p.detach() for p in parameters], [p.detach() for p in doubles], 1e-10)


def _norm(tensors: list[Tensor]) -> float:
    return sum(float(t.square().sum()) for t in tensors) ** 0.5


def test_looksam_keeps_its_direction_where_a_first_gradient_was_broken(seed):
    problem = problem_of(torch.float64, seed)
    parameters = problem.parameters()
    optimizer = LookSAM(SGD(problem.param_groups(parameters), lr=0.1), rho=0.2, every=1, alpha=0.3)
    for which, _ in enumerate(optimizer.passes()):
        problem.set_gradients(parameters, 0, which)
    before = [optimizer.state[p]["flat_direction"].clone() for p in parameters]

    def broken(parameter: int, step: int, which: int) -> Any:
        return float("nan") if (parameter, which) == (0, 0) else True

    for which, _ in enumerate(optimizer.passes()):
        problem.set_gradients(parameters, 1, which, broken)
    assert int(optimizer.skipped_steps) == 0
    assert_same_bits([optimizer.state[p]["flat_direction"] for p in parameters], before)
    assert all(bool(p.isfinite().all()) for p in parameters)


# --- perturb_only -------------------------------------------------------------------------------


class LlamaRMSNorm(nn.Module):
    """A normalization class that is not torch's, as in many networks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.inner = nn.Linear(width, width)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norms = nn.ModuleList(
            [
                nn.BatchNorm2d(4),
                nn.LayerNorm(4),
                nn.GroupNorm(2, 4),
                nn.InstanceNorm1d(4, affine=True),
                nn.RMSNorm(4),
                nn.SyncBatchNorm(4),
                nn.BatchNorm1d(4, affine=False),
            ]
        )
        self.own = LlamaRMSNorm(4)
        self.head = nn.Linear(4, 2)


def names(group: dict[str, Any]) -> list[str]:
    return [name for name, _ in group["params"]]


def test_normalization_layers_are_chosen():
    model = Network()
    chosen, rest = perturb_only(model, "normalization")
    affine = [
        f"norms.{i}.{kind}"
        for i in range(6)
        for kind in ("weight", "bias")
        if (i, kind) != (4, "bias")
    ]
    assert names(chosen) == [*affine, "own.weight"]
    assert chosen["perturb"] is True
    assert rest["perturb"] is False
    everything = [name for name, _ in model.named_parameters()]
    assert sorted(names(chosen) + names(rest)) == sorted(everything)
    by_name = dict(model.named_parameters())
    assert all(p is by_name[name] for group in (chosen, rest) for name, p in group["params"])
    optimizer = SAM([chosen, rest], SGD, lr=0.1, adaptive="weights")
    assert optimizer.param_groups[0]["param_names"] == [*affine, "own.weight"]


def test_names_of_parameters_and_modules_and_functions_of_them():
    model = Network()
    assert names(perturb_only(model, ["head", "conv.bias"])[0]) == [
        "conv.bias",
        "head.weight",
        "head.bias",
    ]
    assert names(perturb_only(model, ("own.weight",))[0]) == ["own.weight"]
    assert names(perturb_only(model, lambda name: name.endswith("bias"))[0])[0] == "conv.bias"
    (group,) = perturb_only(model, lambda name: True)
    assert group["perturb"] is True
    # "hea" is not a module, and "own" is not the beginning of a name.
    with pytest.raises(ValueError, match="Network has no parameter named 'hea'"):
        perturb_only(model, ["head", "hea"])


def test_tied_parameters_occur_once():
    model = Network()
    model.head.bias = model.conv.bias = nn.Parameter(torch.ones(4))
    model.norms[1].weight = model.norms[0].weight
    chosen, rest = perturb_only(model, ["head.bias", "conv.bias", "norms.1.weight"])
    assert names(chosen) == ["conv.bias", "norms.0.weight"]
    assert not {id(p) for _, p in chosen["params"]} & {id(p) for _, p in rest["params"]}
    SAM([chosen, rest], SGD, lr=0.1)


@pytest.mark.parametrize("chosen", [[], (), lambda name: False], ids=["list", "tuple", "function"])
def test_an_empty_choice_is_refused(chosen):
    with pytest.raises(ValueError, match="found no parameter of Network"):
        perturb_only(Network(), chosen)


def test_a_model_without_normalization_is_refused():
    with pytest.raises(ValueError, match="found no parameter of Linear"):
        perturb_only(nn.Linear(2, 2), "normalization")
    with pytest.raises(ValueError, match="found no parameter of BatchNorm1d"):
        perturb_only(nn.BatchNorm1d(2, affine=False), "normalization")


def test_invalid_choices_are_refused():
    with pytest.raises(ValueError, match=r"got 'norm'; for a single name pass \['norm'\]"):
        perturb_only(Network(), "norm")  # type: ignore[arg-type]
    for wrong in (None, 3, [1], {"head"}):
        with pytest.raises(TypeError, match="perturb_only expects"):
            perturb_only(Network(), wrong)  # type: ignore[arg-type]
