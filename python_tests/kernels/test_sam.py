"""Every phase of a SAM step equals its reference, over dtypes, sizes, layouts and backends."""

from __future__ import annotations

import gc
import math
import re
import weakref
from array import array
from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsam.kernels import extension, reference
from fastsam.kernels import sam as kernels
from fastsam.threads import cpu_threads
from python_tests.backend import is_native
from python_tests.kernels.emulation import ROOT

Draw = Callable[..., Tensor]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ODD_SIZES = [1, 0, 3, 1025, 64, 4097, 7, 20001]
GROUPS = [
    {"rho": 0.05, "eta": 0.0, "lr": 0.1, "momentum": 0.9, "dampening": 0.2, "beta1": 0.9},
    {"rho": 0.5, "eta": 0.01, "lr": 0.01, "weight_decay": 0.1, "nesterov": 1.0, "momentum": 0.5},
    {"rho": 0.0, "lr": 0.3, "maximize": 1.0, "beta1": 0.5, "decoupled": 1.0, "weight_decay": 0.2},
]
DEFAULTS = dict.fromkeys(extension.HYPER_COLUMNS, 0.0) | {"beta1": 0.9, "beta2": 0.99, "eps": 1e-6}


def tolerance(dtype: torch.dtype) -> float:
    """Return the rounding error of a few operations on values of order one."""
    return 16 * torch.finfo(dtype).eps


def norm_error(dtype: torch.dtype) -> float:
    """Relative error of a norm: float32 within a pack of 16 bytes, float64 across packs.

    PyTorch operations add in float32 throughout.
    """
    if dtype == torch.float64:
        return 1e-13
    return 1e-7 if is_native() else 1e-6


class Problem:
    """Tensors, a table over them and the device scalars of a step."""

    def __init__(self, draw: Draw, sizes: list[int], dtype: torch.dtype, device: torch.device):
        self.device, self.dtype = device, dtype
        self.weights = [draw(size, dtype=dtype) for size in sizes]
        self.gradients: list[Tensor | None] = [draw(size, dtype=dtype) for size in sizes]
        self.groups = [i % len(GROUPS) for i in range(len(sizes))]
        self.adaptive = [i % 2 == 1 for i in range(len(sizes))]
        self.backups = [torch.full_like(weight, math.nan) for weight in self.weights]
        self.state = [[draw(size, dtype=dtype).abs() for size in sizes] for _ in range(3)]
        self.steps = [
            torch.full((), float(i % 3), dtype=torch.float32, device=device)
            for i in range(len(sizes))
        ]
        self.hyper = [DEFAULTS | group for group in GROUPS]
        self.scalars = kernels.Scalars(
            hyper=torch.tensor(
                [[group[name] for name in extension.HYPER_COLUMNS] for group in self.hyper],
                dtype=torch.float64,
                device=device,
            ),
            squared_norms=torch.full((1,), math.nan, dtype=torch.float64, device=device),
            found_inf=torch.full((1,), 9.0, dtype=torch.float32, device=device),
            skipped_steps=torch.zeros(1, dtype=torch.int64, device=device),
            unchanged=torch.zeros(1, dtype=torch.int64, device=device),
        )
        self.table = kernels.TensorTable(self.weights, groups=self.groups, adaptive=self.adaptive)
        self.scratch = self.table.scratch()
        self.table.set_backups(self.backups)
        self.table.set_gradients(self.gradients)

    def climb(self) -> None:
        kernels.norm(self.table, self.scalars.hyper, self.scalars.squared_norms, self.scratch)
        kernels.perturb(self.table, self.scalars.arguments(count_unchanged=True))

    def expected_norm(self) -> float:
        return math.sqrt(
            sum(
                reference.squared_norm(
                    gradient, weight, adaptive=adaptive, eta=self.hyper[group]["eta"]
                ).item()
                for weight, gradient, adaptive, group in zip(
                    self.weights, self.gradients, self.adaptive, self.groups, strict=True
                )
                if gradient is not None
            )
        )


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=tolerance(dtype), atol=tolerance(dtype)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_adds_all_tensors(dtype: torch.dtype, draw: Draw, device: torch.device) -> None:
    problem = Problem(draw, ODD_SIZES, dtype, device)
    problem.gradients[3] = None
    problem.table.set_gradients(problem.gradients)
    for _ in range(2):  # the second launch reuses the scratch memory of the first
        problem.scalars.squared_norms.fill_(math.nan)
        kernels.norm(
            problem.table, problem.scalars.hyper, problem.scalars.squared_norms, problem.scratch
        )
        norm = problem.scalars.squared_norms.sqrt().item()
        assert norm == pytest.approx(problem.expected_norm(), rel=norm_error(dtype))


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("size", [1e25, 1e15, 1e-18, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_of_gradients_whose_squares_leave_float32(
    dtype: torch.dtype, size: float, adaptive: bool, draw: Draw, device: torch.device
) -> None:
    """Also next to zeros and to much smaller elements, in the same pack and in others."""
    problem = Problem(draw, [4097, 33], dtype, device)
    gradients = [draw(count, dtype=torch.float64) * size for count in (4097, 33)]
    gradients[0][::3] = 0.0
    gradients[0][1::5] *= 1e-5
    gradients[0][256:512] = 0.0
    problem.gradients = [gradient.to(dtype) for gradient in gradients]
    problem.adaptive = [adaptive, adaptive]
    table = kernels.TensorTable(problem.weights, groups=[0, 1], adaptive=problem.adaptive)
    table.set_gradients(problem.gradients)
    kernels.norm(table, problem.scalars.hyper, problem.scalars.squared_norms, problem.scratch)
    norm = problem.scalars.squared_norms.sqrt().item()
    if is_native() or 1e-18 <= size <= 1e15:
        assert norm == pytest.approx(problem.expected_norm(), rel=norm_error(torch.float32))
    else:  # float32 sums: skipped above, and far below the 1e-12 that is added to the norm
        assert norm == math.inf if size > 1 else norm < 1e-18


@pytest.mark.parametrize("dtype", DTYPES)
def test_perturb_moves_the_weights_and_writes_a_backup(
    dtype: torch.dtype, draw: Draw, device: torch.device
) -> None:
    problem = Problem(draw, ODD_SIZES, dtype, device)
    problem.gradients[0] = None
    problem.table.set_gradients(problem.gradients)
    before = [weight.clone() for weight in problem.weights]
    norm = problem.expected_norm()
    problem.climb()
    assert problem.scalars.found_inf.item() == 0.0
    unchanged = 0
    for i, weight in enumerate(before):
        gradient, group = problem.gradients[i], problem.hyper[problem.groups[i]]
        if gradient is None:
            assert torch.equal(problem.weights[i], weight)
            continue
        assert torch.equal(problem.backups[i], weight)
        expected = reference.perturb(
            weight,
            gradient,
            norm=norm,
            rho=group["rho"],
            adaptive=problem.adaptive[i],
            eta=group["eta"],
        )
        assert_near(problem.weights[i], expected, dtype)
        unchanged += int(((problem.weights[i] == weight) & (gradient != 0)).sum())
    assert problem.scalars.unchanged is not None
    assert problem.scalars.unchanged.item() == unchanged


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_that_is_not_finite_moves_nothing(
    dtype: torch.dtype, value: float, draw: Draw, device: torch.device
) -> None:
    problem = Problem(draw, ODD_SIZES, dtype, device)
    gradient = problem.gradients[-1]
    assert gradient is not None
    gradient[-1] = value  # the last element of the last tensor
    before = [weight.clone() for weight in problem.weights]
    state = [[tensor.clone() for tensor in column] for column in problem.state]
    problem.climb()
    assert problem.scalars.found_inf.item() == 1.0
    assert all(map(torch.equal, problem.weights, before))
    problem.scalars.found_inf.zero_()
    kernels.check(problem.table, problem.scalars.found_inf)
    assert problem.scalars.found_inf.item() == 1.0
    bind_state(problem)
    for rule in ("sgd", "adam"):
        kernels.update(
            problem.table,
            problem.scalars.arguments(count_skip=True),
            problem.scratch,
            rule=rule,  # type: ignore[arg-type]
        )
    assert problem.scalars.skipped_steps.item() == 2
    assert all(map(torch.equal, problem.weights, before))
    for column, old in zip(problem.state, state, strict=True):
        assert all(map(torch.equal, column, old))
    assert [step.item() for step in problem.steps] == [float(i % 3) for i in range(len(before))]


def test_check_never_clears_the_flag(draw: Draw, device: torch.device) -> None:
    problem = Problem(draw, [5, 3000], torch.float32, device)
    for flag in (0.0, 1.0):
        problem.scalars.found_inf.fill_(flag)
        kernels.check(problem.table, problem.scalars.found_inf)
        assert problem.scalars.found_inf.item() == flag


def bind_state(problem: Problem, *, amsgrad: bool = True) -> None:
    problem.table.set_state(0, problem.state[0])
    problem.table.set_state(1, problem.state[1])
    nothing: list[Tensor | None] = [None] * len(problem.weights)
    problem.table.set_state(2, problem.state[2] if amsgrad else nothing)
    problem.table.set_steps(problem.steps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_restore_is_bit_exact(dtype: torch.dtype, draw: Draw, device: torch.device) -> None:
    problem = Problem(draw, ODD_SIZES, dtype, device)
    before = [weight.clone() for weight in problem.weights]
    problem.climb()
    assert not torch.equal(problem.weights[-1], before[-1])
    kernels.restore(problem.table)
    assert all(map(torch.equal, problem.weights, before))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sgd_updates_from_the_backup(dtype: torch.dtype, draw: Draw, device: torch.device) -> None:
    problem = Problem(draw, ODD_SIZES, dtype, device)
    before = [weight.clone() for weight in problem.weights]
    momenta = [tensor.clone() for tensor in problem.state[0]]
    problem.climb()
    bind_state(problem)
    problem.gradients[4] = None
    problem.table.set_gradients(problem.gradients)
    kernels.update(problem.table, problem.scalars.arguments(), problem.scratch, rule="sgd")
    names = ("lr", "momentum", "dampening", "weight_decay")
    for i, weight in enumerate(before):
        gradient, group = problem.gradients[i], problem.hyper[problem.groups[i]]
        if gradient is None:
            assert torch.equal(problem.weights[i], weight)
            assert torch.equal(problem.state[0][i], momenta[i])
            continue
        expected, momentum = reference.update_sgd(
            weight,
            gradient,
            momenta[i],
            first=i % 3 == 0,
            nesterov=group["nesterov"] != 0,
            maximize=group["maximize"] != 0,
            **{name: group[name] for name in names},
        )
        if group["momentum"] == 0:
            # With momentum 0 the kernel still writes a given buffer; only the weight is compared.
            momentum = problem.state[0][i]
        assert_near(problem.weights[i], expected, dtype)
        assert_near(problem.state[0][i], momentum, dtype)
        assert problem.steps[i].item() == i % 3 + 1


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_adam_updates_from_the_backup(
    dtype: torch.dtype, amsgrad: bool, draw: Draw, device: torch.device
) -> None:
    problem = Problem(draw, ODD_SIZES, dtype, device)
    before = [weight.clone() for weight in problem.weights]
    state = [[tensor.clone() for tensor in column] for column in problem.state]
    problem.climb()
    bind_state(problem, amsgrad=amsgrad)
    kernels.update(problem.table, problem.scalars.arguments(), problem.scratch, rule="adam")
    names = ("lr", "beta1", "beta2", "eps", "weight_decay")
    for i, weight in enumerate(before):
        gradient, group = problem.gradients[i], problem.hyper[problem.groups[i]]
        assert gradient is not None
        expected, moments = reference.update_adam(
            weight,
            gradient,
            (state[0][i], state[1][i], state[2][i]),
            step=i % 3 + 1,
            amsgrad=amsgrad,
            decoupled=group["decoupled"] != 0,
            maximize=group["maximize"] != 0,
            **{name: group[name] for name in names},
        )
        assert_near(problem.weights[i], expected, dtype)
        for slot, moment in enumerate(moments):
            assert_near(problem.state[slot][i], moment, dtype)
        assert problem.steps[i].item() == i % 3 + 1


@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_a_loss_scale_is_divided_out(rule: str, draw: Draw, device: torch.device) -> None:
    scale = torch.tensor(1024.0, device=device)
    results = []
    plain = Problem(draw, ODD_SIZES, torch.float32, device)
    scaled = Problem(draw, ODD_SIZES, torch.float32, device)
    for i, weight in enumerate(plain.weights):
        scaled.weights[i].copy_(weight)
        for slot in range(3):
            scaled.state[slot][i].copy_(plain.state[slot][i])
    scaled.gradients = [g * 1024.0 for g in plain.gradients if g is not None]
    scaled.table.set_gradients(scaled.gradients)
    for problem, factor in ((plain, None), (scaled, scale)):
        kernels.norm(
            problem.table, problem.scalars.hyper, problem.scalars.squared_norms, problem.scratch
        )
        scalars = problem.scalars.arguments(grad_scale=factor)
        kernels.perturb(problem.table, scalars)
        results.append([weight.clone() for weight in problem.weights])
        bind_state(problem)
        kernels.update(problem.table, scalars, problem.scratch, rule=rule)  # type: ignore[arg-type]
        results[-1] += [weight.clone() for weight in problem.weights]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count", [0, 1, 3, pytest.param(700, marks=pytest.mark.slow)])
def test_many_tensors_and_empty_ones(count: int, draw: Draw, device: torch.device) -> None:
    """700 tensors need more than one launch; an empty tensor has address 0 but may have a gradient."""
    problem = Problem(draw, [0, 0, *[5] * count], torch.float32, device)
    before = [weight.clone() for weight in problem.weights]
    norm = problem.expected_norm()
    problem.climb()
    actual = problem.scalars.squared_norms.sqrt().item()
    assert actual == pytest.approx(norm, rel=norm_error(torch.float32))
    assert problem.scalars.found_inf.item() == 0.0
    bind_state(problem)
    kernels.update(problem.table, problem.scalars.arguments(), problem.scratch, rule="adam")
    assert [step.item() for step in problem.steps] == [i % 3 + 1 for i in range(count + 2)]
    kernels.restore(problem.table)
    assert all(map(torch.equal, problem.weights, before))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 3])
def test_unaligned_views(dtype: torch.dtype, offset: int, draw: Draw, device: torch.device) -> None:
    memory = draw(3, 5000, dtype=dtype)
    weight, gradient = memory[0, offset:4000], memory[1, offset:4000]
    before, outside = weight.clone(), memory[0, 4000:].clone()
    backup = torch.full_like(weight, math.nan)
    problem = Problem(draw, [weight.numel()], dtype, device)
    table = kernels.TensorTable([weight], groups=[0], adaptive=[False])
    table.set_gradients([gradient])
    table.set_backups([backup])
    kernels.norm(table, problem.scalars.hyper, problem.scalars.squared_norms, table.scratch())
    kernels.perturb(table, problem.scalars.arguments())
    norm = reference.squared_norm(gradient, before, adaptive=False, eta=0.0).sqrt().item()
    expected = reference.perturb(before, gradient, norm=norm, rho=0.05, adaptive=False, eta=0.0)
    assert_near(weight, expected, dtype)
    assert torch.equal(memory[0, 4000:], outside)
    kernels.restore(table)
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("dtype", "largest"),
    [(dtype, 1.0) for dtype in DTYPES]
    + [(dtype, 1e20) for dtype in DTYPES if dtype != torch.float16],
)
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_bits_of_a_norm_do_not_depend_on_alignment(
    dtype: torch.dtype, largest: float, adaptive: bool, draw: Draw, device: torch.device
) -> None:
    """Squares beyond the range of float32, which float16 cannot have, are summed in another type."""
    memory = draw(2, 9_003, dtype=dtype)
    memory[0, 5_000] *= largest
    norms = []
    for offset in (0, 1, 2):
        gradient, weight = (torch.empty_like(row)[offset : offset + 9_000] for row in memory)
        gradient.copy_(memory[0, :9_000])
        weight.copy_(memory[1, :9_000])
        problem = Problem(draw, [9_000], dtype, device)
        table = kernels.TensorTable([weight], groups=[0], adaptive=[adaptive])
        table.set_gradients([gradient])
        kernels.norm(table, problem.scalars.hyper, problem.scalars.squared_norms, table.scratch())
        norms.append(problem.scalars.squared_norms.item())
    assert norms[0] > 0
    assert norms == norms[:1] * 3


@pytest.mark.parametrize("rule", ["sgd", "adam"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 3])
def test_a_launch_beyond_the_cache_stores_the_bits_of_small_ones(
    dtype: torch.dtype, offset: int, rule: Literal["sgd", "adam"], generator: torch.Generator
) -> None:
    """CPU stores bypass the cache from 8 MiB on; smaller pieces of the same tensors must have equal bits."""
    size = (8 << 20) // dtype.itemsize + 12_345

    def draw(count: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(count, generator=generator).to(dtype)

    start = [draw(size + offset, dtype) for _ in range(5)]
    problem = Problem(draw, [1], dtype, torch.device("cpu"))
    scalars = problem.scalars
    problem.hyper[0] |= {"rho": 40.0, "weight_decay": 0.1}
    scalars.hyper[0] = torch.tensor([problem.hyper[0][name] for name in extension.HYPER_COLUMNS])
    scalars.squared_norms.fill_(float(size))
    assert scalars.unchanged is not None

    def run(pieces: int) -> list[Tensor]:
        memory = [tensor.clone() for tensor in (*start, start[0])]
        tops = []
        steps = [torch.ones(()) for _ in range(pieces)]
        scalars.unchanged.zero_()
        split = (m[offset:].tensor_split(pieces) for m in memory)
        for parts, step in zip(zip(*split, strict=True), steps, strict=True):
            weight, gradient, first, second, third, backup = parts
            table = kernels.TensorTable([weight], groups=[0], adaptive=[rule == "adam"])
            table.set_gradients([gradient])
            table.set_backups([backup])
            before = weight.clone()
            kernels.perturb(table, scalars.arguments(count_unchanged=True))
            tops.append(weight.clone())
            assert torch.equal(backup, before)
            kernels.restore(table)
            assert torch.equal(weight, before)
            kernels.perturb(table, scalars.arguments())
            for slot, state in ((0, first), (1, second.abs_()), (2, third.abs_())):
                table.set_state(slot, [state])
            table.set_steps([step])
            kernels.update(table, scalars.arguments(), table.scratch(), rule=rule)
        return [torch.cat(tops), scalars.unchanged.clone(), *memory]

    for large, small in zip(run(1), run(3), strict=True):
        assert torch.equal(large, small), f"{int((large != small).sum())} values differ"


def test_the_same_bits_on_every_run_and_thread_count(draw: Draw, device: torch.device) -> None:
    problem = Problem(draw, [300_001, 70_000, 13], torch.float32, device)
    norms = set()
    for count in (1, 2, 3, 1):
        with cpu_threads(count):
            kernels.norm(
                problem.table, problem.scalars.hyper, problem.scalars.squared_norms, problem.scratch
            )
        norms.add(problem.scalars.squared_norms.item())
    assert len(norms) == 1


def test_float16_conversion_agrees_with_torch(draw: Draw, device: torch.device) -> None:
    """Every float16 bit pattern survives load and store; a rho of 0 adds nothing."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    weight = bits.view(torch.float16).clone().to(device)
    problem = Problem(draw, [weight.numel()], torch.float16, device)
    problem.scalars.hyper.zero_()
    table = kernels.TensorTable([weight], groups=[0], adaptive=[False])
    backup = torch.zeros_like(weight)
    table.set_backups([backup])
    gradient = torch.ones_like(weight)
    table.set_gradients([gradient])
    before = weight.clone()
    kernels.norm(table, problem.scalars.hyper, problem.scalars.squared_norms, table.scratch())
    kernels.perturb(table, problem.scalars.arguments())
    finite = torch.isfinite(before)
    assert torch.equal(weight[finite], before[finite])
    assert torch.equal(weight.isnan(), before.isnan())
    assert torch.equal(weight.isinf(), before.isinf())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_rounding_is_to_nearest_even(
    dtype: torch.dtype, draw: Draw, device: torch.device
) -> None:
    """1 + g with norm 1 and rho 1, for g over many magnitudes, rounds as torch rounds float32 to 16 bits."""
    scale = torch.logspace(-9, 4, 4000, dtype=torch.float64).to(device)
    gradient = (draw(4000, dtype=torch.float64) * scale).to(dtype)
    gradient = gradient[torch.isfinite(gradient)]
    weight = draw(gradient.numel(), dtype=dtype)
    before = weight.clone()
    problem = Problem(draw, [weight.numel()], dtype, device)
    problem.scalars.hyper[0, 0] = 1.0
    problem.scalars.squared_norms.fill_(1.0)
    table = kernels.TensorTable([weight], groups=[0], adaptive=[False])
    backup = torch.zeros_like(weight)
    table.set_backups([backup])
    table.set_gradients([gradient])
    kernels.perturb(table, problem.scalars.arguments())
    assert torch.equal(weight, (before.float() + gradient.float()).to(dtype))


@pytest.mark.parametrize("unaligned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stochastic_rounding_goes_up_as_often_as_the_reference(
    dtype: torch.dtype, unaligned: bool, draw: Draw, device: torch.device
) -> None:
    """With equal bits in every row, over magnitudes from subnormal to large."""
    weights, gradients = [], []
    for size in (1, 0, 20_003, 77):
        magnitude = torch.logspace(-9, 3, size, dtype=torch.float64).to(device)
        memory = (draw(2, size + 1, dtype=torch.float64) * 0).to(dtype)
        weight, gradient = (row[1:] if unaligned else row[:-1].clone() for row in memory)
        weight.copy_(draw(size, dtype=torch.float64) * magnitude.flip(0))
        gradient.copy_(draw(size, dtype=torch.float64) * magnitude)
        weights.append(weight)
        gradients.append(gradient)
    before = [weight.clone() for weight in weights]
    backups = [torch.zeros_like(weight) for weight in weights]
    problem = Problem(draw, [1], dtype, device)
    problem.scalars.hyper[0, 0] = 1.0
    problem.scalars.squared_norms.fill_(1.0)  # with rho 1 the ascent adds the gradient unscaled
    table = kernels.TensorTable(
        weights, groups=[0] * 4, adaptive=[False] * 4, stochastic=[True, True, True, False]
    )
    table.set_backups(backups)
    table.set_gradients(gradients)
    kernels.perturb(table, problem.scalars.arguments())
    for row, (weight, old, gradient) in enumerate(zip(weights, before, gradients, strict=True)):
        top = (old.float() + gradient.float()).double().cpu()
        bits = reference.rounding_bits(1.0, row, weight.numel())
        expected = top.to(dtype) if row == 3 else reference.round_at_random(top, bits, dtype)
        assert torch.equal(weight.cpu(), expected), row


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stochastic_rounding_is_right_on_average(
    dtype: torch.dtype, draw: Draw, device: torch.device
) -> None:
    """An ascent far below the resolution of the weights, over many norms: five standard errors."""
    count, norms = 40_000, 5
    weight = torch.ones(count, device=device, dtype=dtype)
    weight[::2] = -3.0
    gradient = torch.ones_like(weight)
    backup = torch.zeros_like(weight)
    problem = Problem(draw, [1], dtype, device)
    problem.scalars.hyper[0, 0] = torch.finfo(dtype).eps / 16
    table = kernels.TensorTable([weight], groups=[0], adaptive=[False], stochastic=[True])
    table.set_backups([backup])
    table.set_gradients([gradient])
    rises = []
    for i in range(norms):
        problem.scalars.squared_norms.fill_(1.0 + i * 1e-13)
        kernels.perturb(table, problem.scalars.arguments())
        rises.append(weight.double() - backup.double())
        kernels.restore(table)
    rise = torch.stack(rises)
    step = torch.finfo(dtype).eps / 16
    for part, resolution in ((rise[:, 1::2], 1.0), (rise[:, ::2], 2.0)):  # spacing at 1 and at 3
        p = 1 / 16 / resolution
        error = resolution * 16 * step * (p * (1 - p) / part.numel()) ** 0.5
        assert abs(part.mean().item() - step) < 5 * error
    together = (rise != 0).double()
    together -= together.mean(dim=1, keepdim=True)
    assert abs((together[0] * together[1]).mean().item()) < 5 * together.var().item() / count**0.5


def test_stochastic_rounding_preserves_inf_and_nan(draw: Draw, device: torch.device) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        special = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0] * 20, dtype=dtype)
        weight = special.clone().to(device)
        problem = Problem(draw, [1], dtype, device)
        problem.scalars.hyper[0, 0] = 0.0
        problem.scalars.squared_norms.fill_(2.5)
        table = kernels.TensorTable([weight], groups=[0], adaptive=[False], stochastic=[True])
        backup = torch.zeros_like(weight)
        table.set_backups([backup])
        gradient = torch.ones_like(weight)
        table.set_gradients([gradient])
        kernels.perturb(table, problem.scalars.arguments())
        assert torch.equal(weight.isnan().cpu(), special.isnan())
        kept = ~special.isnan()
        assert torch.equal(weight.cpu()[kept], special[kept])


# --- errors of the Python functions ------------------------------------------------------------------


def test_columns_are_those_of_the_native_module() -> None:
    """In the order in which the kernels read them, so that any permutation fails."""
    assert list(extension.TABLE_COLUMNS) == [
        *("size", "group", "flags", "weight", "gradient", "backup", "state0", "state1", "state2"),
        *("step", "scale", "row_size", "stream"),
    ]
    assert list(extension.HYPER_COLUMNS) == [
        *("rho", "eta", "lr", "weight_decay", "momentum", "dampening", "nesterov", "maximize"),
        *("beta1", "beta2", "eps", "decoupled"),
    ]


@pytest.mark.parametrize("columns", ["TABLE", "HYPER"])
def test_names_and_enumerators_come_from_one_list(columns: str) -> None:
    """No second list of names exists that could be permuted against the enumerators."""
    header = {"TABLE": "table.h", "HYPER": "sam.h"}[columns]
    text = (ROOT / "csrc" / "include" / "fastsam" / header).read_text()
    block = text.partition(f"#define FASTSAM_{columns}_COLUMNS")[2].partition("\n\n")[0]
    enumerators = re.findall(r"COLUMN\(k(\w+)\)", block)
    names = [re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower() for name in enumerators]
    assert names == list(getattr(extension, f"{columns}_COLUMNS"))
    bindings = (ROOT / "csrc" / "bindings" / "module.cpp").read_text()
    assert not [name for name in names if f'"{name}",' in bindings]


def table_buffers() -> list[tuple[object, str]]:
    cells = np.arange(26, dtype=np.int64)
    return [
        (array("q", [1, 2, 3]), "3 "),
        (cells[::2], "stride 16"),
        (cells[::-1], "stride -8"),
        (cells.reshape(2, 13), "stride 104"),
        (cells.astype(np.float64), "format 'd'"),
        (cells.astype(np.int32), "format 'i'"),
        (cells.astype(np.uint64), "format 'L'"),
        (memoryview(cells)[::2], "stride 16"),
        (bytes(104), "format 'B'"),
    ]


@pytest.mark.parametrize(("buffer", "message"), table_buffers())
def test_an_invalid_table_buffer_is_refused(buffer: object, message: str) -> None:
    with pytest.raises(ValueError, match="contiguous int64 buffer") as caught:
        extension.module().cpu.sam_scratch_bytes(buffer)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("gradient", "message"),
    [
        (torch.zeros(3), "must match"),
        (torch.zeros(4, dtype=torch.float64), "must match"),
        (torch.zeros(4).to_sparse(), "sparse"),
        (torch.zeros(4, device="meta"), "must match"),
    ],
)
def test_a_gradient_that_does_not_fit_is_refused(gradient: Tensor, message: str) -> None:
    table = kernels.TensorTable([torch.zeros(4)], groups=[0], adaptive=[False])
    before = table.cells[:]
    with pytest.raises(ValueError, match=message):
        table.set_gradients([gradient])
    assert table.cells == before


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([], "at least one"),
        ([torch.zeros(2, dtype=torch.int32)], "float32, float64"),
        ([torch.zeros(2), torch.zeros(2, dtype=torch.float64)], "like the first"),
        ([torch.zeros(4, 4)[:, :2]], "gaps"),
        ([torch.zeros(1).expand(4)], "gaps"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.TensorTable(weights, groups=[0] * len(weights), adaptive=[False] * len(weights))


def test_gradients_in_another_layout_are_converted(draw: Draw, device: torch.device) -> None:
    weight = draw(4, 3, 2, 2).to(memory_format=torch.channels_last)
    gradient = draw(4, 3, 2, 2)
    before = weight.clone()
    problem = Problem(draw, [weight.numel()], torch.float32, device)
    table = kernels.TensorTable([weight], groups=[0], adaptive=[False])
    backup = torch.zeros_like(weight)
    table.set_backups([backup])
    table.set_gradients([gradient])
    kernels.norm(table, problem.scalars.hyper, problem.scalars.squared_norms, table.scratch())
    kernels.perturb(table, problem.scalars.arguments())
    norm = gradient.double().norm().item()
    expected = reference.perturb(before, gradient, norm=norm, rho=0.05, adaptive=False, eta=0.0)
    assert_near(weight, expected, torch.float32)


def test_released_gradients_leave_no_copies(draw: Draw, device: torch.device) -> None:
    """A gradient in another layout is copied into the weight's, which takes memory until the release."""
    shape = (37, 41)
    weight, gradient = draw(41, 37).t(), draw(*shape)
    table = kernels.TensorTable([weight], groups=[0], adaptive=[False])
    table.set_gradients([gradient])
    copies = [
        weakref.ref(each)
        for each in gc.get_objects()
        if issubclass(type(each), Tensor)  # isinstance() asks proxies, which warn
        and each.shape == shape
        and each.stride() == weight.stride()
    ]
    assert sum(copy() is not weight for copy in copies) == 1
    table.release_gradients()
    assert [copy() for copy in copies if copy() is not None] == [weight]
