"""Runs on several ranks equal runs of one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastsam.curvature import BatchLoss, negative_curvature, spectral_density
from fastsam.curvature.lanczos import run as runs
from python_tests.curvature.oracles import classification, mlp
from python_tests.ranks import run_ranks


def summed(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1])


def lag_behind() -> None:
    """Make the host check every step two steps later, as with a GPU."""
    begin = runs.Monitor.__init__

    def late(self, *arguments, **options):
        begin(self, *arguments, **options)
        self._lag = 2

    runs.Monitor.__init__ = late


def work(rank: int, folder: str) -> None:
    content = torch.load(f"{folder}/problem.pt", weights_only=True)
    model = mlp((3, 5, 4))
    model.load_state_dict(content["model"])
    x, y = content["x"], content["y"]
    batches = [(x[:11], y[:11]), (x[11:], y[11:])]
    whole = {"steps": 12, "probes": 5, "progress": False}
    found = {
        "samples": spectral_density(model, F.cross_entropy, batches, shard="samples", **whole),
        "batches": spectral_density(model, BatchLoss(summed), batches, shard="samples", **whole),
        "probes": spectral_density(model, F.cross_entropy, batches, shard="probes", **whole),
    }
    lag_behind()
    kept = {"shard": "samples", "checkpoint_interval": 0 if rank == 0 else 60, **whole}
    for name in ("kept", "resumed"):
        found[name] = spectral_density(
            model, F.cross_entropy, batches, checkpoint=f"{folder}/run", tolerance=0.2, **kept
        )
    messages = []
    for data, options in (
        ([(x + rank, y)], {"shard": "samples"}),
        (batches, {"shard": "probes", "probes": 2}),
        (batches, {"shard": "samples", "checkpoint": f"{folder}/{'run' if rank else 'none'}"}),
    ):
        try:
            spectral_density(model, F.cross_entropy, data, steps=3, **options)
        except ValueError as error:
            messages.append(str(error))
    try:
        negative_curvature(model, F.cross_entropy, batches, probes=3, shard="probes")
    except ValueError as error:
        messages.append(str(error))
    torch.save(messages, f"{folder}/messages-{rank}.pt")
    for name, spectrum in found.items():
        spectrum.save(f"{folder}/{name}-{rank}.npz")


@pytest.mark.slow
def test_three_ranks_equal_one_process(tmp_path):
    from fastsam.curvature import Spectrum

    model, (x, y) = mlp((3, 5, 4)), classification(13, 3, 4)
    torch.save({"model": model.state_dict(), "x": x, "y": y}, tmp_path / "problem.pt")
    run_ranks(work, 3, str(tmp_path))
    batches = [(x[:11], y[:11]), (x[11:], y[11:])]
    alone = spectral_density(model, F.cross_entropy, batches, steps=12, probes=5)
    for name in ("samples", "batches", "probes"):
        found = [Spectrum.load(tmp_path / f"{name}-{rank}.npz") for rank in range(3)]
        for spectrum in found:
            assert np.allclose(spectrum.alpha, alone.alpha, atol=1e-8)
            assert spectrum.weight == alone.weight
            assert spectrum.loss == pytest.approx(alone.loss)
            assert spectrum.gradient_norm == pytest.approx(alone.gradient_norm)
            assert np.array_equal(spectrum.alpha, found[0].alpha)
            assert spectrum.settings["probe_indices"] == [0, 1, 2, 3, 4]
    for rank in range(3):
        messages = torch.load(tmp_path / f"messages-{rank}.pt", weights_only=True)
        assert len(messages) == 4
        assert "different data" in messages[0]
        assert "one probe per rank" in messages[1]
        assert "find different runs" in messages[2]
        assert "has no probes to split" in messages[3]
    for rank in range(3):
        kept, resumed = (
            Spectrum.load(tmp_path / f"{name}-{rank}.npz") for name in ("kept", "resumed")
        )
        assert kept.order.max() < 12
        assert np.allclose(kept.alpha[:, :5], alone.alpha[:, :5], atol=1e-8)
        assert np.array_equal(kept.alpha, resumed.alpha)
        assert np.array_equal(kept.order, resumed.order)


def test_without_a_process_group():
    with pytest.raises(ValueError, match="torchrun"):
        spectral_density(mlp((3, 3)), F.cross_entropy, classification(5, 3, 3), shard="samples")
    with pytest.raises(ValueError, match="shard must be"):
        spectral_density(mlp((3, 3)), F.cross_entropy, classification(5, 3, 3), shard="layers")
