"""The blocks of a vision transformer."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from fastsam.longtail.errors import UsageError

_ATTENTION = ("attn", "self_attention")
_NORM = ("norm2", "ln_2")
"""Names of the parts of a block in timm and in torchvision. Both call the other part ``mlp``."""
_LAST = ("drop_path2", "ls2", "mlp")
"""Possible last steps of the MLP's branch: timm drops and scales it, also by a parameter without a module."""


class TransformerBlock(NamedTuple):
    """A block that adds ``last(mlp(norm(h)))`` to its hidden state ``h``, ``[..., width]``.

    Attributes:
        block: the block.
        norm: layer normalization before the MLP.
        last: last module of the branch, whose output is added; the MLP itself if nothing scales or drops it.
        width: length of the vectors.
    """

    block: nn.Module
    norm: nn.LayerNorm
    last: nn.Module
    width: int


def transformer_blocks(features: nn.Module) -> list[TransformerBlock]:
    """Return the transformer blocks of a feature extractor.

    Blocks have the names of timm (``attn``, ``norm2``, ``mlp``) or torchvision (``self_attention``, ``ln_2``,
    ``mlp``).

    Raises:
        UsageError: if there are none.
    """
    found = []
    for block in features.modules():
        children = dict(block.named_children())
        norms = [children[name] for name in _NORM if name in children]
        if "mlp" in children and children.keys() & {*_ATTENTION} and norms:
            norm = norms[0]
            last = next(children[name] for name in _LAST if name in children)
            if isinstance(norm, nn.LayerNorm):
                found.append(TransformerBlock(block, norm, last, norm.normalized_shape[-1]))
    if not found:
        raise UsageError(
            "tune 'adapters' requires transformer blocks with a LayerNorm before the MLP, which the network "
            "does not have; choose a vision transformer, such as --model timm:vit_base_patch16_224, or omit "
            "tune. In your own module, name the parts of a block attn, norm2 and mlp"
        )
    return found
