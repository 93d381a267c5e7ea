"""Training recipes shared by several data sets.

``[paper]`` is Rangwani et al., "Escaping Saddle Points for Effective Generalization on
Class-Imbalanced Data" (NeurIPS 2022), ``[code]`` is the code of its authors.
"""

from __future__ import annotations

from fastsam.longtail.settings import Layer, borrowed, layer

PAPER, CODE = "[paper]", "[code]"

CIFAR: Layer = {
    **layer(f"{PAPER} Table 1", model="resnet32"),
    **layer(
        CODE,
        epochs=200,
        batch_size=128,
        lr=0.1,
        weight_decay=2e-4,
        warmup_epochs=5,
        lr_schedule="multistep",
        lr_milestones=(160, 180),
        lr_factors=(0.01, 0.0001),
        defer_epoch=160,
    ),
}

STARTING_POINTS: Layer = borrowed(CIFAR, "the recipe of CIFAR-LT")
"""Training settings of data sets whose recipe has none."""

IMAGENET: Layer = layer(
    CODE,
    model="resnet50",
    image_size=224,
    epochs=90,
    batch_size=256,
    lr=0.2,
    weight_decay=2e-4,
    warmup_epochs=0,
    lr_schedule="cosine",
    defer_epoch=60,
)

OWN: Layer = {
    **borrowed(IMAGENET, "the ImageNet-LT recipe"),
    **layer("chosen by the size and number of your images; not tuned", known=False, augment="auto"),
}
"""Training settings of the user's own images."""
