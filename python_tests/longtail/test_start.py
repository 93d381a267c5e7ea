"""Runs that start from weights: of runs, files, pretrained networks and own modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from fastsam.longtail import Trainer, recipe
from fastsam.longtail.build import build_network
from fastsam.longtail.checkpoint import Checkpoint, weights_hash
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.data import LongTailData, from_datasets, load_dataset
from fastsam.longtail.errors import CheckpointError, LongTailError, UsageError
from fastsam.longtail.features import collect_features
from fastsam.longtail.models.base import build_model, pretrained_normalization
from fastsam.longtail.start import Start
from fastsam.longtail.trained import TrainedRun, export_run, load_weights

SMALL = {"model": "resnet8", "batch_size": 128, "epochs": 1}


def config_of(method: str = "ce", optimizer: str = "sgd", **values: Any) -> TrainConfig:
    return recipe("digits-lt", method, optimizer, **{**SMALL, **values}).config()


def begun(config: TrainConfig, **options: Any) -> dict[str, Tensor]:
    """Return the weights before the first step."""
    return Trainer(config, progress=False, **options).model.state_dict()


def same(one: dict[str, Tensor], other: dict[str, Tensor], prefix: str = "") -> bool:
    names = [name for name in one if name.startswith(prefix)]
    return bool(names) and all(torch.equal(one[name], other[name]) for name in names)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "run"
    Trainer(config_of(ema=0.9), out=folder, progress=False).fit()
    return folder


def test_every_form_of_a_run_gives_its_evaluated_weights(run: Path, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    judged = Checkpoint.load(run).judged_weights()
    features = {k.removeprefix("features."): v for k, v in judged.items() if "features." in k}
    torch.save(judged, tmp_path / "whole.pt")
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in judged.items()}},
        tmp_path / "ddp.pth",
    )
    torch.save({"model": features}, tmp_path / "features.pt")
    safetensors.save_file(features, tmp_path / "features.safetensors")
    exported = export_run(TrainedRun.load(run), tmp_path / "export", format="safetensors")
    fresh = begun(config_of())
    for path in (run, run / "checkpoint.pt", tmp_path / "whole.pt", tmp_path / "ddp.pth", exported):
        assert same(judged, begun(config_of(init=str(path)))), path
    for path in (tmp_path / "features.pt", tmp_path / "features.safetensors"):
        found = begun(config_of(init=str(path)))
        assert same(judged, found, "features.")
        assert same(fresh, found, "head.")  # its own random weights
    assert same(judged, begun(config_of(), start=Start("given", judged)))


@pytest.mark.slow
def test_a_run_records_its_start(run: Path, tmp_path: Path) -> None:
    """Evaluation and resuming need neither the start nor its file."""
    judged = Checkpoint.load(run).judged_weights()
    start = tmp_path / "weights.pt"
    torch.save(judged, start)
    config = config_of(init=str(start), epochs=2)
    result = Trainer(config, out=tmp_path / "out", progress=False).fit()
    stored = Checkpoint.load(tmp_path / "out").start
    assert stored == result.start
    assert stored is not None
    assert stored["sha256"] == weights_hash(judged)
    assert (stored["name"], stored["left_out"], stored["fresh"]) == (str(start), [], [])
    start.unlink()
    TrainedRun.load(tmp_path / "out")
    again = Trainer(config, out=tmp_path / "out", resume=True, progress=False).fit()
    assert again.start == result.start
    assert Trainer(config_of(), progress=False).fit().start is None


def test_a_momentum_encoder_follows_the_start(run: Path) -> None:
    judged = Checkpoint.load(run).judged_weights()
    found = begun(config_of("paco", init=str(run)))
    assert same(judged, found, "features.")
    keys = {
        f"features.{k.removeprefix('key_encoder.0.')}": v
        for k, v in found.items()
        if "encoder.0" in k
    }
    assert same(keys, judged)


def made_data(
    shape: tuple[int, ...], classes: int = 4, images: int = 20, names: tuple[str, ...] = ()
) -> LongTailData:
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(images) % classes
    samples = TensorDataset(torch.rand(images, *shape, generator=generator), targets)
    return from_datasets("mine", samples, samples, class_names=names or None)


def test_a_head_of_other_classes_is_refused_or_left_out(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values: dict[str, Any] = {**SMALL, "init": str(run)}
    for names, message in (
        (tuple("abcdefghij"), r"class 0 '0', the data set 'a'.*--head-from fresh"),
        (tuple("abc"), "it has 10 classes, the data set 3"),
    ):
        data = made_data((1, 8, 8), len(names), 200, names)
        config = recipe("own:mine", "ce", "sgd", **values).config()
        with pytest.raises(UsageError, match=message):
            Trainer(config, data=data, progress=False)
        judged = Checkpoint.load(run).judged_weights()
        found = begun(config.replace(head_from="fresh"), data=data)
        assert same(judged, found, "features.")
        fresh = recipe("own:mine", "ce", "sgd", **SMALL).config()
        assert same(begun(fresh, data=data), found, "head.")
    torch.save(judged, tmp_path / "weights.pt")  # without names of classes
    Trainer(config.replace(init=str(tmp_path / "weights.pt")), data=data)
    assert "left out head.bias, head.weight" in capsys.readouterr().err


def test_weights_that_do_not_fit_are_named(run: Path, tmp_path: Path) -> None:
    judged = Checkpoint.load(run).judged_weights()
    conv = "features.layers.0.weight"
    for weights, message in (
        (
            {**judged, conv: judged[conv][:3]},
            rf"{conv} of another shape \(3 x 1 x 3 x 3 instead of 16",
        ),
        ({k: v for k, v in judged.items() if k != conv}, f"lacking {conv}"),
        (
            {**judged, "features.layers.9.conv1.weight": judged[conv]},
            "with features.layers.9.*not have",
        ),
        ({"x": torch.ones(1)}, "lacking .* and 32 more.*--model"),
    ):
        torch.save(weights, tmp_path / "weights.pt")
        with pytest.raises(CheckpointError, match=message):
            Trainer(config_of(init=str(tmp_path / "weights.pt")), progress=False)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("no weights")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    torch.save(nn.Linear(1, 1), tmp_path / "module.pt")
    wrong: tuple[tuple[str, type[LongTailError], str], ...] = (
        ("missing.pt", UsageError, r"missing\.pt does not exist"),
        ("text.pt", CheckpointError, "cannot read weights from .*save network.state_dict"),
        ("none.pt", CheckpointError, "contains no state dict"),
        ("module.pt", CheckpointError, "cannot read weights from"),
        ("", CheckpointError, "no checkpoint at"),
    )
    for name, kind, message in wrong:
        with pytest.raises(kind, match=message):
            Trainer(config_of(init=str(tmp_path / name)), progress=False)


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_a_head_of_class_means(run: Path, head: str) -> None:
    """The oracle is the mean of the features of the images, in the order of the data set."""
    method = "ce" if head == "linear" else "ldam"
    config = config_of(method, head=head, init=str(run), head_from="class-means")
    trainer = Trainer(config, progress=False)
    model, data = trainer.model.eval(), trainer.data
    cpu = torch.device("cpu")
    features = collect_features(model, data.train, cpu, batch_size=7)
    means = torch.stack(
        [features.values[features.targets == c].double().mean(dim=0) for c in range(10)]
    )
    wanted = functional.normalize(means, dim=1).float()
    weight = model.head.weight if head == "linear" else model.head.weight.T
    assert torch.allclose(weight, wanted, atol=1e-5)
    if head == "linear":
        assert not model.head.bias.any()
    assert trainer.state.start is not None
    assert trainer.state.start["head_from"] == "class-means"


@pytest.mark.parametrize("form", ["npy", "pt", "safetensors"])
def test_a_head_of_vectors_in_a_file(form: str, tmp_path: Path, seed: int) -> None:
    vectors = torch.randn(10, 64, generator=torch.Generator().manual_seed(seed))
    path = tmp_path / f"vectors.{form}"
    if form == "npy":
        np.save(path, vectors.numpy())
    elif form == "pt":
        torch.save(vectors, path)
    else:
        pytest.importorskip("safetensors.torch").save_file({"classes": vectors}, path)
    found = begun(config_of(head_from=str(path)))
    assert torch.equal(found["head.weight"], vectors)
    np.save(tmp_path / "few.npy", vectors[:3].numpy())
    with pytest.raises(UsageError, match=r"few\.npy has 3 x 64 numbers, but 10 classes with 64"):
        begun(config_of(head_from=str(tmp_path / "few.npy")))


class Small(nn.Module):
    """A module of a user's own, without the attribute ``out_features``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.norm(self.conv(images))
        return maps.relu().mean(dim=(2, 3))


def flat(lazy: bool) -> nn.Sequential:
    """Return a network whose features are as many as the pixels allow."""
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.LazyLinear(16)) if lazy else nn.Sequential(*layers)


@pytest.mark.parametrize("lazy", [False, True])
def test_an_own_module_may_depend_on_the_size_of_images(lazy: bool, tmp_path: Path) -> None:
    config = config_of(model="own:flat", epochs=1)
    trainer = Trainer(config, model=flat(lazy), out=tmp_path / "run", progress=False)
    trainer.fit()
    assert trainer.model.feature_width == (16 if lazy else 4 * 6 * 6)
    run = TrainedRun.load(tmp_path / "run", module=flat(lazy))
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(run.network(images), trainer.model.eval()(images))
    path = export_run(run, tmp_path / "export", format="safetensors")
    assert torch.equal(load_weights(path, module=flat(lazy)).network(images), run.network(images))


def test_without_a_size_the_width_must_not_depend_on_it() -> None:
    with pytest.raises(UsageError, match=r"D depends on the image size: it is one of \[144, "):
        build_model("own:flat", 10, channels=1, module=flat(lazy=False))
    assert build_model("own:flat", 10, channels=1, module=flat(lazy=True)).feature_width == 16
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))  # accepts 8 x 8 only
    assert build_model("own:flat", 10, channels=1, module=module).feature_width == 5
    with pytest.raises(UsageError, match="shapes cannot be multiplied"):
        build_model("own:flat", 10, channels=1, module=module, size=(9, 9))


def test_an_own_module_is_trained_evaluated_and_exported(tmp_path: Path) -> None:
    module = Small()
    before = weights_hash(module.state_dict())
    config = config_of(model="own:small", epochs=2)
    trainer = Trainer(config, model=module, out=tmp_path / "run", progress=False)
    result = trainer.fit()
    assert trainer.model.feature_width == 6
    assert weights_hash(module.state_dict()) == before  # it was copied
    assert result.start is not None
    assert result.start["sha256"] == before
    run = TrainedRun.load(tmp_path / "run", module=module)
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(run.network.features(images), trainer.model.eval().features(images))
    path = export_run(run, tmp_path / "export", format="safetensors")
    loaded = load_weights(path, module=module).network
    assert torch.equal(loaded(images), run.network(images))
    remedy = (
        r"network own:small is a module that was passed from Python.*TrainedRun\.load\(RUN, module"
    )
    refused: list[Callable[[], Any]] = [
        lambda: TrainedRun.load(tmp_path / "run"),
        lambda: build_network(config, 10, 1),
        lambda: Trainer(config, progress=False),
    ]
    for call in refused:
        with pytest.raises(UsageError, match=remedy):
            call()
    with pytest.raises(CheckpointError, match=remedy):
        load_weights(path)
    resumed = Trainer(config, model=module, out=tmp_path / "run", resume=True, progress=False)
    assert same(trainer.model.state_dict(), resumed.model.state_dict())
    with pytest.raises(UsageError, match=r"must map images .* to features .*returned shape"):
        Trainer(config, model=nn.Conv2d(1, 2, 3), progress=False)
    with pytest.raises(UsageError, match="passed for the network 'resnet8'; name it own:NAME"):
        Trainer(config_of(), model=module, progress=False)


# --- pretrained networks ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "channels", [pytest.param(c, marks=[pytest.mark.slow] * (c != 4)) for c in (1, 3, 4)]
)
def test_pretrained_weights_of_torchvision_from_a_file(
    channels: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The classifier of the file is left out, and input filters are adapted to the images."""
    torchvision = pytest.importorskip("torchvision")
    source = torchvision.models.resnet18(num_classes=5)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    data = made_data((channels, 32, 32))
    values: dict[str, Any] = {"model": "resnet18", "batch_size": 20, "epochs": 1}
    config = recipe(
        "own:mine", "ce", "sgd", pretrained=str(tmp_path / "weights.pth"), **values
    ).config()
    trainer = Trainer(config, data=data)
    change = f"features.network.conv1.weight adapted from 3 to {channels} channels"
    assert (change in capsys.readouterr().err) == (channels != 3)
    found = trainer.model.state_dict()
    for name, value in source.state_dict().items():
        if name == "conv1.weight":
            gray = torch.rand(2, 1, 32, 32)
            ours = functional.conv2d(
                gray.expand(-1, channels, -1, -1), found["features.network.conv1.weight"]
            )
            assert torch.allclose(
                ours, functional.conv2d(gray.expand(-1, 3, -1, -1), value), atol=1e-5
            )
        elif not name.startswith("fc."):
            assert torch.equal(found[f"features.network.{name}"], value), name
    assert trainer.state.start is not None
    assert trainer.state.start["left_out"] == [
        "features.network.fc.bias",
        "features.network.fc.weight",
    ]


def test_images_that_are_normalized_unlike_those_of_pretraining_are_reported(
    tmp_path: Path,
) -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "weights.pth")
    config = config_of(model="resnet18", pretrained=str(tmp_path / "weights.pth"))
    data = load_dataset("digits-lt")
    with pytest.warns(
        UserWarning, match=r"resnet18 was pretrained on images normalized by mean \(0\.485"
    ):
        Trainer(config, data=data, progress=False)
    fitting = data.normalized((0.45,), (0.226,))
    Trainer(config, data=fitting, progress=False)  # warnings are errors


@pytest.mark.filterwarnings("ignore:resnet18 was pretrained")
def test_names_of_pretrained_weights() -> None:
    pytest.importorskip("torchvision")
    assert pretrained_normalization("resnet50", "IMAGENET1K_V1").std == (0.229, 0.224, 0.225)
    with pytest.raises(
        UsageError, match=r"unknown pretrained weights of resnet18 'V9'.*IMAGENET1K_V1"
    ):
        pretrained_normalization("resnet18", "V9")
    with pytest.raises(UsageError, match="network resnet8 has no pretrained weights"):
        pretrained_normalization("resnet8")
    with pytest.raises(UsageError, match="pretrained requires model resnet"):
        config_of(pretrained="default")
    config = config_of(model="resnet18", pretrained="none.pth", init="also.pth")
    with pytest.raises(UsageError, match=r"init also\.pth and pretrained none\.pth both name"):
        Trainer(config, progress=False)


@pytest.mark.filterwarnings("ignore:resnet18 was pretrained")
def test_a_failed_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(
        UsageError, match="no route to host; check the connection, or download the file"
    ):
        Trainer(config_of(model="resnet18", pretrained="default"), progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_pretrained_weights_of_timm_from_a_file(name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    source = timm.create_model(name, num_classes=5)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    values: dict[str, Any] = {"model": f"timm:{name}", "pretrained": str(tmp_path / "weights.pt")}
    config = recipe("own:mine", "ce", "adamw", batch_size=10, epochs=1, **values).config()
    found = begun(config, data=made_data((3, 160, 160)))
    wanted = {f"features.network.{k}": v for k, v in source.state_dict().items()}
    kept = {k: v for k, v in wanted.items() if k in found}
    assert len(kept) == len(wanted) - 2  # without the classifier
    assert same(kept, found)
    assert pretrained_normalization(f"timm:{name}").mean == tuple(source.pretrained_cfg["mean"])
    with pytest.raises(UsageError, match=f"unknown pretrained weights of timm:{name} 'x1'.*r160"):
        pretrained_normalization(f"timm:{name}", "x1")


@pytest.mark.slow
def test_timm_frozen_then_unfrozen_and_killed_in_the_second_phase(tmp_path: Path) -> None:
    """The killed and resumed run has the bits of the uninterrupted one."""
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("test_vit", num_classes=3).state_dict(), tmp_path / "weights.pt")
    data = made_data((3, 160, 160), images=48)
    values: dict[str, Any] = {"model": "timm:test_vit", "batch_size": 8}
    first = recipe(
        "own:mine",
        "ce",
        "adamw",
        epochs=2,
        pretrained=str(tmp_path / "weights.pt"),
        freeze=("features.*",),
        head_from="class-means",
        **values,
    ).config()
    Trainer(first, data=data, out=tmp_path / "frozen", progress=False).fit()
    second = recipe(
        "own:mine",
        "ce",
        "sam",
        base_optimizer="adamw",
        epochs=3,
        init=str(tmp_path / "frozen"),
        layer_decay=0.7,
        no_decay=("vectors",),
        checkpoint_steps=2,
        **values,
    ).config()
    Trainer(second, data=data, out=tmp_path / "whole", progress=False).fit()

    class KilledError(Exception):
        pass

    steps = 0

    def kill(_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 11:
            raise KilledError

    with pytest.raises(KilledError):
        Trainer(second, data=data, out=tmp_path / "cut", on_step=kill, progress=False).fit()
    cut = Trainer(second, data=data, out=tmp_path / "cut", resume=True, progress=False)
    assert cut.state.batches > 0
    cut.fit()
    one, other = (Checkpoint.load(tmp_path / name) for name in ("whole", "cut"))
    assert same(one.model, other.model)
    assert one.start == other.start
    trained = Checkpoint.load(tmp_path / "frozen").model
    start = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert torch.equal(trained["features.network.cls_token"], start["cls_token"])
    assert not torch.equal(one.model["features.network.cls_token"], start["cls_token"])
