"""Limits on the norms of weight vectors: which vectors they scale, and runs that resume with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastsam.longtail import Trainer, recipe
from fastsam.longtail.build import build_network
from fastsam.longtail.errors import UsageError
from fastsam.longtail.norms import NormLimits
from fastsam.longtail.training import Step
from fastsam.stopping import Stopped
from python_tests.longtail.test_interrupted import compared, stop_after
from python_tests.longtail.test_trainer import FEW


@pytest.mark.parametrize("text", ["head.weight=0.5", "head.weight=range:0.25"])
def test_norms_are_limited_after_every_step(text: str, tmp_path: Path) -> None:
    config = recipe("digits-lt", "ce", "sgd", epochs=2, batch_size=32, max_norm=(text,)).config()
    norms: list[Tensor] = []

    def on_step(_: Step) -> None:
        norms.append(trainer.model.head.weight.detach().norm(dim=1))

    trainer = Trainer(config, data=FEW, progress=False, on_step=on_step)
    begin = trainer.model.head.weight.detach().norm(dim=1)
    limit = 0.5 if "range" not in text else float(begin.min() + 0.25 * (begin.max() - begin.min()))
    expected = trainer.fit()
    assert all(bool((each <= limit * (1 + 1e-6)).all()) for each in norms)
    assert any(bool((each > limit * (1 - 1e-6)).any()) for each in norms)  # it is active
    request, stopping = stop_after(3)
    with pytest.raises(Stopped):
        Trainer(
            config, data=FEW, out=tmp_path, progress=False, stop=request, on_step=stopping
        ).fit()
    resumed = Trainer(config, data=FEW, out=tmp_path, progress=False, resume=True)
    assert resumed.limits.limits == pytest.approx({"head.weight": limit})
    assert compared(resumed.fit()) == compared(expected)


def test_a_projection_scales_long_vectors_only() -> None:
    config = recipe("digits-lt", "ce", "sgd", max_norm=("head.weight=2",)).config()
    network = build_network(config, 3, 1)
    with torch.no_grad():
        network.head.weight.copy_(torch.eye(3, 64) * torch.tensor([[1.0], [2.0], [5.0]]))
    NormLimits.of_run(config, network, None).project()
    assert network.head.weight.detach().norm(dim=1).tolist() == [1.0, 2.0, 2.0]


def test_a_projection_in_float64() -> None:
    config = recipe("digits-lt", "ce", "sgd", max_norm=("head.weight=range:0.3",)).config()
    network = build_network(config, 10, 1).double()
    head = network.head.get_parameter("weight")
    limits = NormLimits.of_run(config, network, None)
    lengths = head.detach().square().sum(dim=1).sqrt()
    limit = float(0.7 * lengths.min() + 0.3 * lengths.max())
    assert limits.limits["head.weight"] == pytest.approx(limit, rel=1e-12)
    nn.init.normal_(head, std=limit / 8)
    rows = [row * min(1, limit / float(row.square().sum().sqrt())) for row in head.detach().clone()]
    limits.project()
    torch.testing.assert_close(head.detach(), torch.stack(rows), rtol=1e-12, atol=1e-14)


def test_the_vectors_of_a_cosine_head_are_those_of_its_classes() -> None:
    config = recipe("digits-lt", "ldam", "sgd", max_norm=("head.weight=2",)).config()
    network = build_network(config, 3, 1)
    with torch.no_grad():
        network.head.weight.copy_(torch.eye(64, 3) * torch.tensor([1.0, 2.0, 5.0]) + 0.1)
    before = network.head.weight.detach().clone()
    NormLimits.of_run(config, network, None).project()
    norms = before.norm(dim=0)
    assert norms.min() < 2 < norms.max()
    torch.testing.assert_close(network.head.weight.detach(), before * (2 / norms).clamp_max(1))


def test_biases_and_scales_are_not_limited() -> None:
    config = recipe("digits-lt", "ce", "sgd", max_norm=("*=0.01",)).config()
    network = build_network(config, 3, 1)
    names = dict(network.named_parameters())
    limits = NormLimits.of_run(config, network, None)
    assert limits.limits.keys() == {name for name, value in names.items() if value.ndim > 1}
    config = config.replace(max_norm=("head.bias=1",))
    with pytest.raises(UsageError, match=r"'head.bias' matches only .* such as head.bias.*; limit"):
        NormLimits.of_run(config, network, None)


@pytest.mark.parametrize("text", ["head.weight", "head.weight=0", "=1", "head.weight=range:x"])
def test_a_wrong_limit_is_refused(text: str) -> None:
    config = recipe("digits-lt", "ce", "sgd", max_norm=(text,)).config()
    with pytest.raises(UsageError, match="max_norm must be PATTERN=NORM"):
        NormLimits.of_run(config, build_network(config, 3, 1), None)
