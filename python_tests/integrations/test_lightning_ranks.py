"""Lightning on two processes trains like one process on whole batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from fastsam import SAM
from python_tests.ranks import run_launched

lightning = pytest.importorskip("lightning", reason="lightning is not installed")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
    """A small classifier in float64; SAM calls Lightning's closure twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2)).double()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> SAM:
        base = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return SAM(optimizer=base, rho=0.3, closure="both_passes")


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(96, 8, dtype=torch.float64, generator=generator)
    return TensorDataset(inputs, torch.randint(2, (96,), generator=generator))


def train(rank: int, path: str, strategy: str, devices: int) -> None:
    trainer = lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module()
    # Without shuffling, the ranks together have the batches of one process.
    own: DistributedSampler[Any] = DistributedSampler(data(), devices, rank, shuffle=False)
    trainer.fit(module, DataLoader(data(), batch_size=24 // devices, sampler=own))
    torch.save(module.net.state_dict(), f"{path}/{rank}-of-{devices}.pt")


def test_ddp_equals_one_process(tmp_path: Path) -> None:
    run_launched(train, 2, str(tmp_path), "ddp", 2)
    train(0, str(tmp_path), "auto", 1)
    expected = torch.load(tmp_path / "0-of-1.pt")
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}-of-2.pt")
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
