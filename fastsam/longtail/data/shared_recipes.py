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

BAG = "code of Zhang et al. 2021 (BagofTricks-LT)"
MISLAS = "code of Zhong et al. 2021 (dvlab-research/MiSLAS)"
PACO = "code of Cui et al. 2021"

SMOOTHING: dict[tuple[str, str], Layer] = {
    (data, factor): layer(MISLAS, las_head=head, las_tail=tail)
    for data, factor, head, tail in (
        ("cifar10-lt", "100", 0.3, 0.0),
        ("cifar10-lt", "50", 0.2, 0.0),
        ("cifar10-lt", "10", 0.1, 0.0),
        ("cifar100-lt", "100", 0.4, 0.1),
        ("cifar100-lt", "50", 0.3, 0.0),
        ("cifar100-lt", "10", 0.2, 0.0),
        ("imagenet-lt", "*", 0.3, 0.0),
        ("inaturalist18", "*", 0.3, 0.0),
        ("places-lt", "*", 0.4, 0.1),
    )
}
"""Label-aware smoothing by patterns of the data set and its imbalance factor."""

PACO_CIFAR100: Layer = layer(
    PACO,
    lr=0.05,
    weight_decay=5e-4,
    epochs=400,
    warmup_epochs=10,
    # The code lowers lr in epochs above 320 and 360, counted from 0.
    lr_milestones=(321, 361),
    lr_factors=(0.1, 0.01),
)
"""Training settings of PaCo on CIFAR-100-LT."""

MIXUP_LARGE: dict[str, Layer] = {
    data: layer(
        MISLAS,
        mixup_alpha=0.2,
        epochs=epochs,
        batch_size=256,
        lr=0.1,
        weight_decay=weight_decay,
        warmup_epochs=0,
        lr_schedule="cosine",
    )
    for data, epochs, weight_decay in (
        ("imagenet-lt", 180, 5e-4),
        ("inaturalist18", 200, 1e-4),
        ("places-lt", 90, 5e-4),
    )
}
"""Training settings of mixup on large data sets, which are those of MiSLAS in its first stage."""

KANG = "code of Kang et al. 2020 (facebookresearch/classifier-balancing)"

PLACES: Layer = {
    **borrowed(IMAGENET, "the ImageNet-LT recipe"),
    **layer(f"network of Kang et al. 2020, {KANG}", model="resnet152"),
    **layer("Kang et al. 2020: 30 or 90 epochs, by an answer of the authors", epochs=30),
    **layer("scaled from 90 epochs", known=False, defer_epoch=20),
    **layer(KANG, batch_size=256, weight_decay=5e-4),
    **layer(f"second stage in the {KANG}; the first is not published", known=False, lr=0.1),
}
"""Training settings of Places-LT."""

LAST_BLOCK: Layer = {
    **layer(
        "torchvision's first ImageNet weights, as in the code of Zhong et al. 2021",
        pretrained="IMAGENET1K_V1",
    ),
    **layer(
        f"{KANG}: only the last block and the head are trained",
        freeze=(
            "features.network.conv1.*",
            "features.network.bn1.*",
            "features.network.layer[123].*",
            "features.network.layer4.[01].*",
        ),
    ),
    **layer(
        f"second stage in the {KANG}, where the block is frozen",
        known=False,
        lr_scale=("features.*=0.1",),
    ),
}
"""Pretrained weights of a torchvision ResNet of three blocks in its last layer, and what is trained of it."""

OWN: Layer = {
    **borrowed(IMAGENET, "the ImageNet-LT recipe"),
    **layer("chosen by the size and number of your images; not tuned", known=False, augment="auto"),
}
"""Training settings of the user's own images."""
