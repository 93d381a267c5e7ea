"""SAM with Hugging Face Accelerate: pass SAM to ``prepare()``, and call ``first_step()`` on SAM itself.

With ``mixed_precision="fp16"`` on a GPU, an overflow in either pass skips the step.
"""

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastsam import SAM


def main() -> dict[str, Tensor]:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    sam = SAM(net.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
    data = TensorDataset(torch.randn(256, 8), torch.randint(2, (256,)))
    model, optimizer, loader = accelerator.prepare(net, sam, DataLoader(data, batch_size=32))
    for _ in range(2):
        for x, y in loader:
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            if sam.ascent_due:
                sam.first_step(zero_grad=True)
                accelerator.backward(nn.functional.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
    return net.state_dict()


if __name__ == "__main__":
    main()
