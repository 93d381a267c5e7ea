"""SAM on LoRA adapters of PEFT: frozen weights are not perturbed and need no extra memory."""

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fastsam import SAM


def main() -> dict[str, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    model = get_peft_model(net, LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"]))
    batches = [(torch.randn(32, 8), torch.randint(2, (32,))) for _ in range(8)]
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
    for x, y in batches:
        nn.functional.cross_entropy(model(x), y).backward()
        if optimizer.ascent_due:
            optimizer.first_step(zero_grad=True)
            nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


if __name__ == "__main__":
    main()
