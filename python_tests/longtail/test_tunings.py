"""Parameter-efficient tuning: adapters, biases and normalization of vision transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastsam.longtail import Trainer, recipe
from fastsam.longtail.build import build_network
from fastsam.longtail.checkpoint import Checkpoint
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.data import from_datasets
from fastsam.longtail.errors import CheckpointError, UsageError
from fastsam.longtail.start import Start
from fastsam.longtail.trainable import freeze, trained_count
from fastsam.longtail.trained import TrainedRun, evaluate_run, export_run, load_weights
from fastsam.longtail.training import Branch, stage_trainers
from fastsam.longtail.tunings import transformer_blocks
from fastsam.longtail.tunings.adapters import Adapter, default_width
from python_tests.longtail.small_vit import VIT_BLOCKS, VIT_MLP, VIT_WIDTH, Block, small_vit
from python_tests.longtail.test_trainer import FEW

R, C = 3, 10
COSINE = {"head": "scaled-cosine", "head_from": "class-means"}


def config_of(tune: str = "adapters", optimizer: str = "sgd", **values: Any) -> TrainConfig:
    options: dict[str, Any] = {"model": "own:vit", "epochs": 1, "batch_size": 32, "tune": tune}
    if tune == "adapters":
        options["adapter_width"] = R
    return recipe("digits-lt", "la", optimizer, **{**options, **values}).config()


def trainer_of(config: TrainConfig, **options: Any) -> Trainer:
    options = {"model": small_vit(1), "data": FEW, "progress": False, **options}
    return Trainer(config, **options)


def by_formula(weights: dict[str, Tensor], images: Tensor) -> Tensor:
    """Return the logits of the small network with adapters, written out."""

    def norm(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(dim=-1, keepdim=True)
        x = x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    patches = functional.unfold(images, 4, stride=4).mT
    tokens = patches @ weights["features.patches.weight"].flatten(1).T
    tokens = tokens + weights["features.patches.bias"]
    for place in range(VIT_BLOCKS):
        at = f"features.blocks.{place}"
        q, k, v = linear(norm(tokens, f"{at}.norm1"), f"{at}.attn.qkv").split(VIT_WIDTH, dim=-1)
        hidden = tokens + (q @ k.mT / VIT_WIDTH**0.5).softmax(dim=-1) @ v
        mlp = linear(norm(hidden, f"{at}.norm2"), f"{at}.mlp.0")
        mlp = linear(mlp * (1 + torch.erf(mlp / 2**0.5)) / 2, f"{at}.mlp.2")
        down = linear(norm(hidden, f"{at}.adapter.norm"), f"{at}.adapter.down").clamp(min=0)
        tokens = hidden + mlp + weights[f"{at}.adapter.scale"] * linear(down, f"{at}.adapter.up")
    return linear(norm(tokens, "features.norm").mean(dim=1), "head")


def test_adapters_equal_their_formula(seed: int) -> None:
    """Values and gradients in float64, with random weights instead of the initial zeros."""
    torch.manual_seed(seed)
    network = build_network(config_of(), C, 1, module=small_vit(1)).double()
    for value in network.parameters():
        nn.init.normal_(value, std=0.5)
    images = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    weights = {k: v.detach().clone().requires_grad_() for k, v in network.named_parameters()}
    found, expected = network(images), by_formula(weights, images)
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(found)
    found.backward(direction)
    expected.backward(direction)
    for name, value in network.named_parameters():
        torch.testing.assert_close(value.grad, weights[name].grad, msg=name)


class Scale(nn.Module):
    """Layer scale, with the initial factor of DeiT III."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((VIT_WIDTH,), 1e-4))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * self.gamma


class ScaledBlock(Block):
    """A block of timm with layer scale; ``dropped`` has stochastic depth after it, too."""

    def __init__(self, *, dropped: bool) -> None:
        super().__init__()
        self.ls2 = Scale()
        if dropped:
            self.drop_path2 = nn.Dropout(1.0)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        added = self.ls2(self.mlp(self.norm2(tokens)))
        return tokens + (self.drop_path2(added) if hasattr(self, "drop_path2") else added)


@pytest.mark.parametrize("dropped", [False, True])
def test_layer_scale_and_stochastic_depth_leave_the_adapter_alone(dropped: bool, seed: int) -> None:
    torch.manual_seed(seed)
    block, tokens = ScaledBlock(dropped=dropped), torch.randn(2, 4, VIT_WIDTH)
    without = block(tokens)
    [place] = transformer_blocks(block)
    adapter = Adapter(VIT_WIDTH, R)
    nn.init.normal_(adapter.up.weight)
    adapter.attach(place)
    hidden = tokens + block.attn(block.norm1(tokens))
    torch.testing.assert_close(block(tokens), without + adapter(hidden))


def test_the_network_starts_unchanged_and_keeps_its_names() -> None:
    images = torch.rand(4, 1, 8, 8)
    plain, adapted = (
        build_network(config_of(tune), C, 1, module=small_vit(1)) for tune in ("all", "adapters")
    )
    assert torch.equal(plain(images), adapted(images))
    state = adapted.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())
    added = state.keys() - plain.state_dict().keys()
    assert added == adapted.added
    assert {name.split(".")[3] for name in added} == {"adapter"}
    again = build_network(config_of(), C, 1, module=small_vit(1)).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in state.items())
    other = build_network(config_of(seed=1), C, 1, module=small_vit(1)).state_dict()
    name = "features.blocks.0.adapter.down.weight"
    assert not torch.equal(state[name], other[name])


def test_a_copy_has_its_own_adapters() -> None:
    network = build_network(config_of(), C, 1, module=small_vit(1))
    twin = copy.deepcopy(network)
    images = torch.rand(2, 1, 8, 8)
    before = network(images)
    for module in twin.modules():
        if isinstance(module, Adapter):
            nn.init.normal_(module.up.bias)
    assert torch.equal(network(images), before)
    assert not torch.allclose(twin(images), before)


def test_parameters_counted_by_hand() -> None:
    d = VIT_WIDTH
    adapters = VIT_BLOCKS * (2 * d + (d * R + R) + (R * d + d) + 1)
    biases = VIT_BLOCKS * (3 * d + VIT_MLP + d + 4 * d) + 2 * d + d  # of norms: weights too
    head = C * d + C
    base = sum(value.numel() for value in small_vit(1).parameters())
    for tune, trained, whole in (
        ("adapters", adapters, base + adapters),
        ("bias-norm", biases, base),
        ("all", base, base),
    ):
        config = config_of(tune)
        network = build_network(config, C, 1, module=small_vit(1))
        freeze(network, config)
        assert trained_count(network) == f"trains {trained + head:,} of {whole + head:,} parameters"


@pytest.mark.parametrize(
    ("classes", "count"), [(100, 101_436), (365, 175_212), (1000, 617_868), (8142, 4_749_324)]
)
def test_the_adapters_of_lift_on_a_vit_b(classes: int, count: int) -> None:
    """The numbers of the authors' code with 12 blocks of width 768."""
    adapter = Adapter(768, default_width(classes, 12))
    assert 12 * sum(value.numel() for value in adapter.parameters()) == count


@pytest.mark.parametrize("tune", ["adapters", "bias-norm"])
def test_what_is_not_tuned_keeps_its_bits(tune: str, tmp_path: Path) -> None:
    """SAM ascends in the second of two epochs, on AdamW; it backs up trained parameters only."""
    values = {"base_optimizer": "adamw", "lr": 0.01, "ascent_start": "1", "rho": (0.05,)}
    config = config_of(tune, "sam", epochs=2, ema=0.9, **COSINE, **values)
    trainer = trainer_of(config, out=tmp_path)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    result = trainer.fit()
    after = trainer.model.state_dict()
    trained = {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert {name for name in before if not torch.equal(before[name], after[name])} == trained
    assert trained >= {"head.weight"}
    assert len(trained) > 8
    optimized = {p for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized == {value for value in trainer.model.parameters() if value.requires_grad}

    assert result.total_gradients == 3 * (-(-len(FEW.train) // 32))
    stored = TrainedRun.load(tmp_path, module=small_vit(1))
    evaluation = evaluate_run(stored, data=FEW, bootstrap=0)
    assert evaluation.metrics.accuracy == result.test.accuracy
    images = torch.rand(5, 1, 8, 8)
    judged = Checkpoint.load(tmp_path).build_model(judged=True, module=small_vit(1)).eval()
    tau = torch.zeros(())  # la adjusts in the loss alone
    assert torch.equal(stored.network.eval()(images), judged(images) + tau)


def test_a_run_is_resumed_with_the_same_bits(tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def kill(epoch: Any) -> None:
        if epoch.epoch == 3:
            raise KilledError

    config = config_of(epochs=4, checkpoint_steps=2, **COSINE)
    trainer_of(config, out=tmp_path / "whole").fit()
    with pytest.raises(KilledError):
        trainer_of(config, out=tmp_path / "cut", on_epoch=kill).fit()
    trainer_of(config, out=tmp_path / "cut", resume=True).fit()
    one, other = (Checkpoint.load(tmp_path / name).model for name in ("whole", "cut"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    with pytest.raises(CheckpointError, match="tune was adapters, is now bias-norm"):
        trainer_of(config_of("bias-norm", epochs=4, **COSINE), out=tmp_path / "cut", resume=True)


def test_starts_of_other_tunings(tmp_path: Path) -> None:
    trainer = trainer_of(config_of(), out=tmp_path)
    trainer.fit()
    tuned = Checkpoint.load(tmp_path)
    assert trainer.state.start is not None
    assert trainer.state.start["left_out"] == []
    assert any("adapter" in name for name in trainer.state.start["fresh"])

    again = trainer_of(config_of(init=str(tmp_path))).model.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in tuned.model.items())
    for tune in ("all", "bias-norm"):
        with pytest.raises(
            CheckpointError, match=r"adapter.*--model own:vit --tune adapters --adapter-width 3"
        ):
            trainer_of(config_of(tune, init=str(tmp_path)))
    with pytest.raises(CheckpointError, match=r"of another shape.*--adapter-width 3"):
        trainer_of(config_of(init=str(tmp_path), adapter_width=5))
    name = "features.blocks.1.adapter.up.weight"
    half = {key: value for key, value in tuned.model.items() if key != name}
    with pytest.raises(CheckpointError, match=f"lacking {name}"):
        trainer_of(config_of(), start=Start("half", half))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "resnet8"}, "'adapters' requires transformer blocks.*--model timm:vit"),
        ({"model": "resnet8", "tune": "bias-norm"}, "'bias-norm' requires layer normalization"),
        ({"freeze": ("*adapter*", "head.*")}, "freeze .* with tune adapters leaves no parameter"),
        ({"freeze": ("*lora*",)}, r"freeze pattern '\*lora\*' matches no parameter"),
        ({"tune": "adapter"}, "unknown tuning 'adapter'"),
        ({"tune": "all", "adapter_width": 3}, "adapter_width requires tuning adapters"),
        ({"head": "cosine"}, "requires head='linear', got 'cosine'.*scaled-cosine"),
    ],
)
def test_settings_that_do_not_fit(values: dict[str, Any], message: str) -> None:
    module = None if values.get("model") == "resnet8" else small_vit(1)
    with pytest.raises(UsageError, match=message):
        trainer_of(config_of(values.pop("tune", "adapters"), **values), model=module)


def test_a_network_that_normalizes_after_the_mlp() -> None:
    with pytest.raises(UsageError, match=r"normalizes the output of the MLP.*tune='bias-norm'"):
        trainer_of(config_of(), model=small_vit(1, post_norm=True)).fit()


def test_blocks_of_torchvision() -> None:
    """The adapter receives the hidden state after the attention."""
    torchvision = pytest.importorskip("torchvision")
    vit = torchvision.models.VisionTransformer(
        image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=12
    ).eval()
    vit.heads = nn.Identity()
    vit.out_features = 8
    network = build_network(config_of(), C, 3, module=vit).eval().features
    [first, second] = transformer_blocks(network)
    assert (first.width, type(second.block).__name__) == (8, "EncoderBlock")
    tokens = torch.rand(2, 5, 8)
    before = first.block(tokens)
    adapter = first.block.adapter
    nn.init.normal_(adapter.up.weight)
    y = first.block.ln_1(tokens)
    hidden = tokens + first.block.self_attention(y, y, y, need_weights=False)[0]
    torch.testing.assert_close(first.block(tokens), before + adapter(hidden))


@pytest.mark.slow
def test_export_of_adapters(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    trainer_of(config_of(), out=tmp_path / "run").fit()
    run = TrainedRun.load(tmp_path / "run", module=small_vit(1))
    images = torch.rand(3, 1, 8, 8)
    wanted = run.network(images)
    path = export_run(run, tmp_path / "safetensors", format="safetensors")
    assert torch.equal(load_weights(path, module=small_vit(1)).network(images), wanted)
    program = torch.export.load(export_run(run, tmp_path / "torch", format="torch"))
    preprocessing = run.known_preprocessing()
    pixels = images * preprocessing.std[0] + preprocessing.mean[0]
    torch.testing.assert_close(program.module()(pixels), wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    "option", [{"compile": True}, {"checkpoint_activations": True}, {"precision": "bfloat16"}]
)
def test_adapters_with_other_forms_of_the_passes(option: dict[str, Any]) -> None:
    plain, other = (trainer_of(config_of(optimizer="sam", **values)) for values in ({}, option))
    plain.fit()
    other.fit()
    tolerance = 5e-2 if "precision" in option else 1e-4
    for name, value in plain.model.state_dict().items():
        found = other.model.state_dict()[name]
        torch.testing.assert_close(found, value, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_lift_on_a_network_of_timm(tmp_path: Path) -> None:
    """A network from a local weight file is tuned, stored, evaluated and tuned again."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    reference = timm.create_model("test_vit", num_classes=5)
    torch.save(reference.state_dict(), tmp_path / "vit.pt")
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(12, 3, 160, 160, generator=generator)
    samples = torch.utils.data.TensorDataset(images, torch.arange(12) % 3)
    data = from_datasets("mine", samples, samples)
    values = {"model": "timm:test_vit", "pretrained": str(tmp_path / "vit.pt"), "batch_size": 4}
    config = recipe("own:mine", "la", "sam", stages="lift", epochs=1, **values).config()
    assert (config.head, config.cosine_scale, config.tune) == ("scaled-cosine", 25.0, "adapters")
    stages = stage_trainers(config, data=data, out=tmp_path / "run", progress=False)
    trainer = next(stages).trainer
    images = torch.rand(2, 3, 160, 160, generator=generator)
    features = reference.eval().forward_head(reference.forward_features(images), pre_logits=True)
    torch.testing.assert_close(trainer.model.eval().features(images), features)
    result = trainer.fit()
    assert list(stages) == []  # it has one stage
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert trained == 6 * (2 * 64 + 64 + 1 + 64 + 64 + 1) + 3 * 64
    run = TrainedRun.load(tmp_path / "run")
    assert evaluate_run(run, data=data, bootstrap=0).metrics.accuracy == result.test.accuracy
    for name, value in reference.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(run.network.state_dict()[f"features.network.{name}"], value)
    frozen = {"freeze": ("features.*",), "tune": "adapters", "init": str(tmp_path / "run")}
    head = recipe("own:mine", "ce", "sgd", model="timm:test_vit", epochs=1, **frozen).config()
    again = Trainer(head, data=data, progress=False)
    again.fit()
    state = again.model.features.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in run.network.features.state_dict().items())
    assert np.isfinite(result.test.accuracy)


def test_a_branch_trains_other_parameters_but_no_other_network(tmp_path: Path) -> None:
    for tune in ("all", "adapters"):
        trainer_of(config_of(tune, epochs=2), out=tmp_path / tune, keep={1}).fit()
    for tune, changes, message in (
        ("all", {"tune": "adapters"}, r"only the branch has features.blocks.0.adapter"),
        ("adapters", {"tune": "all"}, r"only adapters has features.blocks.0.adapter"),
        ("adapters", {"adapter_width": R + 1}, r"features.blocks.0.adapter.* has another shape"),
    ):
        branch = Branch.load(tmp_path / tune, 1)
        config, _ = branch.settings(**changes)
        with pytest.raises(UsageError, match=rf"network: {message}.* --tune {tune}"):
            trainer_of(config, branch=branch, out=tmp_path / "branch")
        assert not (tmp_path / "branch").exists()
    branch = Branch.load(tmp_path / "all", 1)
    config, _ = branch.settings(tune="bias-norm")
    trainer = trainer_of(config, branch=branch)
    assert not trainer.model.get_parameter("features.blocks.0.mlp.0.weight").requires_grad
    assert torch.equal(trainer.model.head.weight, branch.checkpoint.model["head.weight"])
