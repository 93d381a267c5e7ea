"""Follow the curvature in a Lightning training; checkpoints keep the points."""

from typing import Any

import lightning
from torch import Tensor, manual_seed, nn, optim, randint, randn
from torch.utils.data import DataLoader, TensorDataset

from fastsam.curvature import CurvatureTracker


class Classifier(lightning.LightningModule):
    def __init__(self, samples: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
        self.tracker = CurvatureTracker(self.net, nn.CrossEntropyLoss(), samples, every=4)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> optim.SGD:
        return optim.SGD(self.parameters(), lr=0.1)

    def on_train_batch_end(self, *_: Any) -> None:
        self.tracker.step(self.global_step, lr=self.trainer.optimizers[0].param_groups[0]["lr"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["curvature"] = self.tracker.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.tracker.load_state_dict(checkpoint["curvature"])


if __name__ == "__main__":
    manual_seed(0)
    x, y = randn(256, 8), randint(2, (256,))
    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu")
    trainer.fit(Classifier((x, y)), DataLoader(TensorDataset(x, y), batch_size=32))
