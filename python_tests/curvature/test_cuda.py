"""The same runs on an NVIDIA GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastsam.curvature import BatchLoss, CallableOperator, operator_spectrum, spectral_density

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Softplus(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


@pytest.mark.parametrize(
    "strategy",
    ["auto", "kept-graph", "kept-graph-batched", "rebuild", "forward-over-reverse"],
)
@pytest.mark.parametrize("probes", [1, 3])
def test_equal_to_the_cpu(strategy, probes):
    model = network().double()
    batch = torch.randn(9, 1, 6, 6).double(), torch.randint(3, (9,))
    options = {"steps": 30, "probes": probes}
    expected = spectral_density(model, F.cross_entropy, batch, **options)
    model.cuda()
    found = spectral_density(model, F.cross_entropy, batch, strategy=strategy, **options)
    scale = max(abs(expected.lambda_min), expected.lambda_max)
    assert found.lambda_max == pytest.approx(expected.lambda_max, abs=1e-8 * scale)
    assert found.lambda_min == pytest.approx(expected.lambda_min, abs=1e-8 * scale)
    assert np.allclose(found.alpha[:, :3], expected.alpha[:, :3], atol=1e-8 * scale)


@pytest.mark.parametrize("basis", ["device", "host"])
@pytest.mark.parametrize("reorthogonalize", ["full", "none"])
def test_operators_on_the_gpu(basis, reorthogonalize):
    matrix = torch.randn(80, 80, dtype=torch.float64)
    matrix = (matrix + matrix.T).cuda()
    operator = CallableOperator(lambda rows: rows @ matrix, dimension=80, device="cuda")
    spectrum = operator_spectrum(
        operator, steps=60, probes=2, basis=basis, reorthogonalize=reorthogonalize
    )
    values = torch.linalg.eigvalsh(matrix.cpu())
    assert spectrum.lambda_max == pytest.approx(float(values[-1]), rel=1e-6)


def test_the_same_bits_on_every_run_and_stream():
    values = torch.linspace(-1, 5, 40_001, device="cuda")
    operator = CallableOperator(
        lambda rows: rows * values, dimension=len(values), dtype=torch.float32, device="cuda"
    )
    found = []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found.append(operator_spectrum(operator, steps=30, probes=2))
        torch.cuda.synchronize()
    for other in found[1:]:
        assert np.array_equal(other.alpha, found[0].alpha)
        assert np.array_equal(other.beta, found[0].beta)


def test_nothing_in_the_loop_blocks_the_host():
    steps = 20
    values = torch.linspace(-1, 5, 4000, device="cuda")
    calls = []

    def product(rows: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        torch.cuda.set_sync_debug_mode("error" if len(calls) < steps else "default")
        return rows * values

    operator = CallableOperator(product, dimension=4000, dtype=torch.float32, device="cuda")
    try:
        spectrum = operator_spectrum(operator, steps=steps, probes=2, tolerance=1e-9)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(calls) == steps
    assert spectrum.lambda_max == pytest.approx(5, rel=1e-2)


def test_nan_is_reported_although_the_host_runs_ahead():
    operator = CallableOperator(
        lambda rows: rows * float("nan"), dimension=50, dtype=torch.float32, device="cuda"
    )
    with pytest.raises(FloatingPointError, match="NaN"):
        operator_spectrum(operator, steps=30)


@pytest.mark.parametrize("strategy", ["kept-graph", "mixed", "rebuild"])
def test_products_are_replayed_as_one_graph(strategy):
    model = network().cuda()
    batch = torch.randn(9, 1, 6, 6), torch.randint(3, (9,))
    spectrum = spectral_density(model, F.cross_entropy, batch, strategy=strategy, steps=8)
    assert spectrum.settings["cuda_graph"] is True


def test_a_product_that_waits_for_the_device_runs_eagerly():
    model = network().cuda()
    inputs, targets = torch.randn(9, 1, 6, 6), torch.randint(3, (9,))

    def summed(net, batch):
        loss = F.cross_entropy(net(batch[0]), batch[1], reduction="sum")
        assert float(loss) > 0  # the host waits here
        return loss, len(batch[1])

    waiting = spectral_density(
        model, BatchLoss(summed), (inputs, targets), strategy="rebuild", steps=8
    )
    assert "synchronizing" in waiting.settings["cuda_graph"]
    free = spectral_density(model, F.cross_entropy, (inputs, targets), steps=8)
    assert waiting.lambda_max == pytest.approx(free.lambda_max, rel=1e-4)
