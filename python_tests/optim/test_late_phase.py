"""Runs with late ascents: the base optimizer's bits before the first ascent, SAM's trajectory after it."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Collection
from typing import Any

import pytest
import torch
from torch import nn

from fastsam import SAM
from python_tests.optim.late_phase import (
    FORMS,
    POLICIES,
    RESUMES,
    RHO,
    SGD,
    STEPS,
    Form,
    Task,
    assert_equals_base_until,
    reference,
    run,
    sam,
    weights,
)
from python_tests.optim.trajectories import (
    TOLERANCE,
    assert_close,
    assert_same_bits,
    assert_torch_bits,
)

OPTIONS: list[dict[str, Any]] = [
    {"lr": 0.1},
    {"lr": 0.1, "weight_decay": 1e-2},
    {"lr": 0.1, "momentum": 0.9},
    {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2},
    {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    SGD,
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.5},
    {"lr": 0.01, "momentum": 0.5, "maximize": True},
]
DTYPES = [torch.float32, torch.float64]
Policy = tuple[dict[str, int], Collection[int]]


@pytest.fixture(params=POLICIES)
def policy(request: pytest.FixtureRequest) -> Policy:
    return POLICIES[request.param]


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Form:
    return FORMS[request.param]


def text(value: Any) -> str | None:
    if isinstance(value, dict):
        return "-".join(f"{key}={option}" for key, option in value.items())
    return None if isinstance(value, str) else str(value)


def first_of(due: Collection[int]) -> int:
    return min(due, default=STEPS)


def expected_run(
    task: Task, form: Form, due: Collection[int], **options: Any
) -> list[list[torch.Tensor]]:
    quiet = Task(task.seed, task.dtype)  # with its own counter
    backward = quiet.backward_in_parts if form.in_parts else quiet.backward
    return reference(quiet, due, backward=backward, **options)


# --- the trajectory -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=text)
def test_every_form_is_the_base_until_the_first_ascent_and_sam_after(
    form: Form, policy: Policy, dtype: torch.dtype, seed: int
) -> None:
    """With exactly the required number of passes."""
    options, due = policy
    task = Task(seed, dtype)
    model = task.network()
    found = run(task, form, model, sam(form, model, options))
    expected = expected_run(task, form, due, foreach=False, **SGD)
    assert_equals_base_until(first_of(due), found, expected)
    assert [task.passes[n] for n in range(STEPS)] == [
        form.ascent_passes if n in due else form.plain_passes for n in range(STEPS)
    ]


@pytest.mark.parametrize("foreach", [False, True], ids=["for-loop", "foreach"])
@pytest.mark.parametrize("dtype", DTYPES, ids=text)
@pytest.mark.parametrize("options", OPTIONS, ids=text)
@pytest.mark.parametrize("form", ["two calls, asks", "closure for both passes"])
def test_every_kind_of_sgd(
    form: str, options: dict[str, Any], dtype: torch.dtype, foreach: bool, seed: int
) -> None:
    task = Task(seed, dtype)
    for policy, due in POLICIES.values():
        model = task.network()
        found = run(task, FORMS[form], model, sam(FORMS[form], model, policy, **options))
        expected = expected_run(task, FORMS[form], due, foreach=foreach, **options)
        assert_equals_base_until(first_of(due), found, expected)


def test_the_reference_runs_of_the_policies_differ(seed: int) -> None:
    """Otherwise the tests above could not distinguish the policies."""
    ends = [reference(Task(seed), due)[-1] for _, due in POLICIES.values()]
    for i, one in enumerate(ends):
        for other in ends[:i]:
            worst = max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))
            assert worst > 100 * TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("base", "options"),
    [
        (torch.optim.RMSprop, {"lr": 0.02, "momentum": 0.9, "eps": 1e-2}),
        (torch.optim.NAdam, {"lr": 0.02, "eps": 1e-3}),
        (type("Subclass", (torch.optim.SGD,), {}), SGD),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_other_bases_run_their_own_step(
    form: Form, base: Any, options: dict[str, Any], seed: int
) -> None:
    """With the bits of torch, with and without the check of gradients."""
    policy, due = POLICIES["late, every second step"]
    expected = expected_run(Task(seed), form, due, base=base, **options)
    for check_finite in (True, False):
        task = Task(seed)
        model = task.network()
        settings = {"base_optimizer": base, "check_finite": check_finite, **options}
        found = run(task, form, model, sam(form, model, policy, **settings))
        assert_equals_base_until(first_of(due), found, expected)


@pytest.mark.parametrize("base", [torch.optim.Adam, torch.optim.AdamW])
def test_adam_has_the_bits_of_fastsam_s_own_update(form: Form, base: Any, seed: int) -> None:
    """Tested with an ascent in every step whose radius is too small to move any weight."""
    options = {"lr": 0.05, "weight_decay": 0.1, "amsgrad": True, "eps": 1e-3}
    task, policy = Task(seed), {"start": 5}
    model, twin = task.network(), task.network()
    found = run(task, form, model, sam(form, model, policy, base_optimizer=base, **options))
    still = sam(form, twin, {}, base_optimizer=base, **options, rho=1e-30)
    own = run(Task(seed), form, twin, still)
    for n in range(5):
        assert_same_bits(found[n], own[n])
    expected = expected_run(task, form, range(5, STEPS), base=base, **options)
    assert_equals_base_until(0, found, expected)


@pytest.mark.parametrize("prepared", [False, True])
def test_layers_that_thaw_at_start(form: Form, prepared: bool, seed: int) -> None:
    """Frozen parameters have no state and no backup, even if memory is prepared before they thaw."""
    policy, due = POLICIES["late"]
    task = Task(seed)
    model = task.network()
    optimizer = sam(form, model, policy)

    def backward(model: nn.Module, n: int) -> None:
        for p in model[0].parameters():
            p.requires_grad_(n >= 5)
            p.grad = p.grad if n >= 5 else None
        one = quiet.backward_in_parts if form.in_parts else quiet.backward
        one(model, n)

    quiet = Task(seed)
    expected = reference(quiet, due, backward=backward, **SGD)
    found = []
    for n in range(STEPS):
        for p in model[0].parameters():
            p.requires_grad_(n >= 5)
        if prepared and n == 2:
            optimizer.prepare()
        found += run(task, form, model, optimizer, range(n, n + 1))
    assert_equals_base_until(5, found, expected)
    assert_same_bits(found[4][:2], weights(task.network())[:2])


@pytest.mark.parametrize("dtype", DTYPES, ids=text)
@pytest.mark.parametrize("options", OPTIONS, ids=text)
def test_a_step_without_an_ascent_of_any_layout(
    options: dict[str, Any], dtype: torch.dtype, seed: int
) -> None:
    """Channels last, transposed, with gaps, empty, no dimensions; gradients None or laid out otherwise."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    start = [
        draw(5, 3, 3, 3).to(memory_format=torch.channels_last),
        draw(7, 9).t(),
        draw(6, 10)[:, ::2],
        draw(0, 4),
        draw(),
        draw(1031),
    ]
    pairs = [[nn.Parameter(w.clone()) for w in start] for _ in range(2)]
    for pair in pairs:  # the clone of a view with gaps has none
        pair[2] = nn.Parameter(start[2].repeat_interleave(2, 1)[:, ::2])
        assert not pair[2].is_contiguous()
    ours = SAM(pairs[0], torch.optim.SGD, start=100, **options)
    theirs = torch.optim.SGD(pairs[1], foreach=False, **options)
    for n in range(6):
        for i in range(len(start)):
            gradient = draw(*start[i].shape)
            for pair in pairs:
                pair[i].grad = None if (n + i) % 4 == 0 else gradient.clone()
        ours.step()
        theirs.step()
        assert_torch_bits(*([p.detach() for p in pair] for pair in pairs))


def test_groups_with_their_own_radius(seed: int) -> None:
    """One group has none, another a tensor, and a third gets one in the middle of the run."""
    task = Task(seed)
    model = task.network()
    layers = [list(model[i].parameters()) for i in (0, 2, 4)]
    radii = [0.0, torch.tensor(0.2), 0.0]
    groups = [{"params": p, "rho": rho} for p, rho in zip(layers, radii, strict=True)]
    optimizer = SAM(groups, torch.optim.SGD, start=3, **SGD)
    twin = task.network()
    parts = [list(twin[i].parameters()) for i in (0, 2, 4)]
    base = torch.optim.SGD(twin.parameters(), **SGD)
    for n in range(STEPS):
        if n == 4:
            optimizer.param_groups[1]["rho"] = torch.tensor(0.0)
        if n == 8:
            optimizer.param_groups[2]["rho"] = 0.1
        radius = {3: (0, 0.2, 0)}.get(n, (0, 0, 0.1) if n >= 8 else None)
        assert optimizer.ascent_due == (radius is not None)
        task.backward(model, n)
        if optimizer.ascent_due:
            optimizer.first_step(zero_grad=True)
            task.backward(model, n)
        optimizer.step()
        optimizer.zero_grad()
        task.backward(twin, n)
        if radius is not None:
            before = weights(twin)
            norm = torch.stack([p.grad.double().norm() for p in twin.parameters()]).norm()
            with torch.no_grad():
                for part, rho in zip(parts, radius, strict=True):
                    for p in part:
                        p += p.grad * (rho / norm).float()
            base.zero_grad()
            task.backward(twin, n)
            with torch.no_grad():
                for p, value in zip(twin.parameters(), before, strict=True):
                    p.copy_(value)
        base.step()
        base.zero_grad()
        if n < 3:
            assert_torch_bits(weights(model), weights(twin))
        assert_close(weights(model), weights(twin), 1e-5)


# --- resume -------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [3, 5, 6, 8])
@pytest.mark.parametrize("way", RESUMES)
def test_a_resumed_run_equals_an_uninterrupted_one(
    form: Form, way: str, at: int, seed: int
) -> None:
    """Before ``start``, at it, and after it on either side of an ascent."""
    policy, due = {"start": 5, "interval": 2}, range(5, STEPS, 2)
    task = Task(seed)
    model = task.network()
    whole = run(task, form, model, sam(form, model, policy))

    def make(model: nn.Module) -> SAM:
        """Construct an optimizer whose options the checkpoint must replace."""
        return sam(form, model, {"start": 1, "interval": 5})

    again = Task(seed)
    model = again.network()
    optimizer = sam(form, model, policy)
    first = run(again, form, model, optimizer, range(at))
    resumed, optimizer = RESUMES[way](again, model, optimizer, make)
    rest = run(again, form, resumed, optimizer, range(at, STEPS))
    for found, expected in zip([*first, *rest], whole, strict=True):
        assert_same_bits(found, expected)
    assert [again.passes[n] for n in range(STEPS)] == [
        form.ascent_passes if n in due else form.plain_passes for n in range(STEPS)
    ]


@pytest.mark.parametrize("way", ["first_attempt", "attribute of the state dict"])
def test_a_run_that_began_without_sam(form: Form, way: str, seed: int) -> None:
    """SAM resumes a checkpoint of torch.optim.SGD, with its counter starting where that run stopped."""
    task = Task(seed)
    model = task.network()
    plain = torch.optim.SGD(model.parameters(), **SGD)
    backward = task.backward_in_parts if form.in_parts else task.backward
    for n in range(4):
        backward(model, n)
        plain.step()
        plain.zero_grad()
    saved = plain.state_dict()
    first = 4 if way == "first_attempt" else 0
    optimizer = sam(form, model, {"start": 6, "first_attempt": first})
    if way != "first_attempt":
        saved["attempted_steps"] = 4
    optimizer.load_state_dict(saved)
    found = run(task, form, model, optimizer, range(4, STEPS))
    expected = expected_run(task, form, range(6, STEPS))[4:]
    assert_equals_base_until(2, found, expected)


def test_a_checkpoint_of_sgd_counts_from_zero_by_default(seed: int) -> None:
    task = Task(seed)
    model = task.network()
    plain = torch.optim.SGD(model.parameters(), **SGD)
    task.backward(model, 0)
    plain.step()
    optimizer = sam(FORMS["two calls, asks"], model, {"start": 2})
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.attempted_steps == 0
    assert not optimizer.ascent_due


# --- skipped and abandoned steps ----------------------------------------------------------------


@pytest.mark.parametrize("broken", [(6, 0), (6, 1), (7, 0)], ids=str)
@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if not form.in_parts])
def test_a_skipped_step_counts_and_the_next_one_is_made(
    name: str, broken: tuple[int, int], seed: int
) -> None:
    """NaN in pass one and in pass two of an ascent, and in a step without one."""
    form = FORMS[name]
    policy, due = {"start": 4, "interval": 2}, (4, 6, 8, 10)
    # A step without an ascent may make its pass twice: both are broken.
    task = Task(seed, broken={broken, (7, 1)} if broken[0] == 7 else {broken})
    model = task.network()
    optimizer = sam(form, model, policy)
    found = run(task, form, model, optimizer)
    assert_equals_base_until(4, found, expected_run(task, form, due, skip={broken[0]}))
    assert_same_bits(found[broken[0]], found[broken[0] - 1])
    assert int(optimizer.skipped_steps) == 1
    assert optimizer.attempted_steps == STEPS


@pytest.mark.parametrize("at", [2, 6])
def test_an_abandoned_ascent_does_not_count(at: int, seed: int) -> None:
    """``restore()`` changes neither the number of the step nor whether its ascent is due."""
    task = Task(seed)
    model = task.network()
    form = FORMS["two calls, does not ask"]
    optimizer = sam(form, model, {"start": 5})
    found = run(task, form, model, optimizer, range(at))
    due = optimizer.ascent_due
    task.backward(model, at)
    optimizer.first_step(zero_grad=True)
    optimizer.restore()
    assert optimizer.attempted_steps == at
    assert optimizer.ascent_due == due
    found += run(task, form, model, optimizer, range(at, STEPS))
    assert_equals_base_until(5, found, expected_run(task, form, range(5, STEPS)))


@pytest.mark.parametrize("due", [False, True])
def test_both_passes_refuses_accumulated_gradients_due_or_not(due: bool, seed: int) -> None:
    """From the first step on, and not only at the first ascent, hours later."""
    task = Task(seed)
    model = task.network()
    optimizer = sam(FORMS["closure for both passes"], model, {"start": 0 if due else 5})
    before = weights(model)
    task.loss(model, 0, slice(0, 4)).backward()
    with pytest.raises(RuntimeError, match="micro-batch"):
        optimizer.step(lambda: task.loss(model, 0, slice(4, 12)).backward())
    assert_same_bits(weights(model), before)


# --- schedulers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("on_the_base", [False, True])
def test_a_scheduler_sees_every_step(form: Form, on_the_base: bool, seed: int) -> None:
    """A scheduler warns if it missed a step, and pytest turns warnings into errors."""
    task = Task(seed)
    model = task.network()
    optimizer = sam(form, model, {"start": 5})
    stepped = optimizer.base_optimizer if on_the_base else optimizer
    scheduler = torch.optim.lr_scheduler.ExponentialLR(stepped, 0.9)
    step = form.make(task, model, optimizer)
    for n in range(STEPS):
        step(n)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.9**STEPS)


# --- other implementations of the same policy ---------------------------------------------------


@pytest.mark.parametrize("k", [2, 3, 10])
def test_the_interval_of_composer(k: int, seed: int) -> None:
    """Composer ascends if ``(step + 1) % interval == 0``, which is ``start=interval - 1`` here.

    Its radius in such a step is rho for any interval.
    """
    task = Task(seed)
    model = task.network()
    optimizer = sam(FORMS["two calls, asks"], model, {"start": k - 1, "interval": k})
    climbed = []
    for n in range(3 * k + 1):
        task.backward(model, n)
        if optimizer.ascent_due:
            climbed.append(n)
            before = weights(model)
            optimizer.first_step(zero_grad=True)
            moved = [a - b for a, b in zip(weights(model), before, strict=True)]
            way = torch.stack([m.double().square().sum() for m in moved]).sum().sqrt()
            assert float(way) == pytest.approx(RHO, rel=1e-4)
            task.backward(model, n)
        optimizer.step()
        optimizer.zero_grad()
    assert climbed == [n for n in range(3 * k + 1) if (n + 1) % k == 0]


@pytest.mark.parametrize(
    ("start", "interval", "stop"), [(0, 1, None), (4, 1, None), (3, 2, 9), (7, 5, 8), (0, 3, 30)]
)
def test_an_ascent_is_due_by_formula(start: int, interval: int, stop: int | None) -> None:
    weight = nn.Parameter(torch.ones(3))
    policy = {"start": start, "interval": interval, "stop": stop}
    optimizer = SAM([weight], torch.optim.SGD, lr=0.1, **policy)
    seen = []
    for _ in range(40):
        weight.grad = torch.ones(3)
        seen.append(optimizer.ascent_due)
        optimizer.first_step()
        assert optimizer.ascent_due is seen[-1]
        optimizer.second_step()
    assert all(type(due) is bool for due in seen)
    last = 40 if stop is None else stop
    assert seen == [start <= n < last and (n - start) % interval == 0 for n in range(40)]


@pytest.mark.skipif(
    "FASTSAM_TEMPERON" not in os.environ,
    reason="set FASTSAM_TEMPERON to a folder made by: pip install --no-deps --target FOLDER temperon",
)
@pytest.mark.parametrize(
    ("base", "options"),
    [(torch.optim.SGD, SGD), (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.05, "eps": 1e-3})],
    ids=["SGD", "AdamW"],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=text)
def test_200_steps_equal_temperon_s(
    base: Any, options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tail begins at our ``start``. The learning rate decays over the tail, as its docs advise."""
    monkeypatch.syspath_prepend(os.environ["FASTSAM_TEMPERON"])
    temperon = importlib.import_module("temperon")
    assert sys.modules["temperon"].__version__
    steps, tail = 200, 0.3
    task = Task(0, dtype)
    ours, theirs = task.network(), task.network()
    optimizer = SAM(ours.parameters(), base, rho=0.05, start=140, closure="both_passes", **options)
    if base is torch.optim.SGD:
        options = {**options, "foreach": False}
    inner = base(theirs.parameters(), **options)
    peer = temperon.Temperon(inner, total_steps=steps, tail_frac=tail, rho=0.05)
    assert peer.tail_start == 140
    decay = temperon.wsd(steps, warmup_steps=10, decay_frac=tail)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(each, decay) for each in (optimizer, inner)]
    for n in range(steps):
        assert optimizer.ascent_due == peer.sam_active()
        passes = []
        for model, each in ((ours, optimizer), (theirs, peer)):

            def closure(model: nn.Module = model, each: Any = each, n: int = n) -> torch.Tensor:
                each.zero_grad()
                return task.backward(model, n % 25)

            before = sum(task.passes.values())
            each.step(closure)
            passes.append(sum(task.passes.values()) - before)
        assert passes[0] == passes[1] == (2 if n >= 140 else 1)
        for scheduler in schedulers:
            scheduler.step()
        if n < 140 and base is torch.optim.SGD:
            assert_torch_bits(weights(ours), weights(theirs))
    assert_close(weights(ours), weights(theirs), 1e-9 if dtype == torch.float64 else 1e-4)


def test_a_plain_step_does_not_read_a_learning_rate_on_a_device(seed: int) -> None:
    """Reading it, to detect the blank step of torch.distributed.checkpoint, would wait and break a capture.

    SGD without momentum has no state that rules out a blank step. Reading a meta tensor raises.
    """
    task = Task(seed)
    model = task.network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, start=5)
    task.backward(model, 0)
    optimizer.param_groups[0]["lr"] = torch.zeros((), device="meta")
    assert not optimizer._is_blank()
