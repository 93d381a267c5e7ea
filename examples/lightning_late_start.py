"""A Lightning callback that enables SAM's ascents only in the last quarter of training."""

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastsam import SAM


class LateStart(lightning.Callback):
    def on_train_start(self, trainer: lightning.Trainer, *_: object) -> None:
        for group in trainer.optimizers[0].param_groups:
            group["start"] = 3 * trainer.estimated_stepping_batches // 4


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> SAM:
        base = torch.optim.SGD(self.parameters(), lr=0.1)
        return SAM(optimizer=base, rho=0.05, closure="both_passes")


def main() -> dict[str, Tensor]:
    torch.manual_seed(0)
    model, data = Classifier(), TensorDataset(torch.randn(256, 8), torch.randint(2, (256,)))
    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", callbacks=LateStart())
    trainer.fit(model, DataLoader(data, batch_size=32))
    return model.net.state_dict()


if __name__ == "__main__":
    main()
