"""Commands that write, on a full disk and under a file size limit: one-line errors, old files intact."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastsam.cli import main
from fastsam.longtail import Checkpoint, Result
from python_tests.limits import file_size_limit

TINY = ["--epochs", "2", "--batch-size", "138", "--threads", "1", "--quiet"]
SETTINGS = ["--method", "ce", "--optimizer", "sgd"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("source") / "run"
    assert main(["train", *SETTINGS, *TINY, "--out", str(folder)]) == 0
    return folder


def is_allowed_to_mount(folder: Path) -> bool:
    if shutil.which("mount") is None:
        return False
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        return False
    subprocess.run(["umount", str(folder)], check=True)
    return True


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not is_allowed_to_mount(folder):
        pytest.skip("mounting a tmpfs is not permitted here")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


Fails = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Run a command that must fail with one line; return its output and that line."""

    def check(*arguments: object, code: int = 1) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == code
        output = capsys.readouterr()
        lines = output.err.splitlines()
        assert len(lines) == 1, output.err
        assert lines[0].startswith("fastsam: error: ")
        return output.out + lines[0]

    return check


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fill(disk: Path, *, leave: int) -> None:
    """Fill a disk except for some bytes."""
    status = os.statvfs(disk)
    size = status.f_bavail * status.f_frsize - leave
    with (disk / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)


@pytest.mark.slow
def test_commands_on_a_disk_of_one_megabyte(small_disk: Path, run: Path, fails: Fails) -> None:
    out = small_disk / "run"
    # Two checkpoints do not fit, which is detected before the first epoch.
    message = fails("train", *SETTINGS, *TINY, "--out", out)
    assert "No space left on device" in message
    assert pytest.approx(2.7, abs=0.3) == float(message.split(" needs ")[1].split()[0])
    assert "MB free" in message
    assert contents(small_disk) == {}
    reproduced = small_disk / "reproduced"
    table = ("reproduce", "table4", "--data", "digits-lt", "--seeds", "1", *TINY)
    assert "No space left on device" in fails(*table, "--out", reproduced)
    # Existing files fit, new ones do not.
    shutil.rmtree(reproduced)
    shutil.rmtree(out)
    shutil.copytree(run, out)
    fill(small_disk, leave=20_000)
    before = contents(small_disk)
    resume = ("train", "--resume", "--quiet", "--out", out)
    assert "No space left on device" in fails(*resume)
    (small_disk / "filler").unlink()
    fill(small_disk, leave=12_288)
    before = contents(small_disk)
    spectra = ("spectrum", out, "--classes", "9", "--steps", "3", "--quiet")
    assert "No space left on device" in fails(*spectra, "--out", small_disk / "spectra")
    assert "No space left on device" in fails("report", small_disk)
    after = contents(small_disk)
    assert {name: after[name] for name in before} == before
    assert Checkpoint.load(out).epoch == 2
    assert Result.load(out / "result.json").test.accuracy > 0
    # With free space, the command succeeds.
    (small_disk / "filler").unlink()
    command = (*spectra, "--out", small_disk / "spectra")
    assert main([str(argument) for argument in command]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 10_000])
def test_commands_under_a_limit_on_files(
    size: int, run: Path, tmp_path: Path, fails: Fails
) -> None:
    out = tmp_path / "runs"
    shutil.copytree(run, out / "run")
    before = contents(out)
    table = ("reproduce", "table4", "--data", "digits-lt", "--seeds", "1", *TINY)
    commands = (
        ("train", *SETTINGS, *TINY, "--out", out / "new"),
        ("train", "--resume", "--quiet", "--out", out / "run"),
        ("train", *SETTINGS, *TINY, "--overwrite", "--out", out / "other"),
        ("spectrum", out / "run", "--classes", "9", "--steps", "3", "--out", out / "s", "--quiet"),
        (*table, "--out", out / "reproduced"),
        ("report", out),
    )
    for command in commands:
        with file_size_limit(size):
            message = fails(*command)
        assert "File too large: " in message
        assert "the limit on files (ulimit -f) is 0.0 MB" in message
        after = contents(out)
        assert {name: after[name] for name in before} == before, command
        assert not any(".fastsam-" in name for name in after), command
