"""A small vision transformer whose blocks have the names of timm's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

VIT_WIDTH, VIT_BLOCKS, VIT_MLP = 8, 2, 12


class Attention(nn.Module):
    """Self-attention with one head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(VIT_WIDTH, 3 * VIT_WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.qkv(tokens).chunk(3, dim=-1)
        return (query @ key.mT / VIT_WIDTH**0.5).softmax(dim=-1) @ value


class Block(nn.Module):
    """A block with normalization before attention and MLP, or after the MLP with ``post_norm``."""

    def __init__(self, *, post_norm: bool = False) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(VIT_WIDTH), Attention()
        self.norm2 = nn.LayerNorm(VIT_WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(VIT_WIDTH, VIT_MLP), nn.GELU(), nn.Linear(VIT_MLP, VIT_WIDTH)
        )
        self.post_norm = post_norm

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        if self.post_norm:
            return tokens + self.norm2(self.mlp(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class SmallVit(nn.Module):
    """Patches of 4x4 pixels, two blocks, and the mean of the tokens."""

    out_features = VIT_WIDTH

    def __init__(self, channels: int, *, post_norm: bool = False) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, VIT_WIDTH, 4, stride=4)
        self.blocks = nn.Sequential(*(Block(post_norm=post_norm) for _ in range(VIT_BLOCKS)))
        self.norm = nn.LayerNorm(VIT_WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).mT
        return self.norm(self.blocks(tokens)).mean(dim=1)


def small_vit(channels: int = 3, *, post_norm: bool = False) -> SmallVit:
    """Return the network with random weights that depend on nothing."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return SmallVit(channels, post_norm=post_norm)
