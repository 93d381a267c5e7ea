"""Training and data path on an NVIDIA GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fastsam.longtail import Trainer, recipe
from fastsam.longtail.data import Draw, load_digits_lt
from fastsam.longtail.data.augment import Compose, RandomCrop, RandomHorizontalFlip
from fastsam.longtail.data.jitter import ColorJitter
from fastsam.longtail.data.normalization import Normalization

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
CPU = torch.device("cpu")
DIGITS = load_digits_lt()
WAYS: list[dict[str, Any]] = [
    {},
    {"precision": "bfloat16", "channels_last": True},
    {"precision": "float16"},
    {"precision": "auto"},
    {"tf32": True},
    {"compile": True},
    {"checkpoint_activations": True},
    {"accumulate": 2},
    {"ema": 0.9, "select": "best-validation"},
    {"ascent_share": 0.5},
]


@pytest.mark.parametrize("options", WAYS, ids=lambda options: " ".join(options) or "plain")
def test_a_run_learns(options: dict[str, Any]) -> None:
    settings = {
        "epochs": 16,
        "defer_epoch": 12,
        "ascent_start": "8",
        "device": DEVICE.type,
        **options,
    }
    run = Trainer(recipe("digits-lt", "ce-drw", "sam", **settings).config(), progress=False)
    result = run.fit()
    assert result.history[-1].loss < 0.5 * result.history[0].loss
    assert (
        result.history[-1].train_accuracy > 60
    )  # chance is below 35, the share of the largest class
    assert all(parameter.device.type == DEVICE.type for parameter in run.model.parameters())


def test_a_run_takes_the_steps_of_a_cpu() -> None:
    weights = []
    for device in (CPU, DEVICE):
        # By default cuDNN rounds the factors of float32 convolutions to TF32 (10 bits).
        options = {"device": device.type, "epochs": 1, "batch_size": 256, "tf32": False}
        run = Trainer(recipe("digits-lt", "ce", "sam", **options).config(), progress=False)
        run.fit()
        weights.append(torch.cat([p.detach().cpu().flatten() for p in run.model.parameters()]))
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-2, atol=1e-3)


def test_images_are_augmented_as_on_a_cpu() -> None:
    order = [np.arange(32)]
    (seeds,) = Draw(0, 1).seeds(order)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (32, 3, 24, 20), dtype=torch.uint8, generator=generator)
    augment = Compose((RandomCrop(3), RandomHorizontalFlip(), ColorJitter(0.4, 0.4, 0.4)))
    found = [augment(images.to(device), seeds) for device in (CPU, DEVICE)]
    assert torch.equal(found[1].cpu(), found[0])
    normalization = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    inputs = [normalization.on(part.device)(part) for part in found]
    assert torch.equal(inputs[1].cpu(), inputs[0])


def test_batches_of_a_data_set_are_those_of_a_cpu() -> None:
    order = [np.arange(64), np.arange(30, 60)]
    for draw in (None, Draw(3, 2)):
        batches = [DIGITS.train.batches(order, draw, device) for device in (CPU, DEVICE)]
        for there, here in zip(*batches, strict=True):
            assert here.inputs.device.type == DEVICE.type
            torch.testing.assert_close(here.inputs.cpu(), there.inputs, rtol=1e-6, atol=1e-6)
            assert torch.equal(here.targets.cpu(), there.targets)
