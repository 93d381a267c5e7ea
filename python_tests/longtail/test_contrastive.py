"""PaCo: the loss compared with NumPy, queue and momentum encoder, and whole runs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsam.longtail import Checkpoint, Trainer, recipe
from fastsam.longtail.data import load_digits_lt
from fastsam.longtail.errors import UsageError
from fastsam.longtail.losses import PaCoClassifier, PaCoLoss
from fastsam.longtail.models import build_model
from fastsam.longtail.optimizers import OPTIMIZERS
from fastsam.longtail.training import Step

COUNTS = np.array([50.0, 9.0, 3.0, 1.0])
DIGITS = load_digits_lt()


def paco_in_numpy(
    z: np.ndarray,
    y: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    labels: np.ndarray,
    n: np.ndarray,
    alpha: float,
    temperature: float,
) -> float:
    """Compute the loss sample by sample; the center has weight 1."""
    losses = []
    for i in range(len(z)):
        terms = [(z[i, c] + np.log(n[c] / n.sum()), float(c == y[i])) for c in range(len(n))]
        for j in range(len(k)):
            if j != i and labels[j] >= 0:
                terms.append((q[i] @ k[j] / temperature, alpha * (labels[j] == y[i])))
        exponents = np.array([term for term, _ in terms])
        positive = np.array([weight for _, weight in terms])
        log_sum = np.log(np.exp(exponents - exponents.max()).sum()) + exponents.max()
        losses.append(-(positive @ (exponents - log_sum)) / positive.sum())
    return float(np.mean(losses))


def sample(seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(4, (6,), generator=generator)
    k = torch.nn.functional.normalize(
        torch.randn(15, 3, generator=generator, dtype=torch.float64), dim=1
    )
    labels = torch.cat([y, torch.randint(-1, 4, (9,), generator=generator)])
    return z, y, k[:6], k, labels


def test_loss_is_the_formula_and_its_gradient_is_right(seed: int) -> None:
    z, y, q, k, labels = sample(seed)
    loss = PaCoLoss(COUNTS, alpha=0.3, temperature=0.4)
    expected = paco_in_numpy(
        z.numpy(), y.numpy(), q.numpy(), k.numpy(), labels.numpy(), COUNTS, 0.3, 0.4
    )
    assert float(loss(z, y, q, k, labels)) == pytest.approx(expected, rel=1e-9)

    def value(z: Tensor, q: Tensor) -> Tensor:
        return loss(z, y, q, torch.cat([q, k[6:]]), labels)

    inputs = (z.requires_grad_(), q.clone().requires_grad_())
    assert torch.autograd.gradcheck(value, inputs)


def test_without_contrasts_of_the_class_it_is_a_balanced_softmax_over_more() -> None:
    z, y, q, k, labels = sample(3)
    nobody = torch.full_like(labels, -1)
    expected = torch.nn.functional.cross_entropy(
        z + torch.from_numpy(np.log(COUNTS / COUNTS.sum())), y
    )
    assert torch.allclose(PaCoLoss(COUNTS)(z, y, q, k, nobody), expected)


def network(queue: int = 5) -> PaCoClassifier:
    base = build_model("resnet8", 4, channels=1)
    return PaCoClassifier(base, projection=3, queue=queue, momentum=0.9)


def test_queue_is_first_in_first_out() -> None:
    model = network()
    for start, count in ((0, 3), (3, 3), (6, 7)):
        keys = torch.arange(start, start + count).float()[:, None].expand(-1, 3)
        model.advance(keys, torch.arange(start, start + count))
        newest = set(range(max(0, start + count - 5), start + count))
        assert set(model.queue_targets.tolist()) - {-1} == newest
        filled = model.queue_targets >= 0
        assert torch.equal(model.queue[filled, 0].long(), model.queue_targets[filled])


def test_the_copy_follows_slowly_and_is_not_trained() -> None:
    model = network()
    slow = [p.clone() for p in model.key_encoder.parameters()]
    fast = [*model.features.parameters(), *model.projection.parameters()]
    with torch.no_grad():
        for parameter in fast:
            parameter.add_(1)
    model.advance(torch.zeros(1, 3), torch.zeros(1, dtype=torch.long))
    for now, before, new in zip(model.key_encoder.parameters(), slow, fast, strict=True):
        assert torch.allclose(now, before + 0.1 * (new - before), atol=1e-6)
        assert not now.requires_grad


def config_for(optimizer: str, **settings: Any) -> Any:
    options = {"epochs": 2, "batch_size": 100, "lr": 0.05, "paco_queue": 64, **settings}
    return recipe("digits-lt", "paco", optimizer, **options).config()


@pytest.mark.parametrize("optimizer", ["sgd", "sam"])
def test_a_run_differentiates_the_formula_with_its_queue(
    optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Tensor, ...]] = []
    per_sample = PaCoLoss.per_sample

    def spy(self: PaCoLoss, *arguments: Tensor) -> Tensor:
        calls.append(tuple(value.detach().clone() for value in arguments))
        return per_sample(self, *arguments)

    monkeypatch.setattr(PaCoLoss, "per_sample", spy)
    steps: list[Step] = []
    run = Trainer(config_for(optimizer), data=DIGITS, on_step=steps.append, progress=False)
    before = copy.deepcopy(run.model)
    run.fit()
    passes = 2 if optimizer == "sam" else 1
    assert len(calls) == passes * len(steps)
    for step, seen in zip(steps, calls[::passes], strict=True):
        z, y, q, k, labels = (value.double().numpy() for value in seen)
        assert np.allclose(z, step.logits.numpy())
        assert y.tolist() == DIGITS.train.targets[step.indices.numpy()].tolist()
        counts = DIGITS.counts.astype(float)
        expected = paco_in_numpy(z, y, q, k, labels, counts, 0.01, 0.05)
        assert float(step.loss) == pytest.approx(expected, rel=1e-4)
        assert np.allclose(np.linalg.norm(k[: 2 * len(y)], axis=1), 1, atol=1e-5)
    if optimizer == "sam":
        for first, second in zip(calls[::2], calls[1::2], strict=True):
            size = len(first[1])
            assert torch.equal(first[3][size:], second[3][size:])
            assert not torch.equal(first[3][:size], second[3][:size])
    (earliest, later) = (calls[0][4], calls[passes][4])
    assert (earliest[-64:] == -1).all()  # the queue is empty at the start
    assert sorted(later[-64:].tolist()) == sorted(calls[0][1][-64:].tolist())
    keys = dict(run.model.named_parameters())
    changed = [n for n, p in before.named_parameters() if not torch.equal(p, keys[n])]
    assert any(name.startswith("key_encoder") for name in changed)
    assert any(name.startswith("projection") for name in changed)


def test_a_resumed_run_ends_with_the_same_bits(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastsam.longtail.training.saving.EPOCH_SECONDS", 0.0)
    config = config_for("sam", epochs=3)
    Trainer(config, data=DIGITS, out=tmp_path / "whole", progress=False).fit()

    def stop(step: Step) -> None:
        if step.epoch == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trainer(config, data=DIGITS, out=tmp_path / "cut", on_step=stop, progress=False).fit()
    Trainer(config, data=DIGITS, out=tmp_path / "cut", resume=True, progress=False).fit()
    whole, cut = (Checkpoint.load(tmp_path / name).model for name in ("whole", "cut"))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


@pytest.mark.parametrize("queue", [64, 32])
def test_a_run_that_starts_from_another_one_has_an_empty_queue(queue: int, tmp_path: Path) -> None:
    one = tmp_path / "one"
    config = config_for("sgd", epochs=1, model="resnet8", ema=0.9)
    Trainer(config, data=DIGITS, out=one, progress=False).fit()
    other = config.replace(init=str(one), paco_queue=queue)
    model = Trainer(other, data=DIGITS, progress=False).model
    kept = Checkpoint.load(one).judged_weights()
    assert (kept["queue_targets"] >= 0).all()
    assert isinstance(model, PaCoClassifier)
    assert model.queue_targets.tolist() == [-1] * queue
    assert not model.queue.any()
    assert not model.queue_place
    for name in ("projection.0.weight", "key_encoder.1.0.weight"):
        assert torch.equal(model.state_dict()[name], kept[name])


@pytest.mark.filterwarnings("ignore:classes are balanced")
@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", ["paco", "paco-drs"])
def test_it_runs_with_every_optimizer(method: str, optimizer: str) -> None:
    options = {"epochs": 2, "batch_size": 138, "lr": 0.01, "paco_queue": 32}
    config = recipe("digits-lt", method, optimizer, **options).config()
    result = Trainer(config, data=DIGITS, progress=False).fit()
    assert len(result.history) == 2
    assert all(np.isfinite(epoch.loss) for epoch in result.history)


def test_options_out_of_range_are_refused() -> None:
    for options in ({"alpha": -1.0}, {"beta": float("nan")}, {"beta": 0.0}, {"temperature": 0.0}):
        with pytest.raises(UsageError):
            PaCoLoss(COUNTS, **options)
