"""Parameter shapes of the models for which the SAM step is timed."""

from __future__ import annotations

Shapes = list[tuple[int, ...]]


def resnet32() -> Shapes:
    """Return ResNet-32 for CIFAR (He et al. 2016): 95 tensors, 0.46 M parameters, option-A shortcuts."""
    stem: Shapes = [(16, 3, 3, 3), (16,), (16,)]
    return [*stem, *_basic_blocks((16, 32, 64), 5, projections=False), (10, 64), (10,)]


def resnet18() -> Shapes:
    """Return ResNet-18 for ImageNet: 62 tensors, 11.7 M parameters."""
    stem: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    blocks = _basic_blocks((64, 128, 256, 512), 2, projections=True)
    return [*stem, *blocks, (1000, 512), (1000,)]


def _basic_blocks(widths: tuple[int, ...], blocks: int, *, projections: bool) -> Shapes:
    """Return ``blocks`` blocks of two 3x3 convolutions of each width, with 1x1 shortcuts between widths."""
    shapes: Shapes = []
    before = widths[0]
    for width in widths:
        for _ in range(blocks):
            shapes += [(width, before, 3, 3), (width,), (width,)]
            shapes += [(width, width, 3, 3), (width,), (width,)]
            if projections and before != width:
                shapes += [(width, before, 1, 1), (width,), (width,)]
            before = width
    return shapes


def resnet50() -> Shapes:
    """Return ResNet-50 for ImageNet: 161 tensors, 25.6 M parameters."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    before = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for shape in ((width, before, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                shapes += [shape, (shape[0],), (shape[0],)]
            if block == 0:
                shapes += [(4 * width, before, 1, 1), (4 * width,), (4 * width,)]
            before = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def vit(d: int) -> Shapes:
    """Return ViT/16 of width ``d`` for 224 pixels: 152 tensors, 22.1 M (d=384, S) or 86.6 M (d=768, B)."""
    shapes: Shapes = [(1, 1, d), (d, 3, 16, 16), (d,), (1, 197, d)]
    for _ in range(12):
        shapes += [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,)]
        shapes += [(d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [*shapes, (d,), (d,), (1000, d), (1000,)]


def gpt2() -> Shapes:
    """Return GPT-2 small with a tied head: 148 tensors, 124 M parameters."""
    d = 768
    shapes: Shapes = [(50257, d), (1024, d)]
    for _ in range(12):
        shapes += [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,)]
        shapes += [(d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [*shapes, (d,), (d,)]


def equal(tensors: int, elements: int) -> Shapes:
    """Return ``tensors`` vectors of ``elements`` elements each."""
    return [(elements,)] * tensors


_GRID = {
    f"{tensors}x1e{power}": equal(tensors, 10**power)
    for tensors in (1, 95, 161)
    for power in (1, 3, 5, 7)
}
SWEEP = tuple(_GRID)
"""Cases of equal tensors, from one tensor of ten elements to 161 tensors of ten million."""

CASES: dict[str, Shapes] = {
    "resnet32": resnet32(),
    "resnet18": resnet18(),
    "resnet50": resnet50(),
    "vit-s16": vit(384),
    "vit-b16": vit(768),
    "gpt2": gpt2(),
    "one-25M": equal(1, 25_000_000),
    "one-1e9": equal(1, 1_000_000_000),
    **_GRID,
}
