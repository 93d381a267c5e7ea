"""Runs in stages: what is refused early, what a folder keeps, and what a resumed run compares."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsam.cli.main import main
from fastsam.cli.resume import stored_run
from fastsam.distributed import World
from fastsam.longtail import Checkpoint, TrainConfig, Trainer, recipe
from fastsam.longtail.build import build_network
from fastsam.longtail.errors import CheckpointError, UsageError
from fastsam.longtail.norms import NormLimits
from fastsam.longtail.stage_plan import plan_stages, stages_from
from fastsam.longtail.stages import STAGES, register_stages
from fastsam.longtail.sweeps.plan import PlannedRun
from fastsam.longtail.sweeps.training import stored_result
from fastsam.longtail.training import Branch, RunFolder, StageRecord, StageTrainer, fit_stages
from fastsam.longtail.training.beginning import _report
from fastsam.stopping import Stopped, StopRequest
from python_tests.longtail.test_interrupted import stop_after
from python_tests.longtail.test_stages import crt, fit, same, staged, weights
from python_tests.longtail.test_trainer import FEW


class TrainedError(Exception):
    """Raised instead of training."""


def begin(config: TrainConfig, out: Path | None = None, **options: Any) -> None:
    """Set up a run up to its first step."""

    def refuse(one: StageTrainer) -> None:
        raise TrainedError(one.stage.name)

    fit(config, out, on_stage=refuse, **options)


# ---- refused before the first stage is trained ----


@pytest.mark.parametrize(
    ("stage_set", "message"),
    [
        ("freeze=nothing.*", "stage classifier: freeze pattern 'nothing.*' matches no parameter"),
        ("lr_scale=nothing.*=0.1", "lr_scale pattern 'nothing.*' matches no parameter"),
        ("no_decay=nothing.*", "no_decay pattern 'nothing.*' matches no parameter"),
        ("max_norm=nothing.*=1", "max_norm pattern 'nothing.*' matches no parameter"),
        ("head_from=gone.npy", "gone.npy"),
        ("select=best-validation", "requires a validation set"),
        ("accumulate=20", "stage classifier: batch_size must be at least 40"),
        ("sync_batch_norm=True", "sync_batch_norm requires a CUDA device"),
        ("model=resnet20", "model is the same in all stages"),
        ("device=cuda", "device is the same in all stages"),
        ("keep_last=3", "keep_last is the same in all stages"),
        ("tf32=True", "stage classifier: tf32 requires an NVIDIA GPU"),
        ("compile=True", r"stage classifier: compile requires a C\+\+ compiler"),
        ("curvature_classes=foo", "stage classifier: unknown class in curvature_classes 'foo'"),
        ("curvature_classes=", "stage classifier: curvature_classes is empty"),
    ],
)
def test_a_setting_of_a_later_stage_is_refused_before_the_first(
    stage_set: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    measured = ("classifier.track_curvature=5",) if "curvature" in stage_set else ()
    with pytest.raises(UsageError, match=message):
        begin(staged("crt", f"classifier.{stage_set}", *measured))


def test_limits_of_norms_are_refused_for_sharded_weights_before_the_first_stage() -> None:
    with pytest.raises(UsageError, match="max_norm requires whole weights"):
        begin(staged("crt", "classifier.max_norm=head.weight=1", parallel="fsdp2"))


def test_blocks_to_recompute_are_looked_for_before_the_first_stage() -> None:
    config = staged("crt", "classifier.checkpoint_activations=True", model="own:flat")
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 8))
    with pytest.raises(UsageError, match="stage classifier: checkpoint_activations requires"):
        begin(config, model=module)


def test_a_trainer_refuses_several_stages() -> None:
    with pytest.raises(UsageError, match=r"stages is crt, .* call fastsam.longtail.fit_stages"):
        Trainer(crt(1), data=FEW, progress=False)


def test_lists_for_pretrained_networks_require_weights() -> None:
    for name in ("linear-probe", "fine-tuning", "lift"):
        with pytest.raises(UsageError, match=f"stages {name} .* random weights; pass --init FILE"):
            fit_stages(staged(name), data=FEW, progress=False)


def test_double_balances_of_all_stages_are_reported_once_before_training() -> None:
    config = staged("crt", "classifier.method=bs", posthoc_tau=1.0)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(TrainedError):
            begin(config)
    assert ["balanced 2 times: loss bs" in str(one.message) for one in seen] == [True]


# ---- what is removed ----


def test_overwriting_does_not_remove_the_first_stage(tmp_path: Path) -> None:
    for place in (tmp_path / "stage-1", tmp_path):
        with pytest.raises(UsageError, match=r"--from-stage .* is in --out"):
            begin(crt(1), tmp_path, from_stage=place, overwrite=True)


def test_overwriting_compares_the_data_before_it_removes_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, out = tmp_path / "first", tmp_path / "out"
    Trainer(plan_stages(crt(1))[0].config, data=FEW, out=first, progress=False).fit()
    out.mkdir()
    (out / "result.json").write_text("of an earlier run")

    def changed(*_: object, **__: object) -> None:
        raise CheckpointError("the images have changed")

    monkeypatch.setattr(Checkpoint, "check_data", changed)
    with pytest.raises(CheckpointError, match="have changed"):
        begin(crt(1), out, from_stage=first, overwrite=True)
    assert (out / "result.json").exists()


def test_only_folders_of_stages_are_removed(tmp_path: Path) -> None:
    def files(*names: str) -> None:
        for name in names:
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "result.json").write_text("{}")

    files("stage-1", "stage-left")
    RunFolder(tmp_path).prepare(overwrite=True)
    assert (tmp_path / "stage-1/result.json").exists()  # it is no stage of a run
    (tmp_path / "stages.json").write_text("{}")
    RunFolder(tmp_path).prepare(overwrite=True)
    assert not (tmp_path / "stage-1").exists()
    assert (tmp_path / "stage-left/result.json").exists()


# ---- interruptions ----


@pytest.mark.slow
def test_the_marker_of_a_stopped_run_is_in_its_folder(tmp_path: Path) -> None:
    marker = RunFolder(tmp_path).stopped
    request, on_step = stop_after(1)
    with pytest.raises(Stopped):
        fit(crt(1), tmp_path, stop=request, on_step=on_step)
    assert marker.exists()
    with pytest.raises(TrainedError):
        begin(crt(1), tmp_path, resume="auto")
    assert not marker.exists()
    request = StopRequest()

    def at_end(one: StageTrainer) -> None:
        one.trainer.on_result = lambda result: setattr(request, "signal", "SIGTERM")

    with pytest.raises(Stopped, match="after stage representation"):
        fit(crt(1), tmp_path, resume="auto", stop=request, on_stage=at_end)
    assert marker.exists()
    fit(crt(1), tmp_path, resume="auto")
    assert not marker.exists()


class OtherStops(World):
    """A world in which a signal has reached another rank only."""

    def all_gather(self, value: Any) -> list[Any]:
        return [value, "SIGTERM"] if value is None else [value]


def test_a_signal_to_another_rank_stops_between_two_stages(tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="a signal to another process after stage representation"):
        fit(crt(1), tmp_path, world=OtherStops())
    assert RunFolder(tmp_path).stopped.exists()


def finished_first(out: Path, config: TrainConfig, **options: Any) -> None:
    """Train the first stage of a run only."""

    def before_last(one: StageTrainer) -> None:
        if one.last:
            raise TrainedError

    with pytest.raises(TrainedError):
        fit(config, out, on_stage=before_last, **options)


@pytest.mark.slow
def test_a_changed_stage_that_has_not_begun_is_recorded(tmp_path: Path) -> None:
    finished_first(tmp_path, crt(1), keep=(1,))
    assert "keep: [1]" in (tmp_path / "run.yaml").read_text()
    fit(crt(2), tmp_path, resume="auto")
    assert "classifier.epochs=2" in (tmp_path / "run.yaml").read_text()
    assert "keep: [1]" in (tmp_path / "run.yaml").read_text()
    record = StageRecord.read(tmp_path)
    assert record is not None
    assert record.config.stage_set == ("classifier.epochs=2",)
    with pytest.raises(CheckpointError, match=r"classifier in .*epochs was 2, is now 3"):
        begin(crt(3), tmp_path, resume="auto")
    with pytest.raises(CheckpointError, match="no checkpoint of epoch 2, which --keep requires"):
        begin(crt(2), tmp_path, resume="auto", keep=(2,))
    # A sweep finds what it keeps in the first stage.
    run = PlannedRun(".", crt(2), needs=("epoch-1.pt",))
    assert stored_result(run, tmp_path) is not None
    assert stored_result(PlannedRun(".", crt(2), needs=("epoch-2.pt",)), tmp_path) is None


@pytest.mark.slow
def test_the_folder_of_a_given_stage_is_read_only_when_it_is_needed(tmp_path: Path) -> None:
    first, out = tmp_path / "first", tmp_path / "out"
    Trainer(plan_stages(crt(2))[0].config, data=FEW, out=first, progress=False).fit()
    with pytest.raises(UsageError, match="--keep keeps epochs of the first stage"):
        begin(crt(2), out, from_stage=first, keep=(1,))
    request, on_step = stop_after(2)
    with pytest.raises(Stopped):
        fit(crt(2), out, from_stage=first, stop=request, on_step=on_step)
    first.rename(tmp_path / "moved")
    fit(crt(2), out, resume=True)
    assert RunFolder(out).result.is_file()


def listed(name: str, *stages: dict[str, Any]) -> str:
    return register_stages(stages_from(f"{name}.yaml", list(stages))).name


def test_an_edited_list_is_not_dropped(tmp_path: Path) -> None:
    head = {"name": "head", "freeze": ["features.*"], "epochs": 1}
    name = listed("edited", {"name": "all"}, head)
    finished_first(tmp_path, staged(name))
    listed("edited", {"name": "all", "weight_decay": 0.01}, head)
    with pytest.raises(CheckpointError, match="the first stage in the list has other settings"):
        begin(staged(name), tmp_path, resume="auto")
    listed("edited", {"name": "all"}, {**head, "epochs": 2})
    stored_run("auto", tmp_path, stages=name)
    assert STAGES[name].stages[1].settings["epochs"].value == 2  # a command with the file keeps it
    with pytest.raises(TrainedError, match="head"):
        begin(staged(name), tmp_path, resume="auto")
    assert json.loads((tmp_path / "stages.json").read_text())["list"][1]["epochs"] == 2
    assert "epochs: 2}" in (tmp_path / "run.yaml").read_text()
    stored_run(True, tmp_path)
    assert STAGES[name].stages[1].settings["epochs"].value == 2
    listed("edited", {"name": "all"})
    with pytest.raises(CheckpointError, match=r"its stage in .*stage-1 is not in the list"):
        begin(staged(name), tmp_path, resume="auto")


@pytest.mark.slow
def test_without_a_record_the_options_of_the_run_count(tmp_path: Path) -> None:
    fit(crt(1), tmp_path)
    (tmp_path / "stages.json").write_text("damaged")
    with pytest.raises(CheckpointError, match="Remove it and pass the options"):
        stored_run("auto", tmp_path)
    (tmp_path / "stages.json").unlink()
    assert stored_run("auto", tmp_path) is None
    with pytest.raises(CheckpointError, match=r"record stages\.json is missing"):
        stored_run(True, tmp_path)
    fit(crt(1), tmp_path, resume="auto")
    assert StageRecord.read(tmp_path) is not None


@pytest.mark.slow
def test_a_list_of_one_stage_is_resumed_and_repeated(tmp_path: Path) -> None:
    file, out, again = tmp_path / "one.yaml", tmp_path / "run", tmp_path / "again"
    file.write_text(
        "data: digits-lt\nmethod: ce\noptimizer: sgd\nepochs: 1\nstages:\n"
        "  - {name: head, freeze: ['features.*']}\n"
    )
    assert main(["train", "--config", str(file), "--out", str(out), "--quiet"]) == 0
    del STAGES._parts["own:one"]  # as in a new process
    assert main(["train", "--resume", "--out", str(out), "--quiet"]) == 0
    del STAGES._parts["own:one"]
    command = ["train", "--config", str(out / "run.yaml"), "--out", str(again), "--quiet"]
    assert main(command) == 0
    assert same(weights(out), weights(again))


# ---- settings of later stages ----


@pytest.mark.parametrize("data", ["imagenet-lt", "cifar10-lt"])
def test_learning_rates_of_a_list_belong_to_sgd(data: str) -> None:
    for stage in plan_stages(recipe(data, "ce", "adamw", stages="crt").config()):
        assert (stage.config.optimizer, stage.config.lr) == ("adamw", 1e-3)
        assert stage.config.weight_decay == 0.01
    on_adam = recipe(data, "ce", "sam", stages="crt", base_optimizer="adam").config()
    assert [stage.config.lr for stage in plan_stages(on_adam)] == [1e-3, 1e-3]
    given = recipe(data, "ce", "adamw", stages="crt", lr=0.01).config()
    assert [stage.config.lr for stage in plan_stages(given)] == [0.01, 0.01]


def test_a_stage_takes_over_the_base_optimizer() -> None:
    name = listed("bases", {"name": "a"}, {"name": "b", "optimizer": "sam"})
    config = recipe("digits-lt", "ce", "adamw", stages=name, lr=0.01).config()
    assert plan_stages(config)[1].config.base_optimizer == "adamw"
    assert plan_stages(config)[1].config.lr == 0.01
    other = config.replace(stage_set=("b.optimizer=sgd", "a.optimizer=sam"))
    first, last = (stage.config for stage in plan_stages(other))
    assert (first.base_optimizer, first.lr) == ("adamw", 0.01)
    plain = recipe("digits-lt", "ce", "sgd").config()
    assert (last.optimizer, last.lr, last.weight_decay) == ("sgd", plain.lr, plain.weight_decay)


def test_the_schedule_of_a_list_is_scaled_to_other_epochs() -> None:
    last = plan_stages(staged_on_cifar("classifier.epochs=10"))[1].config
    assert (last.epochs, last.lr_milestones, last.warmup_epochs) == (10, (4, 7), 2)
    last = plan_stages(staged_on_cifar("classifier.epochs=10", "classifier.warmup_epochs=0"))[1]
    assert last.config.warmup_epochs == 0


def staged_on_cifar(*stage_set: str) -> TrainConfig:
    return recipe("cifar100-lt", "ce", "sgd", stages="crt", stage_set=stage_set).config()


def test_none_unsets_an_optional_setting() -> None:
    first, last = plan_stages(staged("crt", "classifier.ema=none", ema=0.9))
    assert (first.config.ema, last.config.ema) == (0.9, None)


def test_mislas_on_places_is_no_published_combination() -> None:
    chosen = recipe("places-lt", "ce", "sgd", stages="mislas")
    last = plan_stages(chosen.config(), chosen.sources)[1]
    assert last.config.batch_norm == "frozen"
    assert "not a published value" in last.sources["las_head"]


# ---- limits of norms, and the head ----


def test_a_branch_has_the_limits_of_its_run_only_with_the_same_setting(tmp_path: Path) -> None:
    limit = ("head.weight=range:0.25",)
    config = recipe("digits-lt", "ce", "sgd", epochs=2, batch_size=32, max_norm=limit).config()
    parent = Trainer(config, data=FEW, out=tmp_path / "run", keep=(1,), progress=False)
    parent.fit()
    branch = Branch.load(tmp_path / "run", 1)

    def limits(*max_norm: str, **options: Any) -> tuple[dict[str, float], Any]:
        made = branch.settings(max_norm=max_norm)[0]
        trainer = Trainer(made, data=FEW, progress=False, branch=branch, **options)
        return trainer.limits.limits, trainer.state.start

    assert limits(*limit)[0] == parent.limits.limits
    network = branch.checkpoint.build_model()
    other = NormLimits.of_run(config.replace(max_norm=("head.weight=range:0.5",)), network, None)
    assert limits("head.weight=range:0.5")[0] == pytest.approx(other.limits)
    assert limits() == ({}, None)
    record = {"max_norm": {"head.weight": 1.0}}
    assert NormLimits.of_run(config.replace(max_norm=()), network, record).limits == {}


def test_a_head_that_was_taken_over_is_not_called_random(
    capsys: pytest.CaptureFixture[str],
) -> None:
    network = build_network(plan_stages(staged("lws"))[1].config, 10, 1)
    record = {"name": "x", "fresh": ["head.scale"]}
    names = [name for name in network.state_dict() if name.startswith("head.")]
    assert len(names) == 3
    _report({**record, "fresh": [name for name in names if "linear" not in name]}, network)
    assert capsys.readouterr().err == ""
    _report({**record, "fresh": names}, network)
    assert "random initial weights" in capsys.readouterr().err
