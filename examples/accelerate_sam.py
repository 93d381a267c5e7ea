"""SAM with Hugging Face Accelerate: prepare the model and the data, and keep the optimizer.

Accelerate wraps an optimizer to skip its ``step()`` while gradients accumulate; SAM makes both of its steps
on full gradients, so it stays outside and only the model, which reduces the gradients, is prepared.

With ``mixed_precision="fp16"``, on a GPU, Accelerate scales the loss and leaves it to the optimizer it has
wrapped to undo that. This one is not wrapped: the scaler takes both halves here, as docs/sam.md shows, and
does nothing in other precisions.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastsam import SAM


def main(epochs: int = 5, *, cpu: bool = True, mixed_precision: str = "no") -> list[float]:
    """Trains on random data and returns the mean loss of every epoch."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=cpu, mixed_precision=mixed_precision)
    scaler = accelerator.scaler or torch.amp.GradScaler(enabled=False)
    inputs = torch.randn(256, 8)
    targets = (inputs.sum(dim=1) > 0).long()
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=32, shuffle=True)
    model, loader = accelerator.prepare(model, loader)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)

    means = []
    for _ in range(epochs):
        losses = []
        for x, y in loader:
            for half in (optimizer.ascent, optimizer):
                loss = nn.functional.cross_entropy(model(x), y)
                accelerator.backward(loss)
                scaler.step(half)
                optimizer.zero_grad()
            scaler.update()
            losses.append(float(loss.detach()))
        means.append(sum(losses) / len(losses))
    return means


if __name__ == "__main__":
    print(" ".join(f"{loss:.3f}" for loss in main()))
