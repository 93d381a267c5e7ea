"""SAM in which each rank ascends along its own gradient (m-sharpness), on two CPU processes.

Run with ``torchrun --nproc-per-node 2 examples/ddp_local.py``.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastsam import SAM
from fastsam.optim import local_sam_step


def main() -> None:
    """Fit a small network to random data, with different data on every rank."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)))
    optimizer = SAM(
        model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, process_group=dist.group.WORLD
    )
    torch.manual_seed(1 + dist.get_rank())
    inputs, targets = torch.randn(64, 8), torch.randn(64, 1)

    def compute_loss() -> Tensor:
        return nn.functional.mse_loss(model(inputs), targets)

    losses = [float(local_sam_step(model, optimizer, compute_loss)) for _ in range(50)]
    print(f"rank {dist.get_rank()}: loss {losses[0]:.3f} -> {losses[-1]:.3f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
