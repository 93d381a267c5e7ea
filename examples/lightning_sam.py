"""SAM with Lightning: manual optimization, because a step has two backward passes."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastsam import SAM


class Classifier(lightning.LightningModule):
    """Two layers, trained with SAM."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Both passes; the closure makes the second."""
        optimizer = self.optimizers()

        def closure() -> Tensor:
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            self.manual_backward(loss)
            return loss

        self.losses.append(float(closure().detach()))
        # Lightning's wrapper calls the optimizer's own step(closure), with precision plugins and hooks.
        optimizer.step(closure)
        optimizer.zero_grad()

    def configure_optimizers(self) -> SAM:
        """SAM around SGD."""
        return SAM(self.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)


def main(epochs: int = 5) -> list[float]:
    """Trains on random data and returns the loss of every step."""
    torch.manual_seed(0)
    inputs = torch.randn(256, 8)
    targets = (inputs.sum(dim=1) > 0).long()
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=32, shuffle=True)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Classifier()
    trainer.fit(model, loader)
    return model.losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
