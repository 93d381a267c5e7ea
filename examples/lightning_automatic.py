"""SAM with Lightning's automatic optimization: SAM calls Lightning's closure twice."""

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastsam import SAM


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> SAM:
        base = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return SAM(optimizer=base, rho=0.05, closure="both_passes")


def main() -> dict[str, Tensor]:
    torch.manual_seed(0)
    model, data = Classifier(), TensorDataset(torch.randn(256, 8), torch.randint(2, (256,)))
    lightning.Trainer(max_epochs=2, accelerator="cpu").fit(model, DataLoader(data, batch_size=32))
    return model.net.state_dict()


if __name__ == "__main__":
    main()
