"""SAM with Lightning Fabric: a training loop with ``fabric.backward`` in both passes."""

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastsam import SAM


def main() -> dict[str, Tensor]:
    torch.manual_seed(0)
    fabric = Fabric(accelerator="cpu")
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    sam = SAM(net.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
    data = TensorDataset(torch.randn(256, 8), torch.randint(2, (256,)))
    model, optimizer = fabric.setup(net, sam)
    loader = fabric.setup_dataloaders(DataLoader(data, batch_size=32))
    for _ in range(2):
        for x, y in loader:
            fabric.backward(nn.functional.cross_entropy(model(x), y))
            if optimizer.ascent_due:
                optimizer.first_step(zero_grad=True)
                fabric.backward(nn.functional.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
    return net.state_dict()


if __name__ == "__main__":
    main()
