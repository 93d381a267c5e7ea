"""SAM on PyTorch operations agrees with the native kernels, without float64 and without host reads."""

from __future__ import annotations

import copy
import math
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastsam import SAM
from fastsam.kernels import backends
from fastsam.optim import LPFSGD, EntropySGD, LookSAM
from python_tests.backend import Refusing
from python_tests.optim.trajectories import Gradients, Problem, assert_close, everywhere, make
from python_tests.ranks import run_ranks

# Steps of 16-bit weights lose perturbations; both backends lose the same ones.
pytestmark = pytest.mark.filterwarnings("ignore:the ascent left:UserWarning")

SHAPES = [(7, 5), (3,), (), (4, 3, 2, 2), (0,), (2000,), (6, 2)]
GROUPS: list[tuple[int, dict[str, Any]]] = [
    (3, {"rho": 20.0}),
    (2, {"adaptive": True, "rho": 10.0, "weight_decay": 0.01}),
    (1, {"adaptive": "weights", "lr": 0.01, "rho": 5.0}),
    (1, {"perturb": False}),
]
BASES: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 1e-3}),
    (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True, "maximize": True}),
    (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}),
    (torch.optim.AdamW, {"lr": 0.01, "betas": (0.8, 0.999)}),
    (torch.optim.RMSprop, {"lr": 0.01, "eps": 1e-3}),
]


def sometimes(parameter: int, step: int, which: int) -> Any:
    """Return a pattern with missing gradients, and an inf or NaN in either pass."""
    if parameter == 1 and step == 1:
        return None
    planted = {(2, 0): math.nan, (4, 1): math.inf}
    return planted.get((step, which), True) if parameter == 3 else True


def outcome(
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
    problem: Problem,
    base: type[torch.optim.Optimizer],
    options: dict[str, Any],
    gradients: Gradients,
    steps: int,
) -> tuple[list[Tensor], list[dict[str, Any]], Any]:
    """Return weights, the base optimizer's state and the optimizer after some steps."""
    monkeypatch.setenv(backends.VARIABLE, backend)
    optimizer, parameters = make(SAM, problem, base, **options)
    weights = problem.run(optimizer, parameters, steps, gradients)
    assert optimizer.backend == backend
    return weights, [optimizer.state[p] for p in parameters], optimizer


@pytest.mark.parametrize("gradients", [everywhere, sometimes])
@pytest.mark.parametrize(("base", "options"), BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_steps_agree_with_the_native_kernels(
    dtype: torch.dtype,
    base: type[torch.optim.Optimizer],
    options: dict[str, Any],
    gradients: Gradients,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One step agrees to 1e-6 in float32; six steps with missing and broken gradients up to rounding."""
    problem = Problem(SHAPES, GROUPS, dtype, seed)
    eps = torch.finfo(dtype).eps
    for steps, tolerance in ((1, 8 * eps), (6, 64 * eps)):
        found, states, optimizer = outcome(
            "torch", monkeypatch, problem, base, options, gradients, steps
        )
        expected, expected_states, native = outcome(
            "native", monkeypatch, problem, base, options, gradients, steps
        )
        assert_close(found, expected, tolerance)
        for state, other in zip(states, expected_states, strict=True):
            assert state.keys() == other.keys()
            for name in state:
                one, two = (torch.as_tensor(each[name]) for each in (state, other))
                assert one.dtype == two.dtype
                torch.testing.assert_close(
                    one, two, rtol=64 * eps, atol=64 * eps, msg=f"{name} after {steps}"
                )
        assert optimizer.skipped_steps.item() == native.skipped_steps.item()
        assert optimizer.skipped_steps.item() == (2 if gradients is sometimes and steps > 1 else 0)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_skipped_step_restores_the_bits(
    dtype: torch.dtype, which: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(backends.VARIABLE, "torch")
    problem = Problem(SHAPES, GROUPS, dtype, seed)
    optimizer, parameters = make(SAM, problem, torch.optim.SGD, lr=0.1, momentum=0.9)
    before = problem.run(optimizer, parameters, 2)
    state = copy.deepcopy([optimizer.state[p] for p in parameters])
    after = problem.run(
        optimizer,
        parameters,
        range(2, 3),
        lambda i, step, at: math.inf if i == 0 and at == which else True,
    )
    assert all(map(torch.equal, after, before))
    for p, old in zip(parameters, state, strict=True):
        assert torch.equal(optimizer.state[p]["momentum_buffer"], old["momentum_buffer"])
    assert optimizer.skipped_steps.item() == 1


@pytest.mark.parametrize(("base", "options"), BASES[:-1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_uses_no_float64_and_reads_nothing(
    dtype: torch.dtype,
    base: type[torch.optim.Optimizer],
    options: dict[str, Any],
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Under a dispatch mode that raises for both; on the CPU the warning about lost ascents may read."""
    monkeypatch.setenv(backends.VARIABLE, "torch")
    problem = Problem(SHAPES, GROUPS, dtype, seed)
    optimizer, parameters = make(SAM, problem, base, stochastic_rounding=True, **options)
    for step in range(3):
        for which, half in enumerate((optimizer.first_step, optimizer.second_step)):
            problem.set_gradients(parameters, step, which, sometimes)
            with Refusing():
                half(zero_grad=True)
        for group in optimizer.param_groups:
            group["lr"] *= 0.5  # a schedule changes the block of settings
    assert optimizer.ascent_norm.dtype == torch.float32


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize(("base", "options"), BASES[2:4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_runs_on_a_device_of_another_type(
    dtype: torch.dtype, base: type[torch.optim.Optimizer], options: dict[str, Any], stochastic: bool
) -> None:
    """Only the type of the device matters: meta tensors have no kernels, and any read of them raises."""
    weights = [nn.Parameter(torch.zeros(s, dtype=dtype, device="meta")) for s in SHAPES]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", backends.FallbackWarning)
        optimizer = SAM(
            weights, base, adaptive="weights", stochastic_rounding=stochastic, **options
        )
        for _ in range(2):
            for half in (optimizer.first_step, optimizer.second_step):
                for p in weights:
                    p.grad = torch.zeros_like(p)
                half(zero_grad=True)
    assert optimizer.backend == "torch"
    assert optimizer.skipped_steps.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("variant", [LPFSGD, EntropySGD, LookSAM])
def test_variants_follow_the_native_kernels(
    variant: Any, dtype: torch.dtype, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise has the same numbers in both, so a run may change the backend at any step."""
    problem = Problem(SHAPES, dtype=dtype, seed=seed)

    def run(*modes: str) -> list[Tensor]:
        monkeypatch.setenv(backends.VARIABLE, modes[0])
        parameters = problem.parameters()
        if variant is LookSAM:
            optimizer: Any = LookSAM(torch.optim.SGD(parameters, lr=0.1, momentum=0.9), every=2)
        else:
            optimizer = variant(torch.optim.SGD(parameters, lr=0.1, momentum=0.9), seed=seed)
        for step, mode in enumerate(modes):
            monkeypatch.setenv(backends.VARIABLE, mode)
            if variant is LookSAM:
                optimizer.sam.native_step.forget()
            for number, _ in enumerate(optimizer.passes()):
                problem.set_gradients(parameters, step, number)
        assert optimizer.backend == modes[-1]
        return [p.detach().clone() for p in parameters]

    expected = run(*["native"] * 4)
    tolerance = 64 * torch.finfo(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32).eps
    assert_close(run(*["torch"] * 4), expected, tolerance)
    assert_close(run("native", "native", "torch", "torch"), expected, tolerance)


def _rank_main(rank: int, folder: str) -> None:
    os.environ[backends.VARIABLE] = ("native", "torch")[rank]
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    try:
        SAM([weight], torch.optim.SGD, lr=0.1).first_step()
    except ValueError as error:
        (Path(folder) / str(rank)).write_text(str(error))


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")
def test_ranks_must_run_the_same_kernels(tmp_path: Path) -> None:
    run_ranks(_rank_main, 2, str(tmp_path))
    for rank, (here, there) in enumerate((("native", "torch"), ("torch", "native"))):
        text = (tmp_path / str(rank)).read_text()
        assert f"got '{here}' here and '{there}' on rank {1 - rank}" in text
