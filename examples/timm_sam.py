"""SAM with a timm optimizer, gradient scaler and learning-rate schedule."""

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import NativeScaler
from torch import Tensor, nn

from fastsam import SAM


def main() -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    batches = [(torch.randn(8, 3, 32, 32), torch.randint(3, (8,))) for _ in range(4)]
    base = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    optimizer = SAM(optimizer=base, rho=0.05)
    schedule = CosineLRScheduler(optimizer, t_initial=3, warmup_t=1, warmup_lr_init=1e-4)
    scaler = NativeScaler(device="cpu")
    for epoch in range(3):
        for x, y in batches:
            halves = (optimizer.ascent, optimizer) if optimizer.ascent_due else (optimizer,)
            for half in halves:
                loss = nn.functional.cross_entropy(model(x), y)
                scaler(loss, half, clip_grad=1.0, parameters=model.parameters())
                optimizer.zero_grad()
        schedule.step(epoch + 1)
    return model.state_dict()


if __name__ == "__main__":
    main()
