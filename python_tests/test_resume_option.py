"""The option ``--resume [auto]``: begin or continue, and what is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsam.cli import main
from fastsam.cli.commands import train
from fastsam.cli.resume import resume_in
from fastsam.files import locked
from fastsam.longtail import Checkpoint, Result
from fastsam.longtail.archive import check_archive
from fastsam.longtail.errors import DamagedError, UsageError
from fastsam.longtail.training import RunFolder
from fastsam.longtail.training.resume import newest_outline
from fastsam.longtail.training.step_requests import StepRequests

TINY = ["--batch-size", "200", "--model", "resnet8", "--epochs", "2", "--threads", "1", "--quiet"]
RUN = ["train", "--method", "ce", "--optimizer", "sam", *TINY]


@pytest.mark.parametrize(
    ("arguments", "mode"),
    [
        ([], False),
        (["--resume"], True),
        (["--resume", "--out", "x"], True),
        (["--resume", "auto", "--out", "x"], "auto"),
        (["--resume=auto"], "auto"),
        (["--resume", "False"], False),
    ],
)
def test_the_value_before_parsing(arguments: list[str], mode: object) -> None:
    assert resume_in(arguments) == mode


def test_the_same_command_begins_and_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = [*RUN, "--resume", "auto", "--out", str(out)]
    assert main(command) == 0
    first = Result.load(out / "result.json")
    assert main(command) == 0
    assert Result.load(out / "result.json").test == first.test
    assert Checkpoint.load(out).epoch == 2
    capsys.readouterr()
    for wrong, message in (
        (["--optimizer", "sgd"], "its optimizer is sam, but the command has sgd"),
        (["--rho", "0.3"], "rho was (0.05,), is now (0.3,)"),
        (["--overwrite"], "--resume cannot be combined with --overwrite"),
    ):
        assert main([*command, *wrong]) in (1, 2)
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
    assert Result.load(out / "result.json").test == first.test
    assert main([*RUN, "--resume", "--out", str(tmp_path / "nothing")]) == 1
    assert "no checkpoint at" in capsys.readouterr().err
    assert main([*RUN, "--resume", "automatic", "--out", str(out)]) == 2
    assert "--resume must be" in capsys.readouterr().err
    with locked(out):
        process = subprocess.run(
            [sys.executable, "-m", "fastsam", *command],
            capture_output=True,
            text=True,
            check=False,
        )
    assert process.returncode == 1
    assert f"is in use by process {os.getpid()}" in process.stderr


def test_a_continued_run_loads_its_weights_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*RUN, "--precision", "auto", "--resume", "auto", "--out", str(tmp_path)]
    assert main(command) == 0
    loads: list[str] = []
    load = torch.load

    def counted(file: Path, **options: Any) -> Any:
        loads.append(str(options["map_location"]))
        return load(file, **options)

    monkeypatch.setattr(torch, "load", counted)
    assert main(command) == 0
    assert loads.count("cpu") == 1
    # For the settings that the options are checked against, those of the run, and its precision.
    assert loads.count("meta") == 3


def test_damaged_weights_are_noticed_although_the_settings_are_sound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*RUN, "--resume", "auto", "--out", str(tmp_path)]
    assert main(command) == 0
    with zipfile.ZipFile(tmp_path / "checkpoint.pt") as archive:
        weights = max(archive.infolist(), key=lambda item: item.file_size)
    content = bytearray((tmp_path / "checkpoint.pt").read_bytes())
    content[weights.header_offset + weights.file_size // 2] ^= 1
    (tmp_path / "checkpoint.pt").write_bytes(content)
    assert newest_outline(RunFolder(tmp_path)) is not None
    with pytest.raises(DamagedError, match="the checksum of"):
        check_archive(tmp_path / "checkpoint.pt")
    capsys.readouterr()
    assert main(command) == 1
    assert "truncated, damaged" in capsys.readouterr().err
    record = content.index(b"subset_hash")  # in the settings and records of the run
    content[record] ^= 1
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(DamagedError, match="CRC"):
        newest_outline(RunFolder(tmp_path))


def test_settings_of_a_file_and_branches_begin_and_continue(tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    assert main([*RUN, "--keep", "1", "--out", str(parent)]) == 0
    file, branch = tmp_path / "file", tmp_path / "branch"
    again = ["train", "--config", str(parent / "run.yaml"), "--resume", "auto", "--quiet"]
    started = ["train", "--from", str(parent), "--at", "1", "--rho", "0.2", "--resume", "auto"]
    for command, out in ((again, file), (started, branch)):
        for _ in range(2):
            assert main([*command, "--out", str(out)]) == 0
    expected = Result.load(parent / "result.json")
    assert Result.load(file / "result.json").test == expected.test
    result = Result.load(branch / "result.json")
    assert result.parent is not None
    assert result.config["rho"] == [0.2]
    assert result.history[0] == expected.history[0]


@pytest.mark.parametrize(
    ("stages", "folder"),
    [
        ([], "."),
        pytest.param(
            ["--stages", "crt", "--stage-set", "classifier.epochs=1"],
            "stage-1",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_resumed_run_keeps_the_epochs_of_its_command(
    stages: list[str], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_step = StepRequests.after_step

    def signaled(requests: StepRequests) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return after_step(requests)

    with monkeypatch.context() as patched:
        patched.setattr(StepRequests, "after_step", signaled)
        assert main([*RUN, *stages, "--keep", "1", "2", "--out", str(tmp_path)]) != 0
    run = tmp_path / folder
    assert not list(run.glob("epoch-*.pt"))
    assert main(["train", "--resume", "--quiet", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "result.json").is_file()
    assert {path.name for path in run.glob("epoch-*.pt")} == {"epoch-1.pt", "epoch-2.pt"}
    (run / "epoch-1.pt").unlink()  # to free disk space
    assert main(["train", "--resume", "--quiet", "--out", str(tmp_path)]) == 0
    assert not (run / "epoch-1.pt").exists()


def test_settings_of_a_stored_run_apply_in_every_form_of_the_options(tmp_path: Path) -> None:
    run, file = tmp_path / "run", tmp_path / "branch.yaml"
    parts = ["--method", "vs", "--optimizer", "sgd"]
    assert main(["train", *parts, *TINY, "--keep", "1", "--out", str(run)]) == 0
    file.write_text(f"from: {run}\nat: 1\ngamma: 0.1\n")
    for arguments in (
        ["--from", str(run), "--at", "1", "--gamma", "0.1"],
        [f"--from={run}", "--at=1", "--gamma", "0.1"],
        ["--from", "elsewhere", f"--from={run}", "--at=7", "--at", "1", "--gamma=0.1"],
        [f"--out={run}", "--resume", "--gamma", "0.1"],
        ["--out", "elsewhere", f"--out={run}", "--resume=auto", "--gamma", "0.1"],
        ["--config", str(file)],
        [f"--config={file}", "--at", "2"],
    ):
        assert hasattr(train.command(arguments).flat, "gamma"), arguments
    with pytest.raises(UsageError, match="gamma"):
        train.command([f"--from={run}", "--at=1", "--method", "ce", "--gamma", "0.1"])


@pytest.mark.slow
def test_a_second_interrupt_ends_the_command_at_once(tmp_path: Path) -> None:
    """The first asks for the end of the step, which here does not come."""
    script = (
        "import time, sys\n"
        "from fastsam.stopping import stop_signals\n"
        "with stop_signals() as stop, stop.deferred():\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)  # torchrun sends the same Ctrl-C once more
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=10)[1]
    assert process.returncode == 130
    assert "SIGINT: stopping after this step" in error


def test_a_missing_kept_checkpoint_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*RUN, "--resume", "auto", "--out", str(tmp_path)]
    assert main(command) == 0
    capsys.readouterr()
    assert main([*command, "--keep", "1"]) == 0
    error = capsys.readouterr().err
    assert "reached epoch 2" in error
    assert "continuing after epoch 0" in error
    assert (tmp_path / "epoch-1.pt").exists()
