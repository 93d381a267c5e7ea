"""In Lightning's automatic optimization, log the first pass only and freeze BatchNorm in the second."""

from contextlib import nullcontext

import lightning
from torch import Tensor, manual_seed, nn, optim, randint, randn
from torch.utils.data import DataLoader, TensorDataset

from fastsam import SAM
from fastsam.optim import frozen_batch_norm_statistics


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 2))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        first_pass = not self.optimizers(use_pl_optimizer=False).unperturbed_weights
        with nullcontext() if first_pass else frozen_batch_norm_statistics(self):
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        if first_pass:
            self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> SAM:
        base = optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return SAM(optimizer=base, rho=0.05, closure="both_passes")


def main() -> tuple[dict[str, Tensor], float]:
    manual_seed(0)
    model, data = Classifier(), TensorDataset(randn(256, 8), randint(2, (256,)))
    lightning.Trainer(max_epochs=2, accelerator="cpu").fit(model, DataLoader(data, batch_size=32))
    return model.net.state_dict(), model.trainer.callback_metrics["train_loss"].item()


if __name__ == "__main__":
    main()
