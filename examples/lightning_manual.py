"""SAM with Lightning's manual optimization: both passes are written explicitly."""

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastsam import SAM


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        (x, y), optimizer = batch, self.optimizers()
        self.manual_backward(nn.functional.cross_entropy(self.net(x), y))
        if optimizer.ascent_due:
            optimizer.first_step(zero_grad=True)
            self.manual_backward(nn.functional.cross_entropy(self.net(x), y))
        optimizer.step()
        optimizer.zero_grad()

    def configure_optimizers(self) -> SAM:
        return SAM(self.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)


def main() -> dict[str, Tensor]:
    torch.manual_seed(0)
    model, data = Classifier(), TensorDataset(torch.randn(256, 8), torch.randint(2, (256,)))
    lightning.Trainer(max_epochs=2, accelerator="cpu").fit(model, DataLoader(data, batch_size=32))
    return model.net.state_dict()


if __name__ == "__main__":
    main()
