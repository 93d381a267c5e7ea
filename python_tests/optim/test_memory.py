"""Memory of the optimizer: one copy of the weights, and nothing that grows."""

from __future__ import annotations

import gc
import os
import tracemalloc
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from fastsam import SAM
from python_tests.optim.trajectories import Problem, make

pytestmark = pytest.mark.filterwarnings("ignore:the ascent left")


@pytest.fixture(autouse=True)
def _no_float64_and_no_reads() -> None:
    """Disable the mode of conftest.py, which takes some memory for every launch."""


def live_bytes() -> int:
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors
        if t.layout is torch.strided and t.device.type == "cpu"
    }
    return sum(storages.values())


@pytest.mark.slow
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(
    ("dtype", "bytes_each"), [(torch.float32, 4), (torch.float64, 8), (torch.bfloat16, 2)], ids=str
)
def test_memory_beyond_weights_gradients_and_base_state(dtype, bytes_each, adaptive, seed):
    problem = Problem([(200, 333), (1001,), (40, 41)], dtype=dtype, seed=seed)
    elements = sum(w.numel() for w in problem.start)
    for base, options, state in (
        (torch.optim.SGD, {"momentum": 0.9}, 1),
        (torch.optim.AdamW, {}, 2),
    ):
        optimizer, parameters = make(
            SAM, problem, base, rho=9.0, adaptive=adaptive, lr=0.1, **options
        )
        problem.set_gradients(parameters, 0, 0)
        before = live_bytes()
        for _ in range(3):
            optimizer.first_step()
            optimizer.second_step()
        extra = live_bytes() - before - state * elements * bytes_each
        assert extra == pytest.approx(elements * bytes_each, abs=4096)


def test_a_frozen_backbone_costs_nothing(seed):
    """As with adapters on a large frozen network."""
    torch.manual_seed(seed)
    backbone = nn.Linear(300, 301).requires_grad_(False)
    head = nn.Linear(301, 7)
    elements = sum(p.numel() for p in head.parameters())
    optimizer = SAM([*backbone.parameters(), *head.parameters()], torch.optim.SGD, lr=0.1)
    for p in head.parameters():
        p.grad = torch.ones_like(p)
    before = live_bytes()
    optimizer.first_step()
    optimizer.second_step()
    assert live_bytes() - before == pytest.approx(4 * elements, abs=4096)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "options", "state"),
    [
        (torch.optim.SGD, {"momentum": 0.9}, 1),
        (torch.optim.AdamW, {}, 2),
        (torch.optim.RMSprop, {}, 1),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.parametrize("prepared", [False, True])
def test_the_backup_exists_from_the_first_ascent_on(
    prepared: bool, base: Any, options: dict[str, Any], state: int, seed: int
) -> None:
    """Or from ``prepare()`` on, after which the first ascent allocates nothing."""
    problem = Problem([(200, 333), (1001,), (40, 41)], seed=seed)
    backup = 4 * sum(w.numel() for w in problem.start)
    optimizer, parameters = make(SAM, problem, base, start=2, lr=0.1, **options)
    problem.set_gradients(parameters, 0, 0)
    before = live_bytes() + state * backup

    def steps(count: int) -> int:
        for _ in range(count):
            optimizer.first_step()
            optimizer.second_step()
        return live_bytes() - before

    taken = [steps(1)]
    if prepared:
        optimizer.prepare()
    taken += [steps(1), steps(1)]
    extra = [0, backup if prepared else 0, backup]
    assert taken == pytest.approx(extra, abs=8192)


def test_a_frozen_parameter_has_no_backup_after_prepare(seed: int) -> None:
    problem = Problem([(300, 301), (7,)], seed=seed)
    optimizer, parameters = make(SAM, problem, torch.optim.SGD, start=5, lr=0.1)
    parameters[0].requires_grad_(False)
    before = live_bytes()
    optimizer.prepare()
    assert live_bytes() - before < 8192


def test_a_run_without_ascents_allocates_no_backup(seed: int) -> None:
    problem = Problem([(200, 333)], seed=seed)
    optimizer, parameters = make(SAM, problem, torch.optim.SGD, rho=0.0, lr=0.1)
    before = live_bytes()
    problem.run(optimizer, parameters, 3)  # it clears the gradients
    assert live_bytes() - before < 8192


@pytest.mark.parametrize(
    "steps", [2_000, pytest.param(100_000, marks=pytest.mark.slow)], ids=lambda n: f"{n} steps"
)
def test_memory_does_not_grow(steps):
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = SAM([p, q], torch.optim.SGD, lr=1e-3, momentum=0.9)
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)

    def run(count: int) -> None:
        for _ in range(count):
            optimizer.first_step()
            optimizer.second_step()

    run(100)
    tensors = live_bytes()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        run(steps)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 20_000
    assert live_bytes() == tensors


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_more_than_two_to_the_31_elements(device):
    """Gradients around all limits of 32 bits, and zeros elsewhere."""
    count = 2**31 + 4099
    needed = 3.2 * 2 * count  # weight, gradient, backup
    available = (
        torch.cuda.mem_get_info()[0]
        if device == "cuda"
        else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    )
    if available < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GB of memory")
    places = torch.tensor([0, 1, 2**30, 2**31 - 1, 2**31, 2**31 + 1, count - 4097, count - 1])
    values = torch.arange(1, 1 + len(places), dtype=torch.bfloat16)
    weight = nn.Parameter(torch.zeros(count, dtype=torch.bfloat16, device=device))
    weight.grad = torch.zeros_like(weight)
    weight.grad[places] = values.to(device)
    optimizer = SAM([weight], torch.optim.SGD, rho=2.0, lr=0.5)

    def elsewhere_zero() -> bool:
        return sum(int(part.count_nonzero()) for part in weight.detach().split(2**28)) == len(
            places
        )

    optimizer.first_step()
    top = (values.double() * 2.0 / values.double().norm()).bfloat16()
    assert torch.equal(weight.detach()[places].cpu(), top)
    assert elsewhere_zero()
    optimizer.second_step()
    assert torch.equal(weight.detach()[places].cpu(), -values / 2)
    assert elsewhere_zero()
