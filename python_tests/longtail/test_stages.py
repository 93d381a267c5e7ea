"""Training in stages: transitions against plain torch, parameters that train, and interruptions."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastsam.cli.main import main
from fastsam.longtail import Checkpoint, Result, TrainConfig, Trainer, fit_stages, recipe
from fastsam.longtail.build import build_network
from fastsam.longtail.data import TensorImages
from fastsam.longtail.errors import CheckpointError, UsageError
from fastsam.longtail.losses import LOSSES, ClassStatistics
from fastsam.longtail.samplers import ClassSampler
from fastsam.longtail.stage_plan import plan_stages, stages_from
from fastsam.longtail.stages import STAGES, Stage, StageList, register_stages
from fastsam.longtail.start import Start, load_start
from fastsam.longtail.sweeps import stored_result, sweep
from fastsam.longtail.trainable import freeze
from fastsam.longtail.training import RunFolder, StageTrainer, Step, stage_trainers
from fastsam.stopping import Stopped, StopRequest
from python_tests.longtail.small_vit import VIT_BLOCKS, VIT_WIDTH, small_vit
from python_tests.longtail.test_interrupted import compared, stop_after
from python_tests.longtail.test_trainer import FEW

COUNTS = np.array([500, 100, 20])
LISTS = [name for name in STAGES.names() if name != "none"]


def staged(name: str, *stage_set: str, method: str = "ce", **settings: Any) -> TrainConfig:
    options = {"epochs": 1, "batch_size": 32, "lr": 0.05, "warmup_epochs": 0, **settings}
    return recipe("digits-lt", method, "sgd", stages=name, stage_set=stage_set, **options).config()


def crt(epochs: int = 2, **settings: Any) -> TrainConfig:
    return staged("crt", f"classifier.epochs={epochs}", **settings)


def fit(config: TrainConfig, out: Path | None = None, **options: Any) -> Result:
    if STAGES[config.stages].needs_weights:
        options["start"] = Start("given", build_network(config.replace(seed=7), 10, 1).state_dict())
    return fit_stages(config, data=FEW, out=out, progress=False, **options)


def weights(folder: Path) -> dict[str, Tensor]:
    return Checkpoint.load(folder).model


def same(one: dict[str, Tensor], other: dict[str, Tensor], prefix: str = "") -> bool:
    names = [name for name in one if name.startswith(prefix)]
    assert names
    return all(torch.equal(one[name], other[name]) for name in names)


# ---- one transition by hand ----


def test_a_transition_is_that_of_plain_torch(tmp_path: Path) -> None:
    steps: list[Step] = []

    def watch(one: StageTrainer) -> None:
        one.trainer.on_step = steps.append if one.last else None

    config = crt(2, augment=False)
    fit(config, tmp_path, on_stage=watch)
    stage = plan_stages(config)[1].config
    assert (stage.optimizer, stage.sampling, stage.lr_schedule) == ("sgd", "class-aware", "cosine")

    network = build_network(stage, 10, 1)  # the head of the seed
    before = weights(tmp_path / "stage-1")
    head = nn.Linear(64, 10)
    head.load_state_dict(network.head.state_dict())
    features = network.features
    features.load_state_dict(
        {k.removeprefix("features."): v for k, v in before.items() if k.startswith("features.")}
    )
    features.train().requires_grad_(requires_grad=False)
    optimizer = torch.optim.SGD(
        head.parameters(), lr=stage.lr, momentum=0.9, weight_decay=stage.weight_decay
    )
    train = FEW.train
    assert isinstance(train, TensorImages)
    sampler = ClassSampler(
        train.targets, FEW.counts, strategy="class-aware", epochs=2, seed=stage.seed
    )
    seen = iter(steps)
    for epoch in (1, 2):
        optimizer.param_groups[0]["lr"] = stage.lr * (1 + np.cos(np.pi * (epoch - 1) / 2)) / 2
        order = sampler.order(epoch)
        for chosen in np.array_split(order, range(32, len(order), 32)):
            step = next(seen)
            assert step.indices.tolist() == chosen.tolist()
            pixels = train.images[torch.from_numpy(chosen)] / train.white
            mean, std = (torch.tensor(x).reshape(1, -1, 1, 1) for x in (train.mean, train.std))
            images = (pixels - mean) / std
            loss = functional.cross_entropy(
                head(features(images)), torch.from_numpy(train.targets[chosen])
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    after = weights(tmp_path)
    torch.testing.assert_close(after["head.weight"], head.weight.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(after["head.bias"], head.bias.detach(), rtol=1e-4, atol=1e-6)
    assert same(dict(features.named_parameters(prefix="features")), after)
    for name, value in features.state_dict(prefix="features.").items():
        torch.testing.assert_close(after[name], value)


# ---- what trains ----

D, C, ALL = 64, 10, 464154
TRAINED = {
    "crt": (ALL, C * (D + 1)),
    "lws": (ALL, C),
    "mislas": (ALL, C * (D + 1) + C),
    "disalign": (ALL, 2 * C + D + 1),
    "decoupled-bs": (ALL, C * (D + 1)),
    "weight-balancing": (ALL, C * (D + 1)),
    "linear-probe": (C * (D + 1),),
    "fine-tuning": (C * (D + 1), ALL),
    "lift": (C * VIT_WIDTH + VIT_BLOCKS * (2 * VIT_WIDTH + 2 * VIT_WIDTH * 2 + 2 + VIT_WIDTH + 1),),
}


@pytest.mark.parametrize("name", LISTS)
def test_the_parameters_of_each_stage_are_those_of_its_method(name: str) -> None:
    found = []
    module = small_vit() if name == "lift" else None
    model = "resnet32" if module is None else "own:vit"
    for stage in plan_stages(recipe("cifar10-lt", "ce", "sgd", stages=name, model=model).config()):
        network = build_network(stage.config, C, 3, module=module)
        freeze(network, stage.config)
        found.append(sum(p.numel() for p in network.parameters() if p.requires_grad))
    assert tuple(found) == TRAINED[name]


OF_A_HUNDRED_CLASSES = {
    "crt": 6_500,
    "lws": 100,
    "mislas": 6_600,
    "disalign": 265,
    "decoupled-bs": 6_500,
    "weight-balancing": 6_500,
}
"""Parameters that the second stages of the official codes train with a ResNet-32 on CIFAR-100-LT."""


@pytest.mark.parametrize("name", OF_A_HUNDRED_CLASSES)
def test_the_parameters_with_a_hundred_classes(name: str) -> None:
    config = recipe("cifar100-lt", "ce", "sgd", stages=name, model="resnet32").config()
    found = []
    for stage in plan_stages(config):
        network = build_network(stage.config, 100, 3)
        freeze(network, stage.config)
        found.append(sum(p.numel() for p in network.parameters() if p.requires_grad))
    assert found == [ALL + 90 * (D + 1), OF_A_HUNDRED_CLASSES[name]]


def test_all_lists_have_an_oracle() -> None:
    assert TRAINED.keys() == set(LISTS)


SAME_HEAD = {"lws", "disalign"}


@pytest.mark.parametrize(
    "name",
    [
        one if one == "lws" else pytest.param(one, marks=pytest.mark.slow)
        for one in LISTS
        if one not in ("linear-probe", "lift")
    ],
)
def test_frozen_weights_keep_their_bits_and_statistics_move(name: str, tmp_path: Path) -> None:
    last = plan_stages(staged(name))[-1].name
    fit(staged(name, f"{last}.epochs=1"), tmp_path)
    before, after = weights(tmp_path / "stage-1"), weights(tmp_path)
    statistics = [key for key in before if "running_" in key]
    parameters = [key for key in before if key.startswith("features.") and "track" not in key]
    parameters = [key for key in parameters if key not in statistics]
    assert not any(torch.equal(before[key], after[key]) for key in statistics)
    assert all(torch.equal(before[key], after[key]) for key in parameters) is (
        name != "fine-tuning"
    )
    fresh = build_network(plan_stages(staged(name))[-1].config, 10, 1).state_dict()
    trained = {key for key in after if key.startswith("head.")}
    trained -= {f"head.linear.{key}" for key in ("weight", "bias") if name in SAME_HEAD}
    assert trained
    for key in trained:
        assert not torch.equal(after[key], fresh[key])
    for key in ("weight", "bias"):
        there = f"head.{'linear.' if f'head.linear.{key}' in after else ''}{key}"
        assert torch.equal(before[f"head.{key}"], after[there]) is (name in SAME_HEAD)


@pytest.mark.slow
def test_a_probe_keeps_the_statistics(tmp_path: Path) -> None:
    fit(staged("fine-tuning", "tuning.epochs=1"), tmp_path)
    before = weights(tmp_path / "stage-1")
    config = plan_stages(staged("fine-tuning"))[0].config
    given = build_network(config.replace(seed=7), 10, 1).state_dict()
    assert same(given, before, "features.")


def test_the_head_is_taken_over_with_its_logits(tmp_path: Path) -> None:
    fit(staged("crt", "classifier.epochs=1"), tmp_path)
    start = Start.load(tmp_path / "stage-1")
    images = torch.rand(5, 1, 8, 8)
    plain = build_network(plan_stages(crt())[0].config, 10, 1)
    load_start(plain, start, FEW.class_names)
    for name, factor in (("lws", 1.0), ("disalign", None)):
        config = plan_stages(staged(name))[1].config
        network = build_network(config, 10, 1)
        record = load_start(network, start, FEW.class_names, head=config.head)
        assert record["left_out"] == []
        expected = plain.eval()(images)
        if factor is None:  # (1 + confidence) z
            confidence = network.head.confidence(network.eval().features(images)).sigmoid()
            expected = (1 + confidence) * expected
        torch.testing.assert_close(network.eval()(images), expected)


# ---- interruptions ----


def test_stopped_in_any_stage_and_between_them_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    config = crt(2, method="ce-drw")
    expected = fit(config, tmp_path / "whole")
    out, messages, folders = tmp_path / "stopped", [], []
    for steps in (2, 1, 4, 1, 100):
        request, on_step = stop_after(steps)
        try:
            result = fit(config, out, resume="auto", stop=request, on_step=on_step)
        except Stopped as stop:
            messages.append(str(stop))
            folders.append((out / "checkpoint.pt").exists() or RunFolder(out).points() != [])
            continue
        break
    assert True in folders
    assert False in folders
    assert all(
        "stopped by SIGTERM after step" in text and "--resume auto" in text for text in messages
    )
    assert compared(result) == compared(expected)
    assert same(weights(tmp_path / "whole"), weights(out))
    assert same(weights(tmp_path / "whole" / "stage-1"), weights(out / "stage-1"))


def test_a_signal_between_two_stages_says_how_to_continue(tmp_path: Path) -> None:
    request = StopRequest()

    def at_end(one: StageTrainer) -> None:
        if not one.last:
            one.trainer.on_result = lambda result: setattr(request, "signal", "SIGTERM")

    with pytest.raises(Stopped, match=r"after stage representation; to continue, .*--resume auto"):
        fit(crt(), tmp_path, stop=request, on_stage=at_end)
    seen: list[str] = []
    fit(crt(), tmp_path, resume=True, on_stage=lambda one: seen.append(one.stage.name))
    assert seen == ["classifier"]
    # Where the first stage lay is no longer needed once the second has begun.
    seen.clear()
    RunFolder(tmp_path / "stage-1").prepare(overwrite=True)
    fit(crt(), tmp_path, resume="auto", on_stage=lambda one: seen.append(one.stage.name))
    assert seen == ["classifier"]


def test_a_run_in_stages_is_resumed_with_its_settings_only(tmp_path: Path) -> None:
    fit(crt(1), tmp_path)
    with pytest.raises(CheckpointError, match=r"epochs was 1, is now 2"):
        fit(crt(2), tmp_path, resume="auto")
    with pytest.raises(
        CheckpointError, match=r"stage representation in .*: lr was 0.05, is now 0.1"
    ):
        fit(crt(1, lr=0.1), tmp_path, resume="auto")
    with pytest.raises(UsageError, match="not empty; choose another --out or pass --resume"):
        fit(crt(1), tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        fit(crt(1), tmp_path / "new", resume=True)


@pytest.mark.slow
def test_overwriting_removes_the_earlier_stages(tmp_path: Path) -> None:
    fit(crt(1), tmp_path)
    first = weights(tmp_path / "stage-1")
    fit(crt(1, seed=1), tmp_path, overwrite=True)
    assert not same(first, weights(tmp_path / "stage-1"), "features.")
    assert "seed: 1" in (tmp_path / "run.yaml").read_text()
    Trainer(replace_stages(crt(1)), data=FEW, out=tmp_path, overwrite=True, progress=False).fit()
    assert not (tmp_path / "stages.json").exists()
    assert not (tmp_path / "stage-1").exists()


def replace_stages(config: TrainConfig) -> TrainConfig:
    values = config.flat()
    del values["stage_set"]
    return TrainConfig.create(**{**values, "stages": "none"})


def test_the_folder_is_locked_while_a_stage_is_trained(tmp_path: Path) -> None:
    stages = stage_trainers(crt(1), data=FEW, out=tmp_path, progress=False)
    next(stages)
    assert (tmp_path / ".fastsam-lock").exists()
    stages.close()
    assert not (tmp_path / ".fastsam-lock").exists()


# ---- one first stage for several lists ----


def test_a_finished_run_is_the_first_stage(tmp_path: Path) -> None:
    whole = fit(crt(1), tmp_path / "crt")
    given = fit(crt(1), tmp_path / "again", from_stage=tmp_path / "crt" / "stage-1")
    assert compared(given) == compared(whole)
    assert not (tmp_path / "again" / "stage-1").exists()
    assert given.start is not None
    assert given.start["name"] == str(tmp_path / "crt" / "stage-1")
    assert whole.start is not None
    assert given.start["sha256"] == whole.start["sha256"]
    assert given.start["config"] == Checkpoint.load(tmp_path / "crt" / "stage-1").config.as_dict()
    other = crt(1, lr=0.1)
    with pytest.raises(UsageError, match=r"has lr 0.05, but the first stage has 0.1.*--stage-set"):
        fit(other, tmp_path / "other", from_stage=tmp_path / "crt" / "stage-1")
    with pytest.raises(CheckpointError, match=r"its first stage is .*, not "):
        fit(crt(1), tmp_path / "again", resume="auto", from_stage=tmp_path / "other")
    fit(crt(1), tmp_path / "again", resume=True)  # the record names the run
    with pytest.raises(UsageError, match="--from-stage requires a list of several stages"):
        fit(replace_stages(crt(1)), from_stage=tmp_path / "crt" / "stage-1")


def test_the_cost_of_all_stages_adds_up() -> None:
    result = fit(crt(2))
    (first,) = result.earlier_stages
    assert first["name"] == "representation"
    steps = -(-len(FEW.train) // 32)
    assert (first["gradients"], result.gradients) == (steps, 2 * steps)
    assert result.total_gradients == 3 * steps


# ---- loss and sampler of the lists ----


def test_softmax_bce_is_the_binary_cross_entropy_of_the_softmax() -> None:
    logits = torch.randn(6, 3, dtype=torch.float64, generator=torch.manual_seed(0)) * 3
    targets = torch.tensor([0, 1, 2, 2, 1, 0])
    weight = torch.tensor([0.2, 0.8, 2.0], dtype=torch.float64)
    loss = LOSSES["softmax-bce"].build(None, ClassStatistics(COUNTS, weight))
    mine, theirs = (logits.clone().requires_grad_() for _ in range(2))
    found = loss(mine, targets)
    expected = functional.binary_cross_entropy(
        theirs.softmax(dim=1),
        functional.one_hot(targets, 3).double(),
        weight=weight[targets][:, None].expand(6, 3),
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, mine)[0], torch.autograd.grad(expected, theirs)[0]
    )


def test_class_aware_sampling_takes_four_images_of_each_class_in_turn() -> None:
    targets = np.repeat([0, 1, 2], [50, 3, 7])
    sampler = ClassSampler(targets, np.bincount(targets), strategy="class-aware", seed=3)
    order = sampler.order(2)
    assert len(order) == 60
    visits = targets[order].reshape(-1, 4)
    assert (visits == visits[:, :1]).all()
    assert all(sorted(cycle) == [0, 1, 2] for cycle in visits[:, 0].reshape(-1, 3))
    for label, count in ((0, 50), (1, 3), (2, 7)):
        drawn = order[targets[order] == label]
        for begin in range(0, len(drawn) - count, count):  # every image once before any again
            assert len(set(drawn[begin : begin + count])) == count
    assert order.tolist() != sampler.order(3).tolist()
    assert order.tolist() == sampler.order(2).tolist()


# ---- plans and bad input ----


def test_a_stage_has_the_settings_of_the_run_unless_its_list_sets_them() -> None:
    config = recipe(
        "digits-lt", "ldam-drw", "sam", stages="crt", rho=0.1, batch_size=64, weight_decay=1e-3,
        lr_milestones=(50, 60), ema=0.9, stage_set=("classifier.nesterov=True",),
    ).config()  # fmt: skip
    first, last = (stage.config for stage in plan_stages(config))
    assert first == TrainConfig.create(
        **{**{k: v for k, v in config.flat().items() if k != "stage_set"}, "stages": "none"}
    )
    assert (last.method, last.optimizer, last.head, last.epochs) == ("ce-rs", "sgd", "linear", 10)
    assert (last.batch_size, last.weight_decay, last.ema) == (64, 1e-3, 0.9)
    assert (last.nesterov, last.rho, last.stages) == (True, None, "crt")


def test_options_replace_what_a_list_sets_in_the_first_stage() -> None:
    mixed = recipe("cifar10-lt", "ce", "sgd", stages="mislas")
    assert mixed.config().mixer == "mixup"
    assert "Zhong et al. 2021" in mixed.sources["mixer"]
    plain = recipe("cifar10-lt", "ce", "sgd", stages="mislas", mixer="none", epochs=20).config()
    assert (plain.mixer, plain.epochs, plain.lr_milestones) == ("none", 20, (16, 18))
    last = plan_stages(plain)[1]
    assert (last.config.las_head, last.config.lr_scale) == (0.3, ("head.linear.*=0.5",))
    assert last.config.batch_norm == "frozen"
    assert "not a published value" not in last.sources["las_head"]
    other = plan_stages(recipe("digits-lt", "ce", "sgd", stages="mislas").config())[1]
    assert other.sources["las_head"].endswith("(not a published value)")


def test_a_later_stage_does_not_have_what_the_list_gives_to_the_first() -> None:
    found = [{"name": "a", "weight_decay": 0.01}, {"name": "b"}, {"name": "c", "epochs": 10}]
    name = register_stages(stages_from("decay.yaml", found)).name

    def decays(**settings: Any) -> list[float]:
        chosen = recipe("digits-lt", "ce", "sgd", stages=name, **settings)
        plan = plan_stages(chosen.config(), chosen.sources)
        assert [stage.config.lr_milestones for stage in plan] == [(80, 90), (80, 90), (8, 9)]
        return [stage.config.weight_decay for stage in plan]

    assert decays() == [0.01, 5e-4, 5e-4]
    assert decays(weight_decay=0.02) == [0.02, 0.02, 0.02]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": "crd"}, "unknown stages 'crd', did you mean 'crt'"),
        ({"stages": "crt", "stage_set": ("classifier.lr",)}, "must be STAGE.SETTING=VALUE"),
        ({"stages": "crt", "stage_set": ("clasifier.lr=1",)}, "did you mean 'classifier'"),
        ({"stages": "crt", "stage_set": ("classifier.rl=1",)}, "unknown setting 'rl'"),
        ({"stages": "crt", "stage_set": ("classifier.lr=x",)}, "lr must be a number, got 'x'"),
        ({"stages": "crt", "stage_set": ("classifier.lr=-1",)}, "stage classifier of crt: lr must"),
        ({"stages": "crt", "stage_set": ("classifier.rho=1",)}, "rho requires optimizer"),
        ({"stages": "crt", "stage_set": ("classifier.seed=1",)}, "same in all stages"),
        ({"stages": "crt", "stage_set": ("classifier.lr=1", "classifier.lr=2")}, "twice"),
        ({"stage_set": ("classifier.lr=1",)}, "stage_set requires stages"),
        ({"stages": "own:gone"}, "are unknown here; pass the --config file"),
    ],
)
def test_a_wrong_setting_of_a_stage_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_stages(recipe("digits-lt", "ce", "sgd", **settings).config())


def test_a_head_that_cannot_be_taken_over_is_refused() -> None:
    config = recipe("digits-lt", "ldam", "sgd", stages="lws").config()
    with pytest.raises(UsageError, match="its head lws cannot take over the head cosine"):
        plan_stages(config)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([], "stages must be the name of a list"),
        ([3], "stages must be the name of a list"),
        ([{"epochs": 1}], "stage 1 needs a name"),
        ([{"name": "a"}, {"name": "a"}], "two stages have this name"),
        ([{"name": "a"}, {"name": "b", "start": "c"}], "unknown stage 'c'"),
        ([{"name": "a"}, {"name": "b", "start": "c"}, {"name": "c"}], "not trained before it"),
        ([{"name": "a", "start": "a"}], "not trained before it"),
        ([{"name": "a"}, {"name": "b", "epoch": 1}], "stage 'b': unknown setting 'epoch'"),
        ([{"name": "a"}, {"name": "b", "epochs": "x"}], "epochs must be a whole number, got 'x'"),
        ([{"name": "a", "method": "ce"}, {"name": "b"}], "first stage has the method of the run"),
    ],
)
def test_a_wrong_list_is_refused(found: Any, message: str) -> None:
    with pytest.raises(UsageError, match=rf"plan\.yaml: .*{message}"):
        stages_from("plan.yaml", found)


@pytest.mark.slow
def test_a_stage_starts_from_the_one_that_it_names(tmp_path: Path) -> None:
    register_stages(
        StageList(
            name="own:fork",
            module=__name__,
            summary="two heads on one network",
            stages=(
                Stage(name="a"),
                Stage(name="b", settings=STAGES["crt"].stages[1].settings),
                Stage(name="c", settings=STAGES["lws"].stages[1].settings, start="a"),
            ),
        )
    )
    result = fit(staged("own:fork", "b.epochs=1", "c.epochs=1"), tmp_path)
    assert [stage["name"] for stage in result.earlier_stages] == ["a"]
    first, last = weights(tmp_path / "stage-1"), weights(tmp_path)
    assert torch.equal(first["head.weight"], last["head.linear.weight"])
    assert same(
        {
            k: v
            for k, v in first.items()
            if k.startswith("features.") and "ing_" not in k and "num_" not in k
        },
        last,
    )


# ---- commands ----

TRAIN = ["train", "--data", "digits-lt", "--method", "ce", "--optimizer", "sgd", "--quiet"]
SHORT = [*TRAIN, "--epochs", "1", "--stages", "crt", "--stage-set", "classifier.epochs=1"]


@pytest.mark.slow
def test_the_command_trains_stages_and_other_commands_use_the_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    assert main([*SHORT, "--out", out]) == 0
    printed = capsys.readouterr().out
    assert printed.index("stage representation:") < printed.index("stage classifier:")
    assert main([*SHORT, "--out", out, "--resume", "auto"]) == 0
    assert "representation" not in capsys.readouterr().out
    assert main(["train", "--resume", "--out", out, "--quiet"]) == 0
    assert "representation" not in capsys.readouterr().out
    assert main(["evaluate", out]) == 0
    assert main(["report", out]) == 0
    assert main(["export", out, "--out", str(tmp_path / "network.pt2")]) == 0
    again = str(tmp_path / "again")
    assert main(["train", "--config", f"{out}/run.yaml", "--quiet", "--out", again]) == 0
    assert same(weights(Path(out)), weights(Path(again)))
    lws = [*SHORT, "--stages", "lws", "--from-stage", f"{out}/stage-1"]
    assert main([*lws, "--out", str(tmp_path / "lws")]) == 0
    assert main(["train", "--resume", "--out", str(tmp_path / "lws"), "--quiet"]) == 0


@pytest.mark.slow
def test_a_list_in_a_file_is_trained_and_repeated_from_run_yaml(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(
        "data: digits-lt\nmethod: ce\noptimizer: sgd\nepochs: 1\nstages:\n"
        "  - name: all\n  - {name: head, method: ce-rs, freeze: ['features.*'], epochs: 1}\n"
    )
    out = tmp_path / "run"
    assert main(["train", "--config", str(file), "--out", str(out), "--quiet"]) == 0
    assert "stages: [{name: all}, {name: head," in (out / "run.yaml").read_text()
    again = tmp_path / "again"
    assert main(["train", "--config", f"{out}/run.yaml", "--out", str(again), "--quiet"]) == 0
    assert same(weights(out), weights(again))
    assert main(["train", "--resume", "--out", str(out), "--quiet"]) == 0
    file.write_text(file.read_text().replace("freeze", "freze"))
    capsys.readouterr()
    assert main(["train", "--config", str(file), "--out", str(again), "--quiet"]) == 2
    assert "stage 'head': unknown setting 'freze'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_trains_stages(tmp_path: Path) -> None:
    fixed = {"data": "digits-lt", "method": "ce", "optimizer": "sgd", "epochs": 1}
    fixed["stage_set"] = ("classifier.epochs=1",)
    grid = {"stages": ("none", "crt", "lws")}
    outcomes = sweep(tmp_path, grid=grid, **fixed)
    found = {one.run.name: one for one in outcomes}
    assert found.keys() == {"stages=none/seed-0", "stages=crt/seed-0", "stages=lws/seed-0"}
    assert all(one.state == "finished" for one in outcomes)
    crt_run = found["stages=crt/seed-0"]
    assert crt_run.result is not None
    assert crt_run.result.config["method"] == "ce-rs"
    assert stored_result(crt_run.run, tmp_path) is not None
    assert not any(one.trained for one in sweep(tmp_path, grid=grid, **fixed))


KILLED = [
    *TRAIN, "--epochs", "2", "--stages", "crt", "--stage-set", "classifier.epochs=12",
    *("--resume", "auto", "--checkpoint-steps", "4", "--threads", "1"),
]  # fmt: skip


def begin(out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fastsam", *KILLED, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def finish(out: Path) -> int:
    process = begin(out)
    process.communicate(timeout=300)
    return process.returncode


def interrupt(process: subprocess.Popen[str], when: Callable[[], bool], number: int) -> str:
    """Send a signal to a run as soon as a condition holds, and return what it said."""
    while process.poll() is None and not when():
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()[1]
    process.send_signal(number)
    return process.communicate(timeout=120)[1]


@pytest.mark.slow
def test_killed_between_stages_and_in_the_second_it_ends_with_the_same_bits(
    tmp_path: Path,
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert finish(whole) == 0
    first, folder = RunFolder(out / "stage-1"), RunFolder(out)
    process = begin(out)
    said = interrupt(process, lambda: bool(first.points()), signal.SIGTERM)
    assert process.returncode == 75
    assert "--resume auto" in said
    interrupt(begin(out), first.result.is_file, signal.SIGKILL)
    process = begin(out)
    said = interrupt(process, lambda: bool(folder.points()), signal.SIGTERM)
    assert process.returncode == 75
    assert "--resume auto" in said
    seen = folder.points()[0]
    interrupt(begin(out), lambda: folder.points()[:1] != [seen], signal.SIGKILL)
    assert finish(out) == 0
    for name in (".", "stage-1"):
        assert same(weights(whole / name), weights(out / name))
    assert compared(Result.load(whole / "result.json")) == compared(
        Result.load(out / "result.json")
    )
