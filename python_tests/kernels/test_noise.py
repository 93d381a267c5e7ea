"""Counter-based noise against published test vectors, an independent generator and its distribution."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsam.kernels import reference
from fastsam.kernels.noise import add_noise
from fastsam.kernels.sam import TensorTable
from fastsam.threads import cpu_threads

Draw = Callable[..., Tensor]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            0x299F31D0A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_reference_gives_the_published_vectors(counter: str, key: int, expected: str) -> None:
    """Known answers of Philox4x32-10 from the Random123 distribution."""
    words = np.array([[int(word, 16) for word in counter.split()]], dtype=np.uint32)
    drawn = reference.philox(words, key)[0]
    assert [f"{int(word):08x}" for word in drawn] == expected.split()


def table_of(*weights: Tensor) -> TensorTable:
    return TensorTable(weights, groups=[0] * len(weights), adaptive=[False] * len(weights))


def noise(
    sizes: list[int], device: torch.device, *, seed: int, step: int, streams: list[int]
) -> list[Tensor]:
    """Return unit noise of several tensors, float32."""
    weights = [torch.zeros(size, device=device) for size in sizes]
    one = torch.ones(1, dtype=torch.float64, device=device)
    position = torch.tensor([seed, step], device=device)
    add_noise(table_of(*weights), [one] * len(sizes), position, streams=streams)
    return weights


def test_kernels_draw_what_the_reference_draws(
    device: torch.device, generator: torch.Generator
) -> None:
    seed, step = torch.randint(2**31, (2,), generator=generator).tolist()
    sizes, streams = [1, 5, 4096, 20_003], [0, 7, 2**32 - 1, 3]
    drawn = noise(sizes, device, seed=seed * 2**31 + 1, step=step, streams=streams)
    for size, stream, values in zip(sizes, streams, drawn, strict=True):
        expected = reference.standard_normal(seed * 2**31 + 1, step, stream, size)
        torch.testing.assert_close(values.double().cpu(), expected, rtol=3e-6, atol=3e-6)


def test_noise_is_standard_normal_and_independent_of_its_neighbors(device: torch.device) -> None:
    """Moments within five standard errors; seeds, steps and streams uncorrelated."""
    count = 200_000
    settings = [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1)]
    drawn = [
        noise([count], device, seed=seed, step=step, streams=[stream])[0].double()
        for seed, step, stream in settings
    ]
    error = 5 / count**0.5
    for z in drawn:
        assert abs(z.mean().item()) < error
        assert abs(z.square().mean().item() - 1) < error * 2**0.5
        assert abs(z.pow(3).mean().item()) < error * 15**0.5
        assert abs(z.pow(4).mean().item() - 3) < error * 96**0.5
        assert abs((z[1:] * z[:-1]).mean().item()) < error
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert abs((a * b).mean().item()) < error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_one_deviation_per_row(dtype: torch.dtype, draw: Draw, device: torch.device) -> None:
    weight = draw(7, 13, 3, dtype=dtype)
    before = weight.clone()
    deviations = draw(7, dtype=torch.float64).abs()
    position = torch.tensor([5, 9], device=device)
    version = weight._version
    add_noise(table_of(weight), [deviations], position, streams=[2])
    z = reference.standard_normal(5, 9, 2, weight.numel()).to(device).view(7, 13, 3)
    expected = before.double() + deviations.view(7, 1, 1) * z
    tolerance = 8 * torch.finfo(dtype).eps + 1e-5
    torch.testing.assert_close(weight.double(), expected, rtol=tolerance, atol=tolerance)
    assert weight._version > version


def test_the_same_bits_on_every_thread_count(device: torch.device) -> None:
    drawn = []
    for count in (1, 2, 3):
        with cpu_threads(count):
            drawn.append(noise([150_001], device, seed=3, step=4, streams=[5])[0])
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    ("scales", "position", "message"),
    [
        (torch.ones(1).half(), torch.tensor([0, 0]), "float64"),
        (torch.ones(3, dtype=torch.float64), torch.tensor([0, 0]), "do not divide"),
        (torch.ones(0, dtype=torch.float64), torch.tensor([0, 0]), "do not divide"),
        (torch.ones(1, dtype=torch.float64), torch.tensor([0]), r"int64 \[2\]"),
        (torch.ones(1, dtype=torch.float64).expand(2), torch.tensor([0, 0]), "contiguous"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    scales: Tensor, position: Tensor, message: str
) -> None:
    weight = torch.zeros(4)
    with pytest.raises(ValueError, match=message):
        add_noise(table_of(weight), [scales], position, streams=[0])
    assert (weight == 0).all()


def test_rows_require_the_first_dimension_outermost(device: torch.device) -> None:
    """Channels-last weights of convolutions have it; transposed weights do not."""
    deviations = torch.tensor([1.0, 0.0], dtype=torch.float64, device=device)
    position = torch.tensor([0, 0], device=device)
    transposed = torch.zeros(3, 2, device=device).t()
    with pytest.raises(ValueError, match=r"outermost in memory, got shape \(2, 3\)"):
        add_noise(table_of(transposed), [deviations], position, streams=[0])
    assert not transposed.any()
    add_noise(table_of(transposed), [deviations[:1]], position, streams=[0])
    assert transposed.all()
    images = torch.zeros(2, 3, 4, 4, device=device).contiguous(memory_format=torch.channels_last)
    add_noise(table_of(images), [deviations], position, streams=[0])
    assert images[0].all()
    assert not images[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_product_is_rounded_before_the_sum(dtype: torch.dtype) -> None:
    """With a fused multiply-add, the bits would depend on the instruction set of the processor."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4001, dtype=dtype, generator=generator)
    z, position = torch.zeros(4001, dtype=dtype), torch.tensor([5, 9])
    add_noise(table_of(z), [torch.ones(1, dtype=torch.float64)], position, streams=[2])
    expected = weight.numpy() + np.float32(0.1).astype(z.numpy().dtype) * z.numpy()
    deviation = torch.tensor([float(np.float32(0.1))], dtype=torch.float64)
    add_noise(table_of(weight), [deviation], position, streams=[2])
    assert (weight.numpy() == expected).all()
