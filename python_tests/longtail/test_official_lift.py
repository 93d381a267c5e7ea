"""LIFT against its official code: adapters, head, loss, start of the head, and trained parameters."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastsam.longtail import TrainConfig, recipe
from fastsam.longtail.build import build_network, build_objective
from fastsam.longtail.data import Batch
from fastsam.longtail.models import ScaledCosineHead
from fastsam.longtail.trainable import freeze
from fastsam.longtail.training import stage_trainers
from fastsam.longtail.tunings.adapters import Adapter, default_width
from python_tests.longtail.official_codes import (
    Agreement,
    needs,
    official,
    same_values,
    same_weights,
)
from python_tests.longtail.test_trainer import FEW

D, C = 8, 10
COUNTS = np.array([500, 300, 200, 120, 70, 40, 20, 10, 5, 2])

pytestmark = needs("LIFT")


class Block(nn.Module):
    """A transformer block with the names of timm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = nn.Module(), nn.Sequential()
        self.attn.num_heads = heads
        self.attn.qkv, self.attn.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp.fc1, self.mlp.act, self.mlp.fc2 = (
            nn.Linear(width, 12),
            nn.GELU(),
            nn.Linear(12, width),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        rows, length, width = tokens.shape
        split = self.attn.qkv(self.norm1(tokens)).reshape(
            rows, length, 3, self.attn.num_heads, width // self.attn.num_heads
        )
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.attn.proj(mixed.transpose(1, 2).reshape(tokens.shape))
        return tokens + self.mlp(self.norm2(tokens))


class VisionTransformer(nn.Module):
    """A vision transformer with the names of timm, for images of 8x8 pixels."""

    def __init__(self, channels: int = 3, width: int = D, blocks: int = 2, heads: int = 2) -> None:
        super().__init__()
        self.out_features = width
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(channels, width, 4, stride=4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, width))
        self.norm_pre = nn.Identity()
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch_embed.proj(images).flatten(2).mT
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        return self.norm(self.blocks(self.norm_pre(tokens + self.pos_embed)))[:, 0]


class Settings:
    """Settings of the official code, all None except for the given ones."""

    def __init__(self, **values: Any) -> None:
        self._values = defaultdict(lambda: None, values)

    def __getattr__(self, name: str) -> Any:
        return self._values[name]


class Clip(nn.Module):
    """The transformer of CLIP, which the tests do not use."""


ADAPTER = {
    **{
        f"{old}.{kind}": f"{new}.{kind}"
        for old, new in {"ln": "norm", "down_proj": "down", "up_proj": "up"}.items()
        for kind in ("weight", "bias")
    },
    "scale": "scale",
}
"""Names of the parameters of an adapter in the official code and in fastsam."""


def lift() -> TrainConfig:
    options = {"model": "own:vit", "epochs": 1, "batch_size": 32}
    return recipe("digits-lt", "la", "sgd", stages="lift", **options).config()


def official_parts() -> SimpleNamespace:
    parts = official("LIFT", "models/peft_modules.py", "AdaptFormer")
    scope = {**vars(parts), "CLIP_ViT": Clip, "ViT": VisionTransformer}
    return official("LIFT", "models/peft_vit.py", "ViT_Tuner", "Peft_ViT", **scope)


@pytest.mark.usefixtures("in_float64")
def test_the_scaled_cosine_head(agreement: Agreement) -> None:
    kind = official("LIFT", "models/classifiers.py").CosineClassifier
    ours, theirs = ScaledCosineHead(D, C, scale=25.0), kind(D, C, scale=25.0)
    with torch.no_grad():
        ours.weight.copy_(nn.init.normal_(theirs.weight).T)
    (one, two), direction = same_values(9, D), torch.randn(9, C)
    found, expected = (ours(one) * direction).sum(), (theirs(two) * direction).sum()
    agreement(ours(one), theirs(two))
    agreement(
        torch.autograd.grad(found, ours.weight, retain_graph=True)[0].T,
        torch.autograd.grad(expected, theirs.weight, retain_graph=True)[0],
    )
    agreement.gradients(found, expected, [(one, two)])


@pytest.mark.usefixtures("in_float64")
def test_the_adapter_of_lift(agreement: Agreement) -> None:
    kind = official("LIFT", "models/peft_modules.py", "AdaptFormer").AdaptFormer
    ours, theirs = Adapter(D, 3), kind(D, 3)
    for module in (ours, theirs):
        assert module.scale.tolist() == [1.0]
        assert not module(torch.randn(4, D)).any()  # no change at first
    pairs = same_weights(ours, theirs, ADAPTER)
    (one, two), direction = same_values(4, 5, D), torch.randn(4, 5, D)
    found, expected = ours(one), theirs(two)
    agreement(found, expected)
    pairs = [*pairs, (one, two)]
    agreement.gradients((found * direction).sum(), (expected * direction).sum(), pairs)


@pytest.mark.parametrize("classes", [10, 100, 365, 1000, 8142])
def test_the_width_and_the_parameters_of_the_adapters(classes: int, agreement: Agreement) -> None:
    """Twelve blocks of width 768, as in ViT-B."""
    with torch.device("meta"):
        tuner = official_parts().ViT_Tuner
        theirs = tuner(Settings(adaptformer=True), VisionTransformer(3, 768, 12), classes)
        ours = nn.ModuleList(Adapter(768, default_width(classes, 12)) for _ in range(12))
    sizes = [sum(value.numel() for value in module.parameters()) for module in (ours, theirs)]
    agreement(float(sizes[0]), float(sizes[1]))


@pytest.mark.usefixtures("in_float64")
def test_values_and_gradients_of_the_whole_network(agreement: Agreement) -> None:
    module, config = VisionTransformer(), lift()
    network = build_network(config, C, 3, module=module)
    freeze(network, config)
    parts = official_parts()
    runner = SimpleNamespace(
        tuner=parts.ViT_Tuner(Settings(adaptformer=True), module, C),
        head=official("LIFT", "models/classifiers.py").CosineClassifier(D, C, scale=25),
        cfg=Settings(lr=0.01, weight_decay=5e-4, momentum=0.9, num_epochs=10),
    )
    encoder = parts.Peft_ViT(module)
    runner.model = nn.ModuleList([encoder, runner.tuner, runner.head])
    official("LIFT", "trainer.py", "build_optimizer").build_optimizer(runner)
    (adapters, head) = (group["params"] for group in runner.optim.param_groups)
    assert (config.lr, config.weight_decay, config.momentum) == (0.01, 5e-4, 0.9)
    trained = [value for value in network.parameters() if value.requires_grad]
    assert sum(p.numel() for p in trained) == sum(p.numel() for p in (*adapters, *head))

    pairs = []
    features: Any = network.features
    for ours, theirs in zip(features.blocks, runner.tuner.adaptformer_list, strict=True):
        pairs += same_weights(ours.adapter, theirs, ADAPTER)
    with torch.no_grad():
        network.head.get_parameter("weight").copy_(nn.init.normal_(runner.head.weight).T)
    (one, two), targets = same_values(12, 3, 8, 8), torch.randint(C, (12,))
    outputs = network.outputs(one)
    logits = encoder(two, tuner=runner.tuner, head=runner.head)
    agreement(outputs.logits, logits)
    none: Any = None
    batch = Batch((one,), targets, targets)
    found = build_objective(config, COUNTS).loss(outputs, batch, none, epoch=1, prepared=[None])
    kind = official("LIFT", "utils/losses.py", "LogitAdjustedLoss").LogitAdjustedLoss
    expected = kind(torch.from_numpy(COUNTS).double())(logits, targets)
    agreement(
        torch.autograd.grad(found, network.head.get_parameter("weight"), retain_graph=True)[0].T,
        torch.autograd.grad(expected, runner.head.weight, retain_graph=True)[0],
    )
    agreement.gradients(found, expected, [*pairs, (one, two)])


@pytest.mark.usefixtures("on_cpu")
def test_the_head_starts_from_the_class_means(agreement: Agreement) -> None:
    stages = stage_trainers(lift(), data=FEW, model=VisionTransformer(1), progress=False)
    network = next(stages).trainer.model
    images = FEW.train.batches([np.arange(len(FEW.train))], None, torch.device("cpu"))
    (clean,) = images
    head = official("LIFT", "models/classifiers.py").CosineClassifier(D, C, scale=25)
    runner = SimpleNamespace(
        train_init_loader=[(clean.inputs, clean.targets)],
        device="cpu",
        num_classes=C,
        head=head,
        model=lambda image, use_tuner, return_feature: network.eval().features(image),
    )
    code = official("LIFT", "trainer.py", "init_head_class_mean", tqdm=lambda loader, **_: loader)
    with torch.no_grad():
        code.init_head_class_mean(runner)
    agreement(network.head.get_parameter("weight").T, head.weight, rtol=1e-5)
