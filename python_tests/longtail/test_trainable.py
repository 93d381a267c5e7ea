"""Frozen parameters, modes of batch normalization, and parameter groups."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastsam.distributed import World
from fastsam.longtail import Trainer, recipe
from fastsam.longtail.build import build_network
from fastsam.longtail.checkpoint import Checkpoint
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.errors import UsageError
from fastsam.longtail.trainable import freeze, trained_parameters
from fastsam.longtail.training.average import JudgedWeights

STEM = ("features.layers.0.*", "features.layers.1.*")


def config_of(method: str = "ce", optimizer: str = "sgd", **values: Any) -> TrainConfig:
    values = {"model": "resnet8", "batch_size": 128, "epochs": 2, **values}
    return recipe("digits-lt", method, optimizer, **values).config()


def trained(config: TrainConfig, **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train, and return the state dict before and after."""
    trainer = Trainer(config, progress=False, **options)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.fit()
    return before, trainer.model.state_dict()


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


@pytest.mark.parametrize("optimizer", ["sgd", "sam", "lpf-sgd", "entropy-sgd"])
def test_frozen_parameters_keep_their_bits(optimizer: str) -> None:
    before, after = trained(config_of(optimizer=optimizer, freeze=STEM, ema=0.9, epochs=1))
    weights = {name for name in before if not name.endswith(("mean", "var", "tracked"))}
    frozen = {name for name in weights if any(fnmatchcase(name, pattern) for pattern in STEM)}
    assert len(frozen) == 3
    assert changed(before, after) & weights == weights - frozen


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "sam"])
@pytest.mark.parametrize("mode", ["frozen", "statistics"])
def test_modes_of_batch_normalization(mode: str, optimizer: str) -> None:
    """Tracking the curvature evaluates the network between the steps."""
    values = {"track_curvature": 3, "curvature_budget": 0.0, "curvature_images": 8, "epochs": 1}
    before, after = trained(config_of(optimizer=optimizer, batch_norm=mode, **values))
    norms = {name.rpartition(".")[0] for name in before if name.endswith("running_mean")}
    here = {
        name.rpartition(".")[2]
        for name in changed(before, after)
        if name.rpartition(".")[0] in norms
    }
    assert here == (
        set() if mode == "frozen" else {"running_mean", "running_var", "num_batches_tracked"}
    )


def test_frozen_batch_normalization_uses_the_stored_statistics() -> None:
    config = config_of(batch_norm="frozen")
    model = build_network(config, 10, 1)
    freeze(model, config)
    images = torch.rand(4, 1, 8, 8)
    assert torch.equal(model.train()(images), model.eval()(images))
    assert model.train().training
    assert not torch.equal(model(images), build_network(config, 10, 1).train()(images))


class ThreeEqualRanks(World):
    """Three ranks with the same values."""

    def all_reduce(self, tensors: Iterable[Tensor]) -> None:
        """Sum the values in the order of the ranks."""
        for value in tensors:
            value.copy_(value + value + value)


def test_several_ranks_do_not_round_frozen_statistics(seed: int) -> None:
    """The mean of three equal numbers may differ from them in the last bit."""
    generator = torch.Generator().manual_seed(seed)
    for mode, constant in (("train", False), ("frozen", True)):
        config = config_of(batch_norm=mode, ema=0.9)
        model = build_network(config, 10, 1)
        freeze(model, config)
        for value in model.buffers():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator))
        judged = JudgedWeights(model, config)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        judged.average_statistics(ThreeEqualRanks(0, 3))
        for network in judged.networks:
            assert (not changed(before, network.state_dict())) is constant


def test_a_frozen_network_costs_no_copies_for_skipped_steps() -> None:
    """A momentum encoder is restored after a skipped step; what never changes needs no copy."""
    values: dict[str, Any] = {"freeze": ("features.*",), "batch_norm": "statistics"}
    for method, moved in (("ce", set()), ("paco", {"key_encoder"})):
        trainer = Trainer(config_of(method, "sam", **values), progress=False)
        kept = {id(value) for value in trainer.stepper._kept._tensors}
        found = {n.split(".")[0] for n, p in trainer.model.named_parameters() if id(p) in kept}
        assert found == moved


def test_groups_without_settings_are_a_plain_list() -> None:
    model = build_network(config_of(), 10, 1)
    assert trained_parameters(model, config_of()) == list(model.named_parameters())


def test_factors_and_weight_decay_make_groups() -> None:
    values = {
        "lr_scale": ("features.*=0.5", "*.weight=0.25"),
        "no_decay": ("vectors", "head.weight"),
    }
    config = config_of(**values, lr=0.2, weight_decay=0.1)
    model = build_network(config, 10, 1)
    found: dict[str, tuple[float, float, float]] = {}
    for group in trained_parameters(model, config):
        assert isinstance(group, dict)
        rates = (group["lr_scale"], group["lr"], group["weight_decay"])
        found |= {name: rates for name, _ in group["params"]}
    for name, value in model.named_parameters():
        scale = 0.25 if name.endswith(".weight") else 0.5 if name.startswith("features.") else 1.0
        spared = value.ndim <= 1 or name == "head.weight"
        assert found[name] == (scale, 0.2 * scale, 0.0 if spared else 0.1)
    assert len(found) == len(list(model.parameters()))


@pytest.mark.slow
def test_the_schedule_multiplies_the_factors(tmp_path: Path) -> None:
    """A run with factors is resumed with the same bits, and has the learning rates of its groups."""
    values = {"layer_decay": 0.5, "no_decay": ("vectors",), "checkpoint_steps": 2}
    config = config_of(optimizer="sam", epochs=4, **values)
    whole = Trainer(config, out=tmp_path / "whole", progress=False)
    rates: list[list[float]] = []
    whole.on_epoch = lambda _: rates.append([g["lr"] for g in whole.optimizer.param_groups])
    whole.fit()
    scales = sorted({group["lr_scale"] for group in whole.optimizer.param_groups})
    assert scales == [0.0625, 0.125, 0.25, 0.5, 1.0]
    for epoch, found in enumerate(rates, start=1):
        assert sorted(set(found)) == [whole.schedules["lr"](epoch) * scale for scale in scales]

    class KilledError(Exception):
        pass

    def kill(epoch: Any) -> None:
        if epoch.epoch == 3:
            raise KilledError

    with pytest.raises(KilledError):
        Trainer(config, out=tmp_path / "cut", on_epoch=kill, progress=False).fit()
    Trainer(config, out=tmp_path / "cut", resume=True, progress=False).fit()
    one, other = (Checkpoint.load(tmp_path / name) for name in ("whole", "cut"))
    assert not changed(one.model, other.model)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext"])
def test_layer_decay_is_that_of_timm(name: str) -> None:
    """Compare with the factors that timm gives a network with its own classifier."""
    timm = pytest.importorskip("timm")
    from timm.optim import param_groups_layer_decay

    reference = timm.create_model(name, num_classes=10)
    names = {id(value): key for key, value in reference.named_parameters()}
    wanted = {
        names[id(value)]: group["lr_scale"]
        for group in param_groups_layer_decay(reference, layer_decay=0.7)
        for value in group["params"]
    }
    config = recipe("cifar10-lt", "ce", "adamw", model=f"timm:{name}", layer_decay=0.7).config()
    model = build_network(config, 10, 3)
    found = {
        key.removeprefix("features.network."): group["lr_scale"]
        for group in trained_parameters(model, config)
        for key, _ in group["params"]  # type: ignore[index]
    }
    assert found.pop("head.weight") == found.pop("head.bias") == 1.0
    assert found == {key: scale for key, scale in wanted.items() if key in found}
    assert len(found) > len(wanted) / 2


def test_layer_decay_counts_the_blocks_of_torchvision() -> None:
    config = recipe("cifar10-lt", "ce", "sgd", model="resnet18", layer_decay=0.5).config()
    groups = trained_parameters(build_network(config, 10, 3), config)
    found = {key: group["lr_scale"] for group in groups for key, _ in group["params"]}  # type: ignore[index]
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    for depth, place in enumerate(["conv1", *blocks, ""]):
        key = (
            f"features.network.{place}.conv2.weight"
            if "." in place
            else f"features.network.{place}.weight"
        )
        assert found[key if place else "head.weight"] == 0.5 ** (9 - depth)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"freeze": ("layer9.*",)}, r"freeze pattern 'layer9\.\*' matches no parameter"),
        ({"freeze": ("*",)}, r"freeze \* leaves no parameter to train"),
        ({"lr_scale": ("backbone.*=0.1",)}, r"lr_scale pattern 'backbone\.\*' matches no"),
        ({"lr_scale": ("features.*",)}, "must be PATTERN=FACTOR"),
        ({"lr_scale": ("features.*=0",)}, "to train no parameter of a pattern, use freeze"),
        ({"no_decay": ("bn",)}, "no_decay pattern 'bn' matches no"),
        ({"freeze": ("features.*",), "lr_scale": ("features.*=0.1",)}, "lr_scale pattern"),
    ],
)
def test_patterns_that_match_nothing(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Trainer(config_of(**values), progress=False)


def test_networks_that_lack_what_a_setting_needs() -> None:
    class Plain(nn.Module):
        out_features = 4

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 4)

        def forward(self, images: Tensor) -> Tensor:
            return torch.relu(self.layer(images.flatten(1)))

    for values, message in (
        (
            {"batch_norm": "statistics"},
            "batch_norm statistics requires batch normalization, but own:plain has",
        ),
        ({"layer_decay": 0.9}, "layer_decay requires a network of several blocks, but Plain"),
    ):
        with pytest.raises(UsageError, match=message):
            Trainer(config_of(model="own:plain", **values), model=Plain(), progress=False)
