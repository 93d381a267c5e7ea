"""Settings of the last stages against the configuration files of the official codes."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from fastsam.longtail import TrainConfig, recipe
from fastsam.longtail.stage_plan import plan_stages
from python_tests.longtail.official_codes import file, needs


def last_stage(data: str, stages: str, **settings: Any) -> TrainConfig:
    config = recipe(data, "ce", "sgd", stages=stages, **settings).config()
    return plan_stages(config)[-1].config


def settings_of(repository: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(file(repository, f"config/{name}.yaml").read_text())
    return found


@needs("MiSLAS")
@pytest.mark.parametrize(
    ("data", "factor", "name"),
    [
        *((f"cifar{n}-lt", factor, f"cifar{n}/cifar{n}_imb{code}")
          for n in (10, 100) for factor, code in ((100, "001"), (50, "002"), (10, "01"))),
        ("imagenet-lt", None, "imagenet/imagenet_resnet50"),
        ("inaturalist18", None, "ina2018/ina2018_resnet50"),
        ("places-lt", None, "places/places_resnet152"),
    ],
)  # fmt: skip
def test_mislas(data: str, factor: int | None, name: str) -> None:
    theirs = settings_of("MiSLAS", f"{name}_stage2_mislas")
    ours = last_stage(data, "mislas", **({} if factor is None else {"imbalance": factor}))
    for own, key in (
        ("las_head", "smooth_head"), ("las_tail", "smooth_tail"), ("epochs", "num_epochs"),
        ("lr", "lr"), ("batch_size", "batch_size"), ("weight_decay", "weight_decay"),
        ("momentum", "momentum"),
    ):  # fmt: skip
        assert float(getattr(ours, own)) == float(theirs[key]), own
    assert ours.lr_scale == (f"head.linear.*={theirs['lr_factor']:g}",)
    if data != "places-lt":  # there the code freezes a part of the statistics
        assert (ours.batch_norm == "train") is theirs["shift_bn"]


KANG, REN = "classifier-balancing", "BalancedMetaSoftmax-Classification"


@pytest.mark.parametrize(
    ("data", "stages", "repository", "name"),
    [
        pytest.param(data, stages, repository, name, marks=needs(repository))
        for data, stages, repository, name in (
            ("imagenet-lt", "crt", KANG, "ImageNet_LT/cls_crt"),
            ("imagenet-lt", "lws", KANG, "ImageNet_LT/cls_lws"),
            ("inaturalist18", "crt", KANG, "iNaturalist18/cls_crt"),
            ("inaturalist18", "lws", KANG, "iNaturalist18/cls_lws"),
            ("places-lt", "crt", KANG, "Places_LT/cls_crt"),
            ("places-lt", "lws", KANG, "Places_LT/cls_lws"),
            ("imagenet-lt", "decoupled-bs", REN, "ImageNet_LT/decouple_balanced_softmax_resnet10"),
            ("places-lt", "decoupled-bs", REN, "Places_LT/decouple_balanced_softmax"),
        )
    ],
)
def test_decoupled_training(data: str, stages: str, repository: str, name: str) -> None:
    theirs, ours = settings_of(repository, name), last_stage(data, stages)
    head, training = theirs["networks"]["classifier"]["optim_params"], theirs["training_opt"]
    assert (ours.lr, ours.momentum, ours.weight_decay) == (
        head["lr"], head["momentum"], head["weight_decay"],
    )  # fmt: skip
    assert (ours.epochs, ours.batch_size) == (training["num_epochs"], training["batch_size"])
    assert (ours.sampling == "class-aware") is (training["sampler"] is not None)
    assert theirs["coslr"] is (ours.lr_schedule == "cosine")
