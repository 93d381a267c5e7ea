"""A skipped step restores buffers; other steps keep their changes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fastsam import SAM, capture_step
from fastsam.optim import LookSAM, kept_if_skipped


def network(seed: int) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(3, 5),
        nn.BatchNorm1d(5),
        nn.ReLU(),
        nn.BatchNorm1d(5, momentum=None),
        nn.Linear(5, 2),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def two_calls(model: nn.Module, optimizer: SAM, inputs: torch.Tensor) -> None:
    for step in (optimizer.first_step, optimizer.second_step):
        model(inputs).square().mean().backward()
        step(zero_grad=True)


def by_closure(model: nn.Module, optimizer: LookSAM, inputs: torch.Tensor) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)


def sam(model: nn.Module) -> SAM:
    return SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)


def sam_on_another_base(model: nn.Module) -> SAM:
    return SAM(model.parameters(), torch.optim.RMSprop, lr=0.01)


def looksam(model: nn.Module) -> LookSAM:
    return LookSAM(torch.optim.SGD(model.parameters(), lr=0.1), every=1)


@pytest.mark.parametrize(
    ("made", "step"), [(sam, two_calls), (sam_on_another_base, two_calls), (looksam, by_closure)]
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_buffers_of_a_skipped_step(
    made: Callable[[nn.Module], SAM], step: Callable[..., None], bad: float
) -> None:
    model = network(1)
    optimizer = made(model)
    plain = copy.deepcopy(model)
    other = made(plain)
    generator = torch.Generator().manual_seed(2)
    for number in range(4):
        inputs = torch.randn(7, 3, generator=generator)
        if number != 2:  # the reference skips the bad batch and does not use the context
            step(plain, other, inputs)
        else:
            inputs[4, 1] = bad
        before = [buffer.clone() for buffer in model.buffers()]
        addresses = [buffer.data_ptr() for buffer in model.buffers()]
        with kept_if_skipped(optimizer, model.buffers()):
            step(model, optimizer, inputs)
        same = [torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True)]
        assert all(same) if number == 2 else not any(same)
        assert addresses == [buffer.data_ptr() for buffer in model.buffers()]
        for mine, theirs in zip(
            model.state_dict().values(), plain.state_dict().values(), strict=True
        ):
            assert torch.equal(mine, theirs)
    assert int(optimizer.skipped_steps) == 1


@pytest.mark.filterwarnings("ignore::fastsam.kernels.backends.FallbackWarning")
@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_count_moves_with_the_parameters(device: str) -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = SAM([weight], torch.optim.SGD, lr=0.1)

    def skip() -> None:
        for step in (optimizer.first_step, optimizer.second_step):
            weight.grad = torch.full_like(weight, float("nan"))
            step(zero_grad=True)

    skip()
    assert optimizer.skipped_steps == 1
    weight = nn.Parameter(torch.ones(2, device=device))
    optimizer.param_groups[0]["params"] = [weight]
    skip()
    assert optimizer.skipped_steps.device == weight.device
    if device != "meta":
        assert optimizer.skipped_steps == 2


def test_an_error_inside_passes_through() -> None:
    model = network(3)
    optimizer = sam(model)
    with pytest.raises(KeyError), kept_if_skipped(optimizer, model.buffers()):
        raise KeyError
    with kept_if_skipped(optimizer, []):
        two_calls(model, optimizer, torch.ones(2, 3))


def test_a_captured_step_that_is_skipped_leaves_the_buffers() -> None:
    model = network(4)
    optimizer = sam(model)
    inputs, targets = (
        torch.randn(6, 3, generator=torch.Generator().manual_seed(5)),
        torch.arange(6) % 2,
    )
    step = capture_step(model, nn.CrossEntropyLoss(), optimizer, (inputs, targets))
    step((inputs, targets))
    before = [buffer.clone() for buffer in model.buffers()]
    step((inputs * float("nan"), targets))
    assert int(optimizer.skipped_steps) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    step((inputs, targets))
    assert not any(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


def test_tensors_of_any_strides() -> None:
    """Transposed, spread, expanded, empty and 0-dimensional tensors, and neighbors of the spread one."""
    base = torch.arange(12.0).view(3, 4)
    spread, neighbor = base[:, 1], base[:, 2]
    kept = {
        "spread": spread,
        "transposed": torch.arange(6.0).view(2, 3).t(),
        "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "expanded": torch.ones(1).expand(3),
        "empty": torch.empty(0, 5),
        "number": torch.tensor(4),
        "flags": torch.tensor([True, False]),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "frozen": nn.Parameter(torch.ones(2, 2), requires_grad=False),
    }
    model = network(6)
    optimizer = sam(model)
    for bad in (False, True):
        before = {name: tensor.clone() for name, tensor in kept.items()}
        neighbor_before = neighbor.clone()
        with kept_if_skipped(optimizer, kept.values()):
            for name, tensor in kept.items():
                changed = tensor[:1] if name == "expanded" else tensor
                changed.zero_() if changed.dtype == torch.bool else changed.add_(1)
            two_calls(model, optimizer, torch.full((2, 3), float("nan") if bad else 1.0))
        for name, tensor in kept.items():
            same = torch.equal(tensor, before[name])
            assert same if bad or not tensor.numel() else not same, name
        assert torch.equal(neighbor, neighbor_before)
    assert int(optimizer.skipped_steps) == 1
