"""Spectra of single classes: the loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastsam.longtail import Checkpoint, recipe
from fastsam.longtail.build import build_network
from fastsam.longtail.data import load_digits_lt
from fastsam.longtail.landscape import landscape
from python_tests.longtail.formulas import ce, ldam

DIGITS = load_digits_lt()


@pytest.mark.parametrize("method", ["ce", "ldam"])
@pytest.mark.parametrize("loss", ["ce", "as-trained"])
def test_the_loss_is_that_of_the_probabilities_or_of_the_training(method: str, loss: str) -> None:
    config = recipe("digits-lt", method, "sgd", epochs=1).config()
    model = build_network(config, 10, 1).eval()
    checkpoint = Checkpoint(config, 1, 1, 10, model.state_dict(), {}, [])
    (found,) = landscape(
        model, DIGITS, checkpoint, [4], loss=loss, split="test", steps=2, progress=False
    )
    order = [np.flatnonzero(DIGITS.test.targets == 4)]
    (batch,) = DIGITS.test.batches(order, None, torch.device("cpu"))
    with torch.no_grad():
        outputs = model(batch.inputs).double().numpy()
    counts = DIGITS.counts.astype(np.float64)
    nothing = np.zeros(1)
    if method == "ce" or loss == "ce":
        logits = outputs * (30.0 if method == "ldam" else 1.0)
        losses = [ce(row, 4, counts, nothing) for row in logits]
    else:
        losses = [ldam(row, 4, counts, nothing) for row in outputs]
    assert found.spectrum.loss == pytest.approx(np.mean(losses), rel=1e-4)
