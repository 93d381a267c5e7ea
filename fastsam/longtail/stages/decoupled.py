"""What lists that train a head on a fixed feature extractor share."""

from __future__ import annotations

from typing import Any

from fastsam.longtail.data.shared_recipes import BAG, KANG
from fastsam.longtail.settings import Layer, borrowed, layer
from fastsam.longtail.stages.base import BASE, Stage, StageList

LIKE_IMAGENET = "the ImageNet-LT configuration of"
"""First words of the source of starting points, for data sets without a published value."""


def head_only(source: str) -> Layer:
    """Return the settings of a stage that trains the head alone, with plain batches and a new optimizer.

    The feature extractor is frozen. Its batch normalization normalizes by the batch and updates its running
    statistics, because the authors' codes call ``model.train()``.
    """
    return layer(
        source,
        optimizer=BASE,
        freeze=("features.*",),
        batch_norm="train",
        mixer="none",
        lr_scale=(),
        layer_decay=1.0,
        no_decay=(),
        max_norm=(),
        warmup_epochs=0,
        lr_schedule="cosine",
    )


def kang_first() -> dict[tuple[str, str], Layer]:
    """Return the settings of stage one of Kang et al. where they are published."""
    common: dict[str, Any] = {
        "epochs": 90,
        "batch_size": 512,
        "lr": 0.2,
        "warmup_epochs": 0,
        "lr_schedule": "cosine",
    }
    return {
        ("imagenet-lt", "*"): layer(KANG, **common, weight_decay=5e-4),
        ("inaturalist18", "*"): layer(KANG, **common, weight_decay=1e-4),
    }


def kang_second(**epochs: int) -> dict[tuple[str, str], Layer]:
    """Return the settings of stage two of Kang et al.

    Args:
        **epochs: number of epochs by the name of the data set, written with ``_``.
    """
    large: dict[str, Any] = {"batch_size": 512, "lr": 0.2}
    return {
        ("imagenet-lt", "*"): layer(KANG, **large, weight_decay=5e-4, epochs=epochs["imagenet_lt"]),
        ("inaturalist18", "*"): layer(
            KANG, **large, weight_decay=1e-4, epochs=epochs["inaturalist18"]
        ),
        ("places-lt", "*"): layer(
            KANG, batch_size=256, lr=0.1, weight_decay=5e-4, epochs=epochs["places_lt"]
        ),
    }


_BAG_CIFAR: Layer = layer(
    BAG,
    sampling="class-balanced",
    epochs=30,
    lr=0.1,
    lr_schedule="multistep",
    lr_milestones=(10, 20),
    lr_factors=(0.1, 0.01),
    warmup_epochs=5,
    weight_decay=5e-4,
    nesterov=True,
)
BAG_CIFAR: dict[tuple[str, str], Layer] = {
    ("cifar*-lt", "*"): borrowed(_BAG_CIFAR, "the recipe of imbalance 100 and 50"),
    ("cifar*-lt", "100"): _BAG_CIFAR,
    ("cifar*-lt", "50"): _BAG_CIFAR,
}
"""Stage two of cRT and LWS on CIFAR-LT, for which Kang et al. publish no settings."""


def decoupled(name: str, summary: str, head: Layer, **epochs: int) -> StageList:
    """Return a list of Kang et al.: the representation, then the head on class-balanced images.

    Args:
        name: name of the list.
        summary: one-line description.
        head: settings of the head of stage two.
        **epochs: epochs of stage two; see :func:`kang_second`. Other data sets have those of ImageNet-LT.
    """
    starting = layer(f"{LIKE_IMAGENET} {KANG}", known=False, epochs=epochs["imagenet_lt"])
    rule = layer(KANG, method="ce-rs", sampling="class-aware")
    return StageList(
        name=name,
        module=__name__,
        summary=summary,
        stages=(
            Stage(name="representation", exact=kang_first()),
            Stage(
                name="classifier",
                settings={**head_only(KANG), **rule, **head, **starting},
                exact={**kang_second(**epochs), **BAG_CIFAR},
            ),
        ),
    )
