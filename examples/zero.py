"""SAM with ZeRO stage 1: each rank stores a part of the base optimizer's state.

Run with ``torchrun --nproc-per-node 2 examples/zero.py``.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from fastsam import SAM


def main() -> dict[str, Tensor]:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    model = DistributedDataParallel(net)
    base = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    optimizer = SAM(optimizer=base, rho=0.05)
    batches = [(torch.randn(32, 8), torch.randint(2, (32,))) for _ in range(8)]
    for inputs, targets in batches:
        x, y = (whole.chunk(dist.get_world_size())[dist.get_rank()] for whole in (inputs, targets))
        nn.functional.cross_entropy(model(x), y).backward()
        if optimizer.ascent_due:
            optimizer.first_step(zero_grad=True)
            nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = net.state_dict()
    dist.destroy_process_group()
    return weights


if __name__ == "__main__":
    main()
