"""The Gauss-Newton matrix of a Hugging Face language model on padded batches."""

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from fastsam import curvature_operator
from fastsam.curvature import CurvatureOperator, Eigenpairs, OutputLoss, eigenpairs

NEXT_TOKEN = OutputLoss(
    outputs=lambda model, batch: model(**batch).logits[:, :-1].mT,  # [B, C, T - 1]
    targets=lambda batch: batch["labels"][:, 1:],
    criterion=nn.CrossEntropyLoss(ignore_index=-100),
)


def batches() -> list[dict[str, torch.Tensor]]:
    """Return two batches of texts of different lengths, whose padding has the label -100."""
    tokens = torch.randint(1, 50, (6, 10), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([10, 4, 7, 10, 9, 3])
    mask = torch.arange(10) < lengths[:, None]
    labels = tokens.masked_fill(~mask, -100)
    whole = {"input_ids": tokens * mask, "attention_mask": mask.long(), "labels": labels}
    return [
        {name: value[part] for name, value in whole.items()} for part in (slice(4), slice(4, 6))
    ]


def main() -> tuple[nn.Module, CurvatureOperator, Eigenpairs]:
    torch.manual_seed(0)
    tokens = {"vocab_size": 50, "bos_token_id": None, "eos_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(n_positions=16, n_embd=64, n_layer=2, n_head=4, **tokens))
    ggn = curvature_operator(model, NEXT_TOKEN, batches(), kind="ggn")
    return model, ggn, eigenpairs(ggn, 3, tol=1e-4)


if __name__ == "__main__":
    _, operator, pairs = main()
    print(f"{operator.shape[0]} parameters, {pairs.products} products, eigenvalues {pairs.values}")
