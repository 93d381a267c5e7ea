"""Killed processes, full disks and damaged files while runs are written, read and resumed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastsam.cli import main
from fastsam.curvature import Spectrum
from fastsam.files import FolderBusyError
from fastsam.longtail import Checkpoint, Result, Trainer
from fastsam.longtail.checkpoint import checkpoint_bytes
from fastsam.longtail.errors import CheckpointError, DataError, TrainingError, UsageError
from fastsam.longtail.landscape import ClassSpectrum, landscape
from fastsam.longtail.predictions import predict
from fastsam.longtail.reproduce import reproduce_figure
from fastsam.longtail.training import RunFolder, Step
from fastsam.longtail.training.run_folder import PLAN_FILE, TUNING_FILE
from python_tests.longtail.test_trainer import DIGITS, FEW, StoppedError, short, stop_in

TINY: dict[str, Any] = {"epochs": 2, "batch_size": 138, "progress": False}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    Trainer(short("ce", "sam", epochs=1), data=FEW, out=folder, progress=False).fit()
    return folder


def test_what_a_failed_run_leaves_does_not_hinder_the_next(tmp_path: Path) -> None:
    (tmp_path / "profile").mkdir()
    for rank in (0, 3):
        (tmp_path / f"error-rank-{rank}.txt").write_text("it failed before the first checkpoint")
    Trainer(short("ce", "sgd", epochs=1), data=FEW, out=tmp_path, progress=False).fit()
    assert not list(tmp_path.glob("error-rank-*"))
    assert (tmp_path / "result.json").is_file()


def test_settings_of_an_attempt_without_a_checkpoint_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("seed: 5\n")
    Trainer(
        short("ce", "sgd", epochs=1), data=FEW, out=tmp_path, resume="auto", progress=False
    ).fit()
    written = (tmp_path / "run.yaml").read_text()
    assert "seed: 0" in written
    (tmp_path / "run.yaml").write_text("# mine\n" + written)
    Trainer(
        short("ce", "sgd", epochs=1), data=FEW, out=tmp_path, resume="auto", progress=False
    ).fit()
    assert (tmp_path / "run.yaml").read_text() == "# mine\n" + written


@pytest.mark.parametrize("name", [PLAN_FILE, TUNING_FILE])
@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_the_folder_of_a_sweep_is_not_that_of_a_run(
    name: str, options: dict[str, bool], tmp_path: Path
) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(UsageError, match=f"it contains {name}; choose another --out"):
        RunFolder(tmp_path).check(**options)


# --- results ---------------------------------------------------------------------------------------


def test_flipped_bits_of_a_result_are_noticed_or_change_nothing(
    finished: Path, tmp_path: Path
) -> None:
    whole = (finished / "result.json").read_bytes()
    original = Result.load(finished / "result.json")
    generator = np.random.default_rng(14)
    path = tmp_path / "result.json"
    refused = 0
    for place in generator.integers(0, 8 * len(whole), 200).tolist():
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            loaded = Result.load(path)
        except DataError as error:
            refused += str(path) in str(error)
        else:
            assert repr(loaded) == repr(original), f"bit {place} was accepted"
    assert refused > 100


@pytest.mark.parametrize(
    "change",
    [
        {"counts": [1, 2]},
        {"counts": "many"},
        {"class_names": ["a"]},
        {"groups": {"head": [10]}},
        {"history": [3]},
        {"test": {"accuracy": 3}},
        {"config": {}},
        {"seconds": None},
        {"added": 1},
    ],
    ids=str,
)
def test_results_that_contradict_themselves(change: dict[str, Any], finished: Path) -> None:
    content = json.loads((finished / "result.json").read_text())
    del content["sha256"]
    assert Result.from_json(json.dumps(content)) == Result.load(finished / "result.json")
    with pytest.raises(DataError, match="not a result of `fastsam train`"):
        Result.from_json(json.dumps({**content, **change}))


def test_cells_are_no_formulas_and_names_no_commands(tmp_path: Path) -> None:
    names = ("=cmd|'/C calc'!A0", "+1", "-1", "@sum", "\t=1", "a\x1b[2Jb", "7", '8,"x"', "é", "10")
    data = replace(FEW, class_names=names)
    Trainer(short("ce", "sgd", epochs=1), data=data, out=tmp_path, progress=False).fit()
    table = (tmp_path / "per_class.csv").read_text()
    rows = [line.split(",", 2)[1] for line in table.splitlines()[1:]]
    assert rows[:7] == ["'=cmd|'/C calc'!A0", "'+1", "'-1", "'@sum", "'\\t=1", "a\\x1b[2Jb", "7"]
    assert "é" in table
    assert "\x1b" not in table
    assert Result.load(tmp_path / "result.json").class_names == list(names)


# --- skipped steps, networks that cannot be evaluated -------------------------------------------------


def spoil_batch(run: Trainer, number: int) -> None:
    """Put NaN into one image of a training batch; batches are counted over the run."""
    seen = 0

    def spoil(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        nonlocal seen
        if not module.training:
            return None
        seen += 1
        if seen != number:
            return None
        bad = inputs[0].clone()
        bad[0] = float("nan")
        return (bad,)

    run.model.features.register_forward_pre_hook(spoil)


@pytest.mark.parametrize("optimizer", ["sam", "asam", "looksam"])
def test_one_bad_batch_does_not_poison_the_statistics(optimizer: str) -> None:
    extra = {"look_every": 1} if optimizer == "looksam" else {}
    config = short("ce", optimizer, batch_size=40, **extra)
    run = Trainer(config, data=DIGITS, progress=False)
    states: list[dict[str, torch.Tensor]] = []

    def keep(step: Step) -> None:
        states.append({name: value.clone() for name, value in run.model.state_dict().items()})

    run.on_step = keep
    spoil_batch(run, 5)  # two passes a step: the first of the third
    result = run.fit()
    assert [record.skipped for record in result.history] == [1, 0]
    assert all(torch.equal(states[1][name], states[2][name]) for name in states[1])
    statistics = [name for name in states[1] if name.endswith("running_mean")]
    assert statistics
    assert not any(torch.equal(states[2][name], states[3][name]) for name in statistics)
    assert all(value.isfinite().all() for value in states[-1].values())


def test_one_bad_batch_does_not_enter_the_queue_of_paco() -> None:
    run = Trainer(short("paco", "sam", batch_size=40, paco_queue=64), data=DIGITS, progress=False)
    spoil_batch(run, 5)
    result = run.fit()
    assert result.history[0].skipped == 1
    assert all(value.isfinite().all() for value in run.model.state_dict().values())


@pytest.mark.parametrize("optimizer", ["sgd", "sam"])
def test_statistics_that_are_not_finite_stop_the_run(optimizer: str, tmp_path: Path) -> None:
    run = Trainer(short("ce", optimizer), data=FEW, out=tmp_path, progress=False)

    def spoil(step: Step) -> None:
        for name, value in run.model.named_buffers():
            if name.endswith("running_var"):
                value[0] = float("inf")

    run.on_step = spoil
    with pytest.raises(TrainingError, match=r"running_var .* infinite or NaN after epoch 1"):
        run.fit()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_outputs_that_are_not_finite_are_not_evaluated(bad: float, tmp_path: Path) -> None:
    run = Trainer(short("ce", "sgd", epochs=1), data=FEW, out=tmp_path, progress=False)
    run.model.head.register_forward_hook(
        lambda module, inputs, logits: (
            None if module.training else logits.index_fill(0, torch.tensor(0), bad)
        )
    )
    with pytest.raises(TrainingError, match=r"outputs are infinite or NaN for 1 of \d+ images"):
        predict(run.model, FEW.test, torch.device("cpu"), batch_size=1000)
    with pytest.raises(TrainingError, match="cannot evaluate the network"):
        run.fit()
    assert not (tmp_path / "result.json").exists()


# --- no room ----------------------------------------------------------------------------------------


def full_disk(monkeypatch: pytest.MonkeyPatch, *, after: int) -> None:
    """Make every write after the first ``after`` bytes fail with a full disk."""
    left, write = after, os.write

    def limited(handle: int, data: Any) -> int:
        nonlocal left
        left -= len(data)
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, data)

    monkeypatch.setattr(os, "write", limited)


def test_a_full_disk_at_the_end_leaves_the_result_to_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Result] = []
    run = Trainer(
        short("ce", "sam", epochs=1), data=FEW, out=tmp_path, on_result=shown.append, progress=False
    )
    with monkeypatch.context() as patch:
        full_disk(patch, after=0)
        with pytest.raises(
            OSError, match=r"No space left on device: \S+ needs 0\.\d MB, [\d.]+ MB free"
        ):
            run.fit()
    assert len(shown) == 1
    assert shown[0].test.accuracy > 0
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_in_the_middle_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastsam.longtail.training.saving.EPOCH_SECONDS", 0.0)
    config = short("ce", "sam", epochs=4)
    whole = Trainer(config, data=FEW, out=tmp_path / "whole", progress=False).fit()
    run = Trainer(config, data=FEW, out=tmp_path / "cut", progress=False)
    with monkeypatch.context() as patch:
        full_disk(patch, after=int(2.5 * (tmp_path / "whole" / "checkpoint.pt").stat().st_size))
        with pytest.raises(OSError, match="No space left"):
            run.fit()
    assert Checkpoint.load(tmp_path / "cut").epoch == 2
    again = Trainer(config, data=FEW, out=tmp_path / "cut", resume=True, progress=False).fit()
    assert again.test == whole.test


def test_room_is_probed_before_the_first_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left on device: \S+ needs [\d.]+ MB"):
        Trainer(short("ce", "sam"), data=FEW, out=tmp_path, progress=False)


def test_the_probed_room_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    for optimizer in ("sgd", "sam", "looksam"):
        run = Trainer(
            short("ce", optimizer, epochs=1), data=FEW, out=tmp_path / optimizer, keep={1}
        )
        assert run.folder is not None
        # Two for resuming, one while it is written, the newest of a whole epoch, and the kept one.
        assert run.folder.coming_checkpoints(run.keep, run.config.keep_last) == 5
        size = checkpoint_bytes(run.config, run.model)
        run.fit()
        real = (tmp_path / optimizer / "checkpoint.pt").stat().st_size
        assert real <= size <= 1.3 * real
        assert run.folder.coming_checkpoints(run.keep, run.config.keep_last) == 3


# --- two runs in one folder ---------------------------------------------------------------------------

HOLDS = """
import sys
from pathlib import Path
from fastsam.files import locked
with locked(Path(sys.argv[1])):
    print("ready", flush=True)
    sys.stdin.readline()
"""


def test_a_folder_in_use_is_refused_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Trainer(short("ce", "sgd", epochs=1), data=FEW, out=tmp_path, progress=False)
    command = [sys.executable, "-c", HOLDS, str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(FolderBusyError):
            run.fit()
        with pytest.raises(FolderBusyError):
            Trainer(short("ce", "sgd", epochs=1), data=FEW, out=tmp_path, overwrite=True)
        arguments = ["train", "--epochs", "1", "--quiet", "--out", str(tmp_path)]
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert f"in use by process {process.pid} on" in error
        assert len(error.splitlines()) == 1
        process.kill()
    assert [path.name for path in tmp_path.iterdir()] == [".fastsam-lock"]
    run.fit()
    assert (tmp_path / "result.json").is_file()


def test_a_run_set_up_before_another_wrote_is_refused(tmp_path: Path) -> None:
    config = short("ce", "sgd", epochs=1)
    first, second = (Trainer(config, data=FEW, out=tmp_path, progress=False) for _ in range(2))
    first.fit()
    with pytest.raises(CheckpointError, match="another process wrote to"):
        second.fit()
    first.fit()  # the same run again is not another run


def test_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        Trainer(
            short("ce", "sgd", epochs=1), data=FEW, out=tmp_path, keep={1}, progress=False
        ).fit()
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


# --- resuming after a kill -------------------------------------------------------------------------------


def test_a_kept_checkpoint_is_enough_to_go_on(tmp_path: Path) -> None:
    config = short("ce", "sam", epochs=3)
    whole = Trainer(config, data=FEW, out=tmp_path / "whole", keep={1}, progress=False).fit()
    cut = tmp_path / "cut"
    run = Trainer(config, data=FEW, out=cut, keep={1}, on_step=stop_in(2), progress=False)
    with pytest.raises(StoppedError):
        run.fit()
    (cut / "checkpoint.pt").unlink()
    shutil.rmtree(cut / "resume")
    again = Trainer(config, data=FEW, out=cut, keep={1}, resume=True, progress=False)
    assert len(again.state.history) == 1
    assert again.fit().test == whole.test


def test_a_run_resumes_automatically(tmp_path: Path) -> None:
    config = short("ce", "sam", epochs=3)
    (tmp_path / "notes.txt").write_text("mine")
    run = Trainer(config, data=FEW, out=tmp_path, resume="auto", keep={2}, progress=False)
    whole = run.fit()
    (tmp_path / "epoch-2.pt").unlink()
    run = Trainer(config, data=FEW, out=tmp_path, resume="auto", keep={1, 2}, progress=False)
    assert run.state.history == []  # epoch 2 is requested but has passed
    assert run.fit().test == whole.test
    assert {"epoch-1.pt", "epoch-2.pt", "notes.txt"} <= {path.name for path in tmp_path.iterdir()}
    (tmp_path / "epoch-2.pt").unlink()
    run = Trainer(config, data=FEW, out=tmp_path, resume="auto", keep={1, 2}, progress=False)
    assert len(run.state.history) == 1
    with pytest.raises(CheckpointError, match="cannot resume from"):
        Trainer(short("ce", "sgd", epochs=3), data=FEW, out=tmp_path, resume="auto")


def test_reproduce_resumes_after_a_kill_between_two_checkpoints(tmp_path: Path) -> None:
    def first_panel(folder: Path) -> float:
        panels = reproduce_figure("figure3", "digits-lt", folder, steps=2, **TINY)
        return next(panels).item.spectrum.lambda_max

    whole = first_panel(tmp_path / "whole")
    (kept,) = (tmp_path / "whole").rglob("epoch-1.pt")
    cut = tmp_path / "cut" / kept.relative_to(tmp_path / "whole")
    cut.parent.mkdir(parents=True)
    cut.write_bytes(kept.read_bytes())
    assert first_panel(tmp_path / "cut") == whole


def flip(path: Path) -> None:
    """Change the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


@pytest.mark.slow
def test_reproduce_trains_damaged_runs_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> list[float]:
        panels = reproduce_figure("figure3", "digits-lt", tmp_path, steps=2, **TINY)
        return [panel.item.spectrum.lambda_max for panel in panels]

    def result() -> Result:
        found = Result.load(next(tmp_path.rglob("result.json")))
        return replace(found, seconds=0, history=[], origin=None)

    first, before = run(), result()
    assert capsys.readouterr().err == ""
    for name in ("result.json", "checkpoint.pt", "epoch-1.pt", "class-*.json"):
        files = sorted(tmp_path.rglob(name))
        assert files
        flip(files[0])
        if name.endswith(".pt"):  # so that the weights are needed
            for spectrum in tmp_path.rglob("class-*.json"):
                spectrum.unlink()
        if name == "checkpoint.pt":
            files[0].with_name("result.json").unlink()
        assert run() == first
        line, *more = capsys.readouterr().err.splitlines()
        assert str(files[0]) in line
        assert "creating it again" in line
        # A run without the kept checkpoint of an epoch goes back to before that epoch.
        assert len(more) == (name == "epoch-1.pt"), more
        assert all("continuing after epoch 0" in text for text in more)
        assert result() == before
    assert {path.name for path in tmp_path.rglob("*.damaged")} == {
        "checkpoint.pt.damaged",
        "epoch-1.pt.damaged",
    }
    with pytest.raises(CheckpointError, match="other settings"):
        list(reproduce_figure("figure3", "digits-lt", tmp_path, steps=2, lr=0.01, **TINY))


def test_a_spectrum_is_replaced_and_no_link_followed(finished: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.load(finished)
    (item,) = landscape(checkpoint.build_model(), FEW, checkpoint, [9], steps=2, progress=False)
    (tmp_path / "precious").write_text("mine")
    path = ClassSpectrum.path(tmp_path, 9, "train", "ce", "none")
    path.symlink_to(tmp_path / "precious")
    assert item.save(tmp_path) == path
    assert (tmp_path / "precious").read_text() == "mine"
    assert ClassSpectrum.load(path).spectrum.lambda_max == item.spectrum.lambda_max
    item.spectrum.save(tmp_path / "precious.npz")
    assert Spectrum.load(tmp_path / "precious.npz").lambda_max == item.spectrum.lambda_max
    path.write_text(path.read_text().replace('"dimension": ', '"dimension": 1', 1))
    with pytest.raises(DataError, match="checksum"):
        ClassSpectrum.load(path)
