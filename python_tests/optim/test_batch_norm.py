"""The second pass does not update BatchNorm statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastsam import SAM
from fastsam.optim import frozen_batch_norm_statistics
from python_tests.optim.trajectories import assert_same_bits


def network(seed: int, momentum: float | None = 0.1) -> nn.Module:
    torch.manual_seed(seed)
    shared = nn.BatchNorm1d(5, momentum=momentum)
    return nn.Sequential(
        nn.Linear(4, 5),
        shared,
        nn.Tanh(),
        nn.Unflatten(1, (5, 1)),
        nn.BatchNorm1d(5, affine=False, momentum=momentum),
        nn.Flatten(),
        nn.BatchNorm1d(5, track_running_stats=False),
        shared,
    )


def buffers(model: nn.Module) -> list[torch.Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_stay_and_outputs_do_not_change(momentum, seed):
    model = network(seed, momentum)
    twin = copy.deepcopy(model)
    x = torch.randn(8, 4)
    before = buffers(model)
    with frozen_batch_norm_statistics(model):
        found = model(x)
    assert_same_bits(buffers(model), before)
    expected = twin(x)
    assert_same_bits([found], [expected])
    found.sum().backward()
    expected.sum().backward()
    assert_same_bits([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])
    model(x)
    assert_same_bits(buffers(model), buffers(twin))  # afterwards the statistics are tracked again


def test_a_batch_that_overflows_does_not_change_the_statistics(seed):
    model = network(seed)
    before = buffers(model)
    with frozen_batch_norm_statistics(model):
        model(torch.full((8, 4), float("inf")))
    assert_same_bits(buffers(model), before)


def test_evaluation_mode_uses_the_statistics(seed):
    model = network(seed)
    model(torch.randn(8, 4))
    model.eval()
    x = torch.randn(3, 4)
    expected = model(x)
    with frozen_batch_norm_statistics(model):
        assert_same_bits([model(x)], [expected])
        model.train()
        model(torch.randn(8, 4))
        model.eval()
        assert_same_bits([model(x)], [expected])


def test_contexts_nest(seed):
    model = network(seed)
    x = torch.randn(8, 4)
    before = buffers(model)
    with frozen_batch_norm_statistics(model):
        with frozen_batch_norm_statistics(model[1]):
            model(x)
        model(x)  # still frozen, because the outer context is still open
        assert_same_bits(buffers(model), before)
    model(x)
    assert int(model[1].num_batches_tracked) == 2  # the layer is used twice in a pass


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_ends_the_context(error, seed):
    model = network(seed)
    with pytest.raises(error), frozen_batch_norm_statistics(model):
        raise error
    assert model[1].track_running_stats
    assert not model[6].track_running_stats
    model(torch.randn(8, 4))
    assert int(model[4].num_batches_tracked) == 1


def test_a_sam_step_tracks_one_pass(seed):
    model = network(seed)
    x = torch.randn(8, 4)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
    model(x).square().mean().backward()
    after_first = buffers(model)
    optimizer.first_step(zero_grad=True)
    with frozen_batch_norm_statistics(model):
        model(x).square().mean().backward()
    optimizer.second_step(zero_grad=True)
    assert_same_bits(buffers(model), after_first)


def test_sync_batch_norm_is_frozen_too():
    layer = nn.SyncBatchNorm(3)
    with frozen_batch_norm_statistics(layer):
        assert not layer.track_running_stats
    assert layer.track_running_stats
