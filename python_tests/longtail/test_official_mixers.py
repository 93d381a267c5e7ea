"""Mixed batches, their losses and gradients against the official codes, with the same random numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fastsam.distributed import World
from fastsam.longtail import TrainConfig, recipe
from fastsam.longtail.build import build_objective
from fastsam.longtail.classes import class_balanced_weights
from fastsam.longtail.data import Batch, Draw, load_digits_lt
from fastsam.longtail.models import Outputs
from fastsam.longtail.training import mixing
from fastsam.longtail.training.batches import EpochBatches
from python_tests.longtail.official_codes import (
    Agreement,
    Draws,
    Meter,
    needs,
    no_accuracy,
    official,
)

CPU = torch.device("cpu")
DIGITS = load_digits_lt()
SIZE = 64

pytestmark = pytest.mark.usefixtures("in_float64")


class InFloat64:
    """Images in float64."""

    def __init__(self, images: Any) -> None:
        self.images = images
        self.targets = images.targets

    def batches(
        self,
        order: Sequence[NDArray[np.int64]],
        draw: Draw | None,
        device: torch.device,
        **options: Any,
    ) -> Iterator[Batch]:
        for batch in self.images.batches(order, draw, device, **options):
            yield batch._replace(views=tuple(view.double() for view in batch.views))


IMAGES: Any = InFloat64(DIGITS.train)


@dataclass
class Mixed:
    """A batch of an epoch.

    Attributes:
        batch: as fastsam trains on it.
        draws: its random numbers.
        images: images before mixing, with their targets.
        foreground: the same for a second stream, if the mixer has one.
    """

    batch: Batch
    draws: Draws
    images: tuple[Tensor, Tensor]
    foreground: tuple[Tensor, Tensor]


def loaded(indices: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    (batch,) = IMAGES.batches([indices], None, CPU)
    return batch.inputs.clone(), batch.targets


def config_of(mixer: str, method: str = "ce", **options: Any) -> TrainConfig:
    given = {"epochs": 9, "batch_size": SIZE, "augment": False, **options}
    return recipe("digits-lt", method, "sgd", mixer=mixer, **given).config()


def mixed(config: TrainConfig, epoch: int, monkeypatch: pytest.MonkeyPatch) -> list[Mixed]:
    draws: list[Draws] = []
    fresh = mixing.numpy_generator

    def recording(*key: Any) -> Any:
        draws.append(Draws(fresh(*key)))
        return draws[-1]

    run = replace(EpochBatches.of_run(config, DIGITS, 1, CPU, World()), images=IMAGES)
    with monkeypatch.context() as patch:
        patch.setattr(mixing, "numpy_generator", recording)
        batches = list(run.read(epoch))
    order = run.sampler.order(epoch)
    assert run.mixing is not None
    second = order if run.mixing.sampler is None else run.mixing.sampler.order(epoch)
    places = range(SIZE, len(order), SIZE)
    parts = zip(np.split(order, places), np.split(second, places), strict=True)
    return [
        Mixed(batch, draw, loaded(first), loaded(other))
        for batch, draw, (first, other) in zip(batches, draws, parts, strict=True)
    ]


class Probe(nn.Module):
    """Logits that are linear in the pixels. It keeps the images that it has seen, and its gradients."""

    n_classes = 10

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)
        self.images: list[Tensor] = []
        self.gradients: list[list[Tensor]] = []
        self.losses: list[Tensor] = []

    def forward(self, images: Tensor, **flags: bool) -> Tensor:
        if "classifier_flag" in flags:
            return images
        self.images.append(images.detach().clone())
        return self.linear(images.flatten(1))

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)

    def step(self) -> None:
        """Stand in for the step of an optimizer."""
        self.gradients.append([value.grad.clone() for value in self.parameters()])  # type: ignore[union-attr]

    param_groups = ({"lr": 0.1},)


def compare(config: TrainConfig, one: Mixed, probe: Probe, agreement: Agreement) -> None:
    """Compare the images of a batch and the gradient of its loss with those that official code has seen."""
    agreement(one.batch.inputs, probe.images[-1])
    objective, none = build_objective(config, DIGITS.counts), None
    features = one.batch.inputs.flatten(1)
    loss = objective.loss(
        Outputs(features, probe.linear(features)),
        one.batch,
        none,  # type: ignore[arg-type]
        epoch=1,
        prepared=[None],
    )
    for found, expected in zip(
        torch.autograd.grad(loss, list(probe.parameters())), probe.gradients[-1], strict=True
    ):
        agreement(found, expected)
    if probe.losses:
        agreement(loss, probe.losses[-1])
    assert one.draws.is_used_up()


def differentiated(probe: Probe, loss: Tensor) -> None:
    probe.losses.append(loss.detach())
    probe.zero_grad()
    loss.backward()
    probe.step()


MIXUP = [
    pytest.param(repository, file, marks=needs(repository))
    for repository, file in (("mixup-cifar10", "train.py"), ("MiSLAS", "methods.py"))
]


@pytest.mark.parametrize(("repository", "file"), MIXUP)
def test_mixup(
    repository: str, file: str, agreement: Agreement, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of("mixup", mixup_alpha=0.4)
    for one in mixed(config, 2, monkeypatch):
        code = official(repository, file, "mixup_data", "mixup_criterion", **one.draws.names())
        images, own, other, share = code.mixup_data(*one.images, alpha=0.4, use_cuda=False)
        probe = Probe()
        loss = code.mixup_criterion(nn.CrossEntropyLoss(), probe(images), own, other, share)
        differentiated(probe, loss)
        compare(config, one, probe, agreement)


@needs("CutMix-PyTorch")
def test_cutmix(agreement: Agreement, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("cutmix")
    count = 0
    for one in (found for epoch in (1, 2) for found in mixed(config, epoch, monkeypatch)):
        probe = Probe()
        code = official(
            "CutMix-PyTorch", "train.py", "train", "rand_bbox",
            args=SimpleNamespace(beta=1.0, cutmix_prob=0.5, print_freq=1, verbose=False, epochs=9),
            AverageMeter=Meter, accuracy=no_accuracy, get_learning_rate=lambda _: [0.1],
            **one.draws.names(),
        )  # fmt: skip
        code.train([one.images], probe, nn.CrossEntropyLoss(), probe, 1)
        compare(config, one, probe, agreement)
        count += one.batch.second is not None
    assert 2 <= count <= 8


@needs("cmo")
def test_cmo(agreement: Agreement, monkeypatch: pytest.MonkeyPatch) -> None:
    """All epochs, the first and the last of which are not mixed, with class weights."""
    config = config_of("cmo", "ce-rw")
    criterion = nn.CrossEntropyLoss(class_balanced_weights(DIGITS.counts, config.beta or 0.9999))
    count = 0
    for epoch in range(1, config.epochs + 1):
        for one in mixed(config, epoch, monkeypatch):
            probe = Probe()
            code = official(
                "cmo", "cifar_train.py", "train", "rand_bbox",
                AverageMeter=Meter, accuracy=no_accuracy, **one.draws.names(),
            )  # fmt: skip
            arguments = SimpleNamespace(
                data_aug="CMO", start_data_aug=3, end_data_aug=3, epochs=config.epochs,
                gpu=None, mixup_prob=0.5, beta=1.0, print_freq=1,
            )  # fmt: skip
            code.train(
                [one.images], probe, criterion, probe, epoch - 1, arguments,
                MagicMock(), MagicMock(), [one.foreground],
            )  # fmt: skip
            compare(config, one, probe, agreement)
            count += one.batch.second is not None
    assert count > 0


# ---- plug-ins ----


@needs("BagofTricks-LT")
@pytest.mark.usefixtures("installed")
def test_remix(agreement: Agreement, monkeypatch: pytest.MonkeyPatch) -> None:
    """The criterion is that of each image. With a mean, the code multiplies means by the mean share."""
    config = config_of("remix")
    shares = set()
    for one in mixed(config, 1, monkeypatch) + mixed(config, 2, monkeypatch):
        probe = Probe()
        code = official(
            "BagofTricks-LT",
            "lib/core/combiner.py",
            "remix",
            accuracy=no_accuracy,
            **one.draws.names(),
        )
        settings = SimpleNamespace(
            alpha=1.0, remix_tau=0.5, remix_kappa=3.0, device="cpu", func=nn.Softmax(dim=1),
            num_class_list=torch.from_numpy(DIGITS.counts),
        )  # fmt: skip
        criterion = nn.CrossEntropyLoss(reduction="none")
        differentiated(probe, code.remix(settings, probe, criterion, *one.images, {})[0])
        compare(config, one, probe, agreement)
        assert one.batch.share is not None
        shares |= {*one.batch.share.tolist()}
    assert shares >= {0.0, 1.0}


@needs("Prior-LT")
@pytest.mark.usefixtures("installed")
def test_unimix(agreement: Agreement, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("unimix")
    names = ("unimix", "unimix_factor", "unimix_sampler")
    for one in mixed(config, 1, monkeypatch):
        code = official("Prior-LT", "core.py", *names, **one.draws.names())
        images, own, other, shares = code.unimix(*one.images, DIGITS.counts, 0.8, -0.1)
        assert one.batch.second is not None
        assert one.batch.share is not None
        assert one.batch.second.tolist() == other.tolist()
        agreement(one.batch.share, shares)
        probe = Probe()
        logits = probe(images)
        losses = [functional.cross_entropy(logits, y, reduction="none") for y in (own, other)]
        differentiated(probe, (shares * losses[0] + (1 - shares) * losses[1]).mean())
        compare(config, one, probe, agreement)


@needs("balanced_mixup")
@pytest.mark.usefixtures("installed")
def test_balanced_mixup(agreement: Agreement, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("balanced-mixup")
    for one in mixed(config, 1, monkeypatch):
        probe = Probe()
        code = official(
            "balanced_mixup", "train_lt_mxp.py", "run_one_epoch", "cross_entropy_loss",
            trange=lambda _: nullcontext(MagicMock()), get_lr=lambda _: 0.1, **one.draws.names(),
        )  # fmt: skip
        code.run_one_epoch([(one.images, one.foreground)], probe, None, 0.2, probe)
        compare(config, one, probe, agreement)
