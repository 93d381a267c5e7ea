"""Runs concurrent with other threads: random numbers, arithmetic switches, modes and parameters."""

from __future__ import annotations

import itertools
import random
import threading
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fastsam.curvature import BatchLoss, spectral_density
from fastsam.curvature.isolation import exact_arithmetic
from fastsam.threads import cpu_threads
from python_tests.curvature.oracles import classification, mlp


class Thread(threading.Thread):
    """A thread whose exception is raised again by ``join``."""

    def __init__(self, target) -> None:
        super().__init__()
        self.work, self.error, self.result = target, None, None
        self.start()

    def run(self) -> None:
        try:
            self.result = self.work()
        except BaseException as error:
            self.error = error

    def finish(self):
        self.join(60)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error
        return self.result


def drawn_beside(work, draw):
    """Return the numbers of ``draw`` while ``work`` runs in a thread that waits for draws."""
    numbers = []
    thread = Thread(work)
    while thread.is_alive():
        numbers.append(draw())
        time.sleep(1e-5)  # yield, because this thread would otherwise block the other
    thread.finish()
    return numbers


def test_numbers_drawn_by_another_thread_are_those_it_would_have_drawn_alone():
    """A run that draws nothing does not affect other threads that use the global generator."""
    model, batch = mlp((3, 4, 3)), classification(20, 3, 3)
    torch.manual_seed(5)
    found = drawn_beside(
        lambda: [spectral_density(model, F.cross_entropy, batch, steps=20) for _ in range(5)],
        lambda: float(torch.rand(())),
    )
    torch.manual_seed(5)
    assert found == [float(torch.rand(())) for _ in found]


class Noisy(Dataset):
    """Draws from every global generator."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index):
        noise = torch.rand(1).item() + np.random.rand() + random.random()
        return torch.full((3,), noise, dtype=torch.float64), index % 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "draw",
    [lambda: float(torch.rand(())), lambda: float(np.random.rand()), random.random],
    ids=["torch", "numpy", "python"],
)
def test_no_number_is_drawn_twice_beside_a_run_that_draws(draw):
    model = mlp((3, 4, 3))
    loader = DataLoader(Noisy(), batch_size=4, shuffle=True)

    def summed(network, batch):
        torch.rand(1), np.random.rand(), random.random()
        return F.cross_entropy(network(batch[0]), batch[1], reduction="sum"), len(batch[1])

    found = drawn_beside(
        lambda: [
            spectral_density(
                model, BatchLoss(summed), loader, steps=9, freeze=3, strategy="rebuild"
            )
            for _ in range(3)
        ],
        draw,
    )
    found += [draw() for _ in range(50)]
    # A few of torch's 2^24 floats are equal by chance; a rewound stream would repeat a whole sequence.
    pairs = list(itertools.pairwise(found))
    assert len(pairs) > 50
    assert len(set(pairs)) == len(pairs)


def test_overlapping_runs_restore_the_random_state():
    model, batch = mlp((3, 4, 3)), classification(20, 3, 3)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    loader = DataLoader(TensorDataset(*batch), batch_size=6, shuffle=True)
    options = {"steps": 9, "data_memory": 64}
    threads = [
        Thread(lambda: spectral_density(model, F.cross_entropy, loader, **options))
        for _ in range(3)
    ]
    found = [thread.finish() for thread in threads]
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])
    assert states[2] == random.getstate()
    alone = spectral_density(model, F.cross_entropy, loader, **options)
    for spectrum in found:
        assert spectrum.lambda_max == pytest.approx(alone.lambda_max, rel=1e-8)
        assert spectrum.lambda_min == pytest.approx(alone.lambda_min, rel=1e-8)


def test_runs_on_one_model_in_two_threads_do_not_see_each_other():
    """Neither the mode of the model nor the parameters swapped into its modules."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 30), nn.Tanh(), nn.Dropout(0.5), nn.Linear(30, 3)).double()
    batches = [classification(20, 3, 3) for _ in range(12)]
    options = {"steps": 12, "strategy": "rebuild"}
    alone = spectral_density(model, F.cross_entropy, batches, **options)
    threads = [
        Thread(lambda: spectral_density(model, F.cross_entropy, batches, **options))
        for _ in range(3)
    ]
    for thread in threads:
        assert thread.finish().lambda_max == pytest.approx(alone.lambda_max, rel=1e-8)
    assert all(module.training for module in model.modules())
    assert all(type(value) is nn.Parameter for value in model.parameters())


def switches():
    backends = torch.backends
    cuda = backends.cuda
    return (
        cuda.matmul.fp32_precision,
        backends.cudnn.conv.fp32_precision,
        backends.cudnn.benchmark,
        backends.cudnn.deterministic,
        backends.mha.get_fastpath_enabled(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        torch.get_num_threads(),
    )


@pytest.mark.parametrize("first_leaves_first", [True, False])
def test_overlapping_runs_restore_the_switches(first_leaves_first):
    """Regardless of which run ends last."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        matmul.fp32_precision = "tf32"
        try:
            found = switches()
            runs = [
                (exact_arithmetic(), cpu_threads(2)),
                (exact_arithmetic(repeatable=True), cpu_threads(3)),
            ]
            for run in runs:
                for part in run:
                    part.__enter__()
            assert matmul.fp32_precision == "ieee"
            for number, run in enumerate(runs if first_leaves_first else reversed(runs)):
                for part in run:
                    part.__exit__(None, None, None)
                if number == 0:  # still disabled for the other run
                    assert matmul.fp32_precision == "ieee"
            assert switches() == found
        finally:
            matmul.fp32_precision = before
