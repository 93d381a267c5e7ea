"""SAM with gradient accumulation in Lightning: both passes use the same micro-batches."""

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastsam import SAM


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization, self.parts = False, []
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.parts.append(batch)
        if len(self.parts) < 4 and not self.trainer.is_last_batch:
            return
        optimizer, images = self.optimizers(), sum(len(y) for _, y in self.parts)
        for half in (optimizer.first_step, optimizer.step):  # Lightning counts calls of step()
            for x, y in self.parts:
                loss = nn.functional.cross_entropy(self.net(x), y, reduction="sum") / images
                self.manual_backward(loss)
            half()
            optimizer.zero_grad()
        self.parts.clear()

    def configure_optimizers(self) -> SAM:
        return SAM(self.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)


def main() -> dict[str, Tensor]:
    torch.manual_seed(0)
    model, data = Classifier(), TensorDataset(torch.randn(256, 8), torch.randint(2, (256,)))
    lightning.Trainer(max_epochs=2, accelerator="cpu").fit(model, DataLoader(data, batch_size=8))
    return model.net.state_dict()


if __name__ == "__main__":
    main()
