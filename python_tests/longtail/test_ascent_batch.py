"""Ascents on a sample of the batch: sampling, passes over the whole batch, and settings without effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastsam.distributed import World
from fastsam.longtail import Checkpoint, TrainConfig, Trainer, recipe
from fastsam.longtail.build import build_class_weights, build_network, build_optimizer
from fastsam.longtail.data import Batch, load_digits_lt
from fastsam.longtail.errors import UsageError
from fastsam.longtail.models import Classifier
from fastsam.longtail.results import Result
from fastsam.longtail.training import Branch, Step, Stepper
from fastsam.longtail.training.ascent_batch import AscentBatches, check_ascent_share

DIGITS = load_digits_lt()
SHORT = {"epochs": 4, "batch_size": 100, "lr": 0.05, "warmup_epochs": 0, "lr_milestones": (2, 3)}
STEPS = 3  # batches per epoch: 276 images, 76 in the last batch


def config_for(optimizer: str, method: str = "ce", **settings: Any) -> TrainConfig:
    return recipe("digits-lt", method, optimizer, **{**SHORT, **settings}).config()


def trained(config: TrainConfig, out: Path | None = None, **options: Any) -> Result:
    return Trainer(config, data=DIGITS, out=out, progress=False, **options).fit()


def ascent_of(config: TrainConfig) -> AscentBatches:
    found = Trainer(config, data=DIGITS, progress=False).stepper.ascent
    assert found is not None
    return found


def batch(size: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, 1, 8, 8, generator=generator)
    targets = torch.randint(10, (size,), generator=generator)
    return Batch((inputs,), targets, torch.arange(size))


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


class Seen:
    """Record the images of every pass of a network."""

    def __init__(self, network: nn.Module) -> None:
        self.inputs: list[Tensor] = []
        convolution = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
        convolution.register_forward_pre_hook(lambda _, inputs: self.inputs.append(inputs[0]))


def steppers(config: TrainConfig) -> tuple[Stepper, Seen]:
    run = Trainer(config, data=DIGITS, progress=False)
    run.model.train()
    return run.stepper, Seen(run.model)


# --- passes of a step ----------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sam", "asam", "looksam"])
@pytest.mark.parametrize("sample", ["uniform", "weighted"])
@pytest.mark.usefixtures("one_thread")
def test_the_ascent_reads_a_sample_and_the_update_the_whole_batch(
    optimizer: str, sample: str, seed: int
) -> None:
    """Compare with autograd: ascend along the gradient of the sample, descend along that of the batch."""
    config = config_for(
        optimizer, "ce-rw", rho=0.1, ascent_share=0.25, ascent_sample=sample, momentum=0.0
    )
    run, passes = steppers(config)
    reference = build_network(config, 10, 1).train()
    data = batch(40, seed)
    (seen,) = next(run.steps([data], epoch=1))
    assert [len(inputs) for inputs in passes.inputs] == [10, 40]
    assert torch.equal(passes.inputs[1], data.inputs)
    equal = (passes.inputs[0][:, None] == data.inputs).flatten(2).all(dim=2)
    rows = equal.int().argmax(dim=1)
    assert bool(equal.any(dim=1).all())
    assert (len(rows.unique()) == 10) or sample == "weighted"

    weight = build_class_weights(config, DIGITS.counts)(1).float()
    found = functional.cross_entropy(
        reference(data.inputs[rows]),
        data.targets[rows],
        weight=None if sample == "weighted" else weight,
    )
    parameters = list(reference.parameters())
    slope = torch.autograd.grad(found, parameters)
    before = [p.detach().clone() for p in parameters]
    climb(config, reference, list(slope))
    fresh = build_network(config, 10, 1)
    copy_parameters(fresh, reference)
    top = functional.cross_entropy(fresh.train()(data.inputs), data.targets, weight=weight)
    gradients = torch.autograd.grad(top, list(fresh.parameters()))
    lr, decay = config.lr, config.weight_decay
    for p, w, g in zip(run.network.parameters(), before, gradients, strict=True):
        assert torch.allclose(p, w - lr * (g + decay * w), rtol=1e-4, atol=1e-6)
    # Reported values and running statistics come from the whole batch at the perturbed weights.
    assert seen.loss.item() == pytest.approx(top.item(), rel=1e-4)
    assert torch.equal(seen.indices, data.indices)
    assert len(seen.logits) == 40
    for (name, value), other in zip(run.network.named_buffers(), fresh.buffers(), strict=True):
        assert torch.allclose(value, other, rtol=1e-4, atol=1e-6), name
    assert run.gradients == 1.25


def climb(config: TrainConfig, network: Classifier, slope: list[Tensor]) -> None:
    """Move w to ``w + rho T^2 g / ||T g||``; T is 1, or ``|w| + 0.01`` for weights with ASAM."""
    named = list(network.named_parameters())
    scales = [
        p.detach().abs() + 0.01
        if config.optimizer == "asam" and "weight" in name
        else torch.ones_like(p)
        for name, p in named
    ]
    norm = torch.stack([(t * g).norm() for t, g in zip(scales, slope, strict=True)]).norm()
    with torch.no_grad():
        for (_, p), t, g in zip(named, scales, slope, strict=True):
            p.add_(t * t * g * (config.rho[0] / norm))


def copy_parameters(to: nn.Module, source: nn.Module) -> None:
    with torch.no_grad():
        for p, q in zip(to.parameters(), source.parameters(), strict=True):
            p.copy_(q)


def test_steps_without_an_ascent_read_whole_batches_only() -> None:
    run, passes = steppers(config_for("looksam", look_every=2, ascent_share=0.5))
    data = batch(30, 1)
    list(run.steps([data] * 4, epoch=1))
    assert [len(inputs) for inputs in passes.inputs] == [15, 30, 30, 15, 30, 30]
    assert run.gradients == 2 * 1.5 + 2


@pytest.mark.slow
def test_costs_of_a_run_count_the_share(tmp_path: Path) -> None:
    def costs(**settings: Any) -> list[float | None]:
        result = trained(config_for("sam", **settings))
        return [record.gradients for record in result.history]

    assert costs(ascent_share=0.5) == [1.5 * STEPS] * 4
    assert costs(ascent_share=0.25, ascent_start=2, ascent_interval=2) == [3, 3, 3.5, 3.25]
    weighted = {"method": "ce-rw", "ascent_sample": "weighted"}
    assert costs(**weighted) == [2 * STEPS] * 4
    sgd, late = tmp_path / "sgd", tmp_path / "late"
    trained(config_for("sgd"), sgd, keep=(2,))
    trained(config_for("sam", ascent_start=2, ascent_share=0.5), late, keep=(2, 3))
    weights = [Checkpoint.load(folder / "epoch-2.pt").model for folder in (sgd, late)]
    assert same(*weights)


def test_the_whole_batch_sampled_uniformly_is_no_sample() -> None:
    run = Trainer(config_for("sam", ascent_share=1), data=DIGITS, progress=False)
    assert run.stepper.ascent is None
    assert Trainer(config_for("sgd"), data=DIGITS, progress=False).stepper.ascent is None


def test_a_skipped_step_leaves_the_statistics_although_the_sample_was_finite(seed: int) -> None:
    run, passes = steppers(config_for("sam", ascent_share=0.1))
    data = batch(40, seed)
    sampled = ascent_of(config_for("sam", ascent_share=0.1)).sample(data, epoch=1, number=0)
    outside = next(i for i in range(40) if i not in sampled.batch.indices)
    data.inputs[outside] = float("nan")
    before = {name: value.clone() for name, value in run.network.state_dict().items()}
    list(run.steps([data], epoch=1))
    assert bool(passes.inputs[0].isfinite().all())
    assert run.skipped_steps == 1
    assert same(before, run.network.state_dict())


def test_a_momentum_encoder_sees_each_batch_once() -> None:
    run = Trainer(
        config_for("sam", "paco", ascent_share=0.5, epochs=2, lr_milestones=(1, 2)),
        data=DIGITS,
        progress=False,
    )
    run.fit()
    norms = {
        name: int(value)
        for name, value in run.model.state_dict().items()
        if name.endswith("num_batches_tracked")
    }
    assert any(name.startswith("key_encoder") for name in norms)
    assert set(norms.values()) == {2 * STEPS}


# --- runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", ["uniform", "weighted"])
def test_a_run_that_is_cut_resumes_to_the_same_bits(
    sample: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastsam.longtail.training.saving.EPOCH_SECONDS", 0.0)
    config = config_for("sam", "ce-drw", defer_epoch=2, ascent_share=0.4, ascent_sample=sample)
    whole = trained(config, tmp_path / "whole")

    def stop(step: Step) -> None:
        if (step.epoch, step.batch) == (3, 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(config, tmp_path / "cut", on_step=stop)
    result = trained(config, tmp_path / "cut", resume=True)
    assert same(Checkpoint.load(tmp_path / "cut").model, Checkpoint.load(tmp_path / "whole").model)
    assert [r.loss for r in result.history] == [r.loss for r in whole.history]
    other = config.replace(ascent_sample="uniform", ascent_share=0.5)
    trained(other, tmp_path / "other")
    assert not same(
        Checkpoint.load(tmp_path / "other").model, Checkpoint.load(tmp_path / "whole").model
    )


def test_a_branch_may_change_share_and_sampling(tmp_path: Path) -> None:
    settings = {"defer_epoch": 2, "ascent_start": 2}
    trained(config_for("sam", "ce-drw", **settings), tmp_path / "run", keep=(2,))
    branch = Branch.load(tmp_path / "run", 2)
    changed, _ = branch.settings(ascent_share=0.5, ascent_sample="weighted")
    trained(changed, tmp_path / "branch", branch=branch)
    late = {"ascent_share": 0.5, "ascent_sample": "weighted", **settings}
    trained(config_for("sam", "ce-drw", **late), tmp_path / "late")
    found = [Checkpoint.load(tmp_path / name).model for name in ("branch", "late")]
    assert same(*found)


def test_local_and_global_are_the_same_in_one_process() -> None:
    for optimizer in ("sam", "looksam"):
        runs = [
            Trainer(
                config_for(optimizer, epochs=2, lr_milestones=(1, 2), ascent_scope=scope),
                data=DIGITS,
                progress=False,
            )
            for scope in ("global", "local")
        ]
        for run in runs:
            run.fit()
        assert same(runs[0].model.state_dict(), runs[1].model.state_dict())


def test_the_optimizer_is_given_the_processes_only_for_a_local_ascent() -> None:
    """A single process never uses the process group, so any object can stand in for it."""
    for optimizer in ("sam", "asam", "looksam"):
        for scope in ("global", "local"):
            config = config_for(optimizer, ascent_scope=scope)
            group: Any = object()
            made: Any = build_optimizer(
                config, build_network(config, 10, 1), steps_per_epoch=3, process_group=group
            )
            found = getattr(made, "sam", made).process_group
            assert found is (group if scope == "local" else None)


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("ce", {"ascent_share": 0}, "ascent_share must be above 0 and at most 1, got 0"),
        ("ce", {"ascent_share": 1.5}, "ascent_share must be above 0 and at most 1"),
        ("ce", {"ascent_sample": "rare"}, "unknown ascent_sample 'rare'; valid: uniform, weighted"),
        ("ce", {"ascent_sample": "weighted"}, "method ce has none; .* rw or drw"),
        ("ib", {"ascent_sample": "weighted", "defer_epoch": 2}, "method ib has none"),
        ("ce-rs", {"ascent_sample": "weighted"}, "method ce-rs has none"),
        ("ce", {"ascent_scope": "node"}, "unknown ascent_scope 'node'; valid: global, local"),
    ],
)
def test_invalid_settings_are_rejected(method: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config_for("sam", method, **settings)


@pytest.mark.parametrize("optimizer", ["sgd", "lpf-sgd", "entropy-sgd", "pgd"])
@pytest.mark.parametrize("name", ["ascent_share", "ascent_sample", "ascent_scope"])
def test_other_optimizers_have_no_sample(optimizer: str, name: str) -> None:
    value = {"ascent_share": 0.5, "ascent_sample": "uniform", "ascent_scope": "local"}[name]
    with pytest.raises(UsageError, match=f"{name} requires optimizer asam, looksam, sam"):
        config_for(optimizer, **{name: value})


def test_a_share_of_one_image_is_refused_before_data_are_read() -> None:
    config = config_for("sam", batch_size=40, ascent_share=0.03)
    message = r"ascent_share 0.03 selects 1 of 40 images .* at least 0.05 or raise batch_size"
    with pytest.raises(UsageError, match=message):
        Trainer(config, progress=False)
    check_ascent_share(config.replace(ascent_share=0.05), World())
    with pytest.raises(UsageError, match="selects 1 of 20 images"):
        check_ascent_share(config.replace(ascent_share=0.05), World(0, 2))


def test_runs_of_older_versions_ascend_on_whole_batches() -> None:
    config = config_for("sam")
    new = ("ascent_share", "ascent_sample", "ascent_scope", "format")
    older = {name: value for name, value in config.as_dict().items() if name not in new}
    assert TrainConfig.from_dict(older) == config
    assert (config.ascent_share, config.ascent_sample, config.ascent_scope) == (
        1,
        "uniform",
        "global",
    )
