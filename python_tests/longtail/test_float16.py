"""Training in float16: loss scaling, overflows, resuming."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from fastsam import SAM
from fastsam.distributed import World
from fastsam.longtail import Checkpoint, Trainer, recipe
from fastsam.longtail.build import build_objective
from fastsam.longtail.data import Batch, load_digits_lt
from fastsam.longtail.errors import TrainingError
from fastsam.longtail.models import Classifier
from fastsam.longtail.models.base import MODELS, Model
from fastsam.longtail.training import Branch, Engine, Step, Stepper
from fastsam.longtail.training.loss_scale import LossScale
from python_tests.ranks import run_ranks

DIGITS = load_digits_lt()
CPU = torch.device("cpu")
BATCH = 16
COUNT = 12


class LinearFeatures(nn.Module):
    """Linear layers and batch statistics: convolutions in float16 are slow on a CPU."""

    out_features = 16

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 16)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        features: Tensor = self.layers(inputs)
        return features


@pytest.fixture
def linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the network ``linear``."""
    made = Model(name="linear", build=lambda settings, channels: LinearFeatures(), summary="linear")
    monkeypatch.setitem(MODELS._parts, "linear", made)


def network() -> Classifier:
    torch.manual_seed(0)
    features = LinearFeatures()
    return Classifier(features, nn.Linear(16, 10), 16)


def batches(factor: float = 1.0, count: int = COUNT) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(BATCH, 1, 8, 8, generator=generator) * factor for _ in range(count)]
    rows = torch.arange(BATCH)
    return [Batch((each,), rows % 10, rows) for each in images]


def sam(network: nn.Module) -> Optimizer:
    return SAM(network.parameters(), SGD, rho=0.05, adaptive=True, lr=0.01, momentum=0.9)


def sgd(network: nn.Module) -> Optimizer:
    return SGD(network.parameters(), lr=0.01, momentum=0.9)


def torch_loop(
    network: nn.Module, optimizer: Optimizer, stream: list[Batch], scale: float
) -> torch.amp.GradScaler:
    """Train with torch's GradScaler as in its documentation, and with SAM as in ours."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=4)
    halves = [optimizer.ascent, optimizer] if isinstance(optimizer, SAM) else [optimizer]
    for batch in stream:
        for half in halves:
            optimizer.zero_grad()
            layers = [m for m in network.modules() if isinstance(m, nn.BatchNorm1d)]
            for layer in layers:
                layer.track_running_stats = half is halves[0]
            with torch.autocast("cpu", torch.float16):
                logits = network(batch.inputs)
            loss = nn.functional.cross_entropy(logits.float(), batch.targets)
            scaler.scale(loss).backward()
            scaler.step(half)
            for layer in layers:
                layer.track_running_stats = True
        scaler.update()
    return scaler


def steps_of(
    model: Classifier,
    optimizer: Optimizer,
    stream: list[Batch],
    world: World = World(),  # noqa: B008 (frozen)
    **state: float,
) -> tuple[Stepper, list[Step]]:
    objective = build_objective(recipe("digits-lt", "ce", "sgd").config(), DIGITS.counts)
    scale = LossScale(CPU, world)
    scale.load_state_dict({**scale.state_dict(), **state})
    engine = Engine(model, world, loss_scale=scale)
    stepper = Stepper(engine, optimizer, objective, seed=0, precision="float16")
    seen = [step for steps in stepper.steps(stream, epoch=1) for step in steps]
    return stepper, seen


@pytest.mark.parametrize("make", [sgd, sam])
def test_the_steps_are_those_of_torchs_scaler(make: Callable[[nn.Module], Optimizer]) -> None:
    """From a scale at which every gradient overflows, until the scale has grown again."""
    stream, high = batches(), 2.0**24
    ours, theirs = network(), network()
    stepper, seen = steps_of(ours, make(ours), stream, scale=high, growth_interval=4)
    scaler = torch_loop(theirs, make(theirs), stream, high)
    assert len(seen) == COUNT
    scale = stepper.engine.loss_scale
    assert scale is not None
    assert scale.state_dict() == scaler.state_dict()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)
    skipped = stepper.skipped_steps
    assert 2 <= skipped <= COUNT - 4, "the case is meant to have steps of both kinds"
    assert scaler.get_scale() != high / 2**skipped, "the scale is meant to grow once"
    assert stepper.excused_steps == skipped
    layer = ours.features.layers[2]  # type: ignore[union-attr,index]
    assert int(layer.num_batches_tracked) == COUNT - skipped  # type: ignore[index,union-attr]


@pytest.mark.parametrize("make", [sgd, sam])
@pytest.mark.parametrize("spoiled", [0, 1])
def test_an_overflow_skips_once(make: Callable[[nn.Module], Optimizer], spoiled: int) -> None:
    """One overflow, in the first pass or the second, halves the scale once and changes nothing."""
    model = network()
    optimizer = make(model)
    if spoiled == 1 and make is sgd:
        pytest.skip("SGD makes one pass")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls: list[None] = []

    def spoil(gradient: Tensor) -> Tensor:
        calls.append(None)
        return torch.full_like(gradient, torch.inf) if len(calls) == spoiled + 1 else gradient

    model.head.weight.register_hook(spoil)  # type: ignore[union-attr]
    stepper, _ = steps_of(model, optimizer, batches(1.0, 1))
    scale = stepper.engine.loss_scale
    assert scale is not None
    assert scale.get_scale() == 2.0**15
    assert (stepper.skipped_steps, stepper.excused_steps) == (1, 1)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    list(stepper.steps(batches(1.0, 2), epoch=1))
    assert stepper.skipped_steps == 1
    assert scale.get_scale() == 2.0**15
    assert not torch.equal(model.head.weight, before["head.weight"])  # type: ignore[arg-type]


def test_a_step_whose_loss_is_not_finite_is_not_excused() -> None:
    model = network()
    stepper, _ = steps_of(model, sgd(model), batches(float("nan"), 1))
    assert (stepper.skipped_steps, stepper.excused_steps) == (1, 0)


def test_a_step_that_overflows_without_a_scale_is_not_excused() -> None:
    model = network()
    model.head.weight.register_hook(lambda gradient: gradient * torch.inf)  # type: ignore[union-attr]
    stepper, _ = steps_of(model, sgd(model), batches(1.0, 20))
    assert (stepper.skipped_steps, stepper.excused_steps) == (20, 16)


def config_for(optimizer: str, **more: Any) -> Any:
    options = {"model": "linear", "precision": "float16", "epochs": 3, "lr": 0.02, **more}
    return recipe("digits-lt", "ce", optimizer, **options).config()


OPTIMIZERS = ["sgd", "pgd", "lpf-sgd", "entropy-sgd", "sam", "asam", "looksam"]


@pytest.mark.usefixtures("linear")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_skips_and_continues_a_run_with_the_same_bits(
    optimizer: str, tmp_path: Path
) -> None:
    """The scale begins so high that the first steps are skipped: more than half of the first epoch."""

    def trainer(out: Path, **more: Any) -> Trainer:
        made = Trainer(
            config_for(optimizer, batch_size=256), data=DIGITS, out=out, progress=False, **more
        )
        assert made.state.loss_scale is not None
        if not made.state.history:
            made.state.loss_scale.load_state_dict(
                {**made.state.loss_scale.state_dict(), "scale": 2.0**30, "growth_interval": 2}
            )
        return made

    whole = trainer(tmp_path / "whole", keep=[2])
    result = whole.fit()
    first = result.history[0]
    assert 2 * first.skipped > whole.steps_per_epoch, "the case is meant to skip most of an epoch"
    (tmp_path / "part").mkdir()
    kept = tmp_path / "whole" / "epoch-2.pt"
    (tmp_path / "part" / "epoch-2.pt").write_bytes(kept.read_bytes())
    resumed = Trainer(
        config_for(optimizer, batch_size=256),
        data=DIGITS,
        out=tmp_path / "part",
        resume=True,
        progress=False,
    )
    again = resumed.fit()
    assert again.history[-1].skipped == result.history[-1].skipped
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    assert whole.state.loss_scale is not None
    assert resumed.state.loss_scale is not None
    assert resumed.state.loss_scale.state_dict() == whole.state.loss_scale.state_dict()
    branch = Trainer(
        config_for("sgd", batch_size=256),
        data=DIGITS,
        branch=Branch("parent", Checkpoint.load(kept)),
        progress=False,
    )
    assert branch.state.loss_scale is not None
    assert branch.state.loss_scale.state_dict() == Checkpoint.load(kept).loss_scale


@pytest.mark.usefixtures("linear")
@pytest.mark.parametrize("optimizer", ["sgd", "sam"])
def test_a_run_whose_gradients_overflow_at_every_scale_stops(optimizer: str) -> None:
    run = Trainer(config_for(optimizer, epochs=9), data=DIGITS, progress=False)
    run.model.head.weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(TrainingError, match="gradients were infinite or NaN"):
        run.fit()


def _first_is_infinite(calls: list[int], gradient: Tensor) -> Tensor:
    calls.append(1)
    return gradient * torch.inf if len(calls) == 1 else gradient


def _rank(rank: int, size: int, folder: str) -> None:
    found = {}
    for scope in ("global", "local"):
        model = network().eval()
        group = dist.group.WORLD if scope == "local" else None
        optimizer = SAM(model.parameters(), SGD, rho=0.05, lr=0.01, process_group=group)
        calls: list[int] = []
        spoil = partial(_first_is_infinite, calls if rank == 1 else [1])
        model.head.weight.register_hook(spoil)  # type: ignore[union-attr]
        world = World(rank, size)
        parts = [
            Batch(
                tuple(view[rank::size] for view in b.views),
                b.targets[rank::size],
                b.indices[rank::size],
            )
            for b in batches(1.0, 3)
        ]
        stepper, _ = steps_of(model, optimizer, parts, world)
        scale = stepper.engine.loss_scale
        assert scale is not None
        found[scope] = (scale.get_scale(), stepper.skipped_steps, model.state_dict())
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")
@pytest.mark.slow
def test_ranks_skip_a_step_together(tmp_path: Path) -> None:
    run_ranks(_rank, 2, 2, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for scope in ("global", "local"):
        for scale, skipped, weights in (found[scope] for found in ranks):
            assert (scale, skipped) == (2.0**15, 1), scope
            for name, value in weights.items():
                assert torch.equal(value, ranks[0][scope][2][name]), (scope, name)
