"""``--compile`` compiles each kind of pass once, and trains like eager passes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters

from fastsam.distributed import World
from fastsam.longtail import Checkpoint, Trainer, recipe
from fastsam.longtail.data import TensorImages, load_digits_lt
from fastsam.longtail.errors import UsageError
from fastsam.longtail.models import Classifier
from fastsam.longtail.models.base import MODELS, Model
from fastsam.longtail.training import Engine
from python_tests.ranks import run_ranks

DIGITS = load_digits_lt()
IMAGES = 200
train = DIGITS.train
assert isinstance(train, TensorImages)
FEW = replace(
    DIGITS,
    train=train.select(np.arange(0, len(train), len(train) // IMAGES)[:IMAGES]),
    validation=None,
)
SIZE = 60
"""Three batches of 60 images and one of 20."""


class Features(nn.Module):
    """Linear layers and batch normalization, which compile in seconds instead of minutes."""

    out_features = 12

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 12)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        features: Tensor = self.layers(inputs)
        return features


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    made = Model(name="linear", build=lambda settings, channels: Features(), summary="linear")
    monkeypatch.setitem(MODELS._parts, "linear", made)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def trained(optimizer: str, out: Path, **settings: Any) -> Trainer:
    options = {
        "model": "linear",
        "epochs": 3,
        "batch_size": SIZE,
        "lr": 0.02,
        "augment": False,
        **settings,
    }
    config = recipe("digits-lt", "ce", optimizer, **options).config()
    run = Trainer(config, data=FEW, out=out, progress=False)
    run.fit()
    return run


def assert_alike(eager: Trainer, compiled: Trainer) -> None:
    assert compiled.model.state_dict().keys() == eager.model.state_dict().keys()
    for name, value in eager.model.state_dict().items():
        torch.testing.assert_close(compiled.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("optimizer", "variants"), [("sgd", 2), ("sam", 4)])
def test_each_kind_of_pass_is_compiled_once(
    optimizer: str, variants: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SAM's second pass leaves the running statistics alone, so it is another variant."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    eager = trained(optimizer, tmp_path / "eager")
    assert counters["stats"]["unique_graphs"] == 0
    compiled = trained(optimizer, tmp_path / "compiled", compile=True)
    assert counters["stats"]["unique_graphs"] == variants
    assert not counters["graph_break"]
    assert_alike(eager, compiled)
    layer = compiled.model.features.layers[2]  # type: ignore[index,union-attr]
    assert int(layer.num_batches_tracked) == 3 * compiled.steps_per_epoch  # type: ignore[union-attr,index,arg-type]
    kept = Checkpoint.load(tmp_path / "compiled").build_model()
    for name, value in compiled.model.state_dict().items():
        assert torch.equal(kept.state_dict()[name], value)
    first, second, third = compiled.state.history
    assert first.compile_seconds is not None
    assert first.compile_seconds > 0
    assert second.compile_seconds == third.compile_seconds == 0
    assert first.images_per_second == pytest.approx(
        IMAGES / (first.seconds - first.compile_seconds), rel=0.2
    )
    assert eager.state.history[0].compile_seconds is None


def test_runs_of_one_process_do_not_use_up_the_variants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "isolate_recompiles" not in inspect.signature(torch.compile).parameters:
        pytest.skip("this version of torch counts the variants of all runs together")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    for run in range(4):
        counters.clear()
        trained("sam", tmp_path / str(run), compile=True, epochs=1)
        assert counters["stats"]["unique_graphs"] == 4


def _rank(rank: int, folder: str) -> None:
    torch.compile = partial(torch.compile, backend="aot_eager")  # type: ignore[assignment]
    found = []
    for compiles in (False, True):
        torch.manual_seed(0)
        network = Classifier(Features(), nn.Linear(12, 10), 12)
        engine = Engine(network, World(rank, 2), compiles=compiles)
        inputs = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(rank))
        engine.backward(engine.outputs(inputs).logits.square().sum(), local=False)
        found.append([p.grad for p in network.parameters()])
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")
def test_ranks_reduce_the_same_gradients(tmp_path: Path) -> None:
    run_ranks(_rank, 2, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for eager, compiled, other in zip(*first, second[1], strict=True):
        torch.testing.assert_close(compiled, eager)
        assert torch.equal(compiled, other)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_machine_code_trains_like_eager_passes(precision: str, tmp_path: Path) -> None:
    eager = trained("sam", tmp_path / "eager", precision=precision)
    compiled = trained("sam", tmp_path / "compiled", compile=True, precision=precision)
    if precision == "float32":
        assert_alike(eager, compiled)
    for mine, other in zip(compiled.state.history, eager.state.history, strict=True):
        assert mine.loss == pytest.approx(other.loss, rel=1e-5 if precision == "float32" else 2e-2)


def test_a_missing_compiler_is_an_early_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    config = recipe("digits-lt", "ce", "sgd", compile=True).config()
    with pytest.raises(UsageError, match=r"no-such-compiler was not found; install it, set the"):
        Trainer(config, data=FEW, progress=False)


def test_two_ways_to_save_activations_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="compile cannot be combined with checkpoint_activations"):
        recipe("digits-lt", "ce", "sgd", compile=True, checkpoint_activations=True).config()
