"""Residual blocks of a network, and the depth of its layers."""

from __future__ import annotations

from torch import nn

from fastsam.longtail.errors import UsageError

BLOCKS = ("Block", "Bottleneck", "Residual")
"""Last words of the class names of residual blocks: those of fastsam, torchvision and timm."""


def residual_blocks(network: nn.Module) -> dict[str, nn.Module]:
    """Return the outermost modules whose class name ends in Block, Bottleneck or Residual, by name."""
    found: dict[str, nn.Module] = {}
    inside: set[nn.Module] = set()
    for name, module in network.named_modules():  # parents first
        if module not in inside and type(module).__name__.endswith(BLOCKS):
            found[name] = module
            inside.update(module.modules())
    return found


def layer_depths(features: nn.Module) -> dict[str, int]:
    """Return the depth of each parameter of a feature extractor, from 0 next to the image.

    The method ``layer_depths()`` of the feature extractor decides, if it has one. Otherwise each residual
    block is a layer. Parameters before the first block have depth 0, others outside of blocks that of the
    block before them.

    Returns:
        Depths by name of the parameter. The empty name stands for the head.

    Raises:
        UsageError: if it has neither.

    Example:
        >>> from fastsam.longtail.models import CifarResNet
        >>> depths = layer_depths(CifarResNet((1, 1, 1)))
        >>> depths["layers.0.weight"], depths["layers.5.conv2.weight"], depths[""]
        (0, 3, 4)
    """
    own = getattr(features, "layer_depths", None)
    return block_depths(features) if own is None else dict(own())


def block_depths(features: nn.Module) -> dict[str, int]:
    """Return :func:`layer_depths` by residual blocks."""
    blocks = list(residual_blocks(features))
    if not blocks:
        raise UsageError(
            f"layer_decay requires a network of several blocks, but {type(features).__name__} has no module "
            f"whose class name ends in {', '.join(BLOCKS[:-1])} or {BLOCKS[-1]}; define layer_depths() in "
            "the network, or use lr_scale"
        )
    depths, depth = {}, 0
    for name, _ in features.named_parameters():
        if depth < len(blocks) and name.startswith(f"{blocks[depth]}."):
            depth += 1
        depths[name] = depth
    return {**depths, "": depth + 1}
