"""Killed commands give the uninterrupted result when repeated; a lost process is a one-line error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastsam.longtail.results import Epoch

KILLS, CHAINS = 30, 5
"""Number of kills of the command, and of folders; each command then runs to the end."""
LATEST_SECONDS = 12.0

COMMAND = [
    *(sys.executable, "-m", "fastsam", "reproduce", "figure3", "--data", "digits-lt"),
    *("--epochs", "12", "--batch-size", "92", "--steps", "2", "--threads", "1", "--quiet", "--out"),
]


def outcome(folder: Path) -> dict[str, Any]:
    """Return the results of a run without times; of other files only that they exist.

    Extremes of spectra agree up to rounding, because each run measures which strategy is fastest.
    """
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == "result.json":
            content = json.loads(path.read_text())
            for record in content["history"]:
                for item in fields(Epoch):
                    if item.name == "seconds" or not item.compare:
                        record.pop(item.name)
            found[name] = {key: content[key] for key in ("test", "history", "rule", "counts")}
        elif path.name.startswith("class-"):
            summary = json.loads(path.read_text())["summary"]
            scale = summary["lambda_max"]
            found[name] = [
                pytest.approx(summary[key], rel=1e-3, abs=1e-4 * scale)
                for key in ("lambda_min", "lambda_max", "loss")
            ]
        elif path.is_file():
            found[name] = None
    return found


def numbers(found: dict[str, Any]) -> dict[str, Any]:
    """Return the same with plain numbers, for comparison with tolerances on the other side."""
    return {
        name: [item.expected for item in value] if isinstance(value, list) else value
        for name, value in found.items()
    }


@pytest.mark.slow
def test_reproduce_killed_thirty_times(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    subprocess.run([*COMMAND, whole], check=True, capture_output=True, timeout=600)
    expected = outcome(whole)
    assert sum(name.endswith("result.json") for name in expected) == 2
    assert sum("class-" in name for name in expected) == 60
    moments = np.random.default_rng(17).uniform(0, LATEST_SECONDS, KILLS)
    killed = 0
    for chain, ours in enumerate(np.array_split(moments, CHAINS)):
        folder = tmp_path / f"killed-{chain}"
        for moment in ours:
            process = subprocess.Popen(
                [*COMMAND, folder], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            time.sleep(moment)
            process.kill()
            error = process.communicate(timeout=60)[1]
            killed += process.returncode == -signal.SIGKILL
            assert process.returncode in (0, -signal.SIGKILL), error
            assert b"error" not in error
        done = subprocess.run([*COMMAND, folder], capture_output=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stderr == b""
        assert numbers(outcome(folder)) == expected
    assert killed > KILLS // 2


def children(process: int) -> list[int]:
    """Return the processes that a process started, in the order of their start."""
    threads = Path(f"/proc/{process}/task").iterdir()
    return sorted(int(c) for t in threads for c in (t / "children").read_text().split())


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a file exists."""
    deadline = time.monotonic() + 240.0
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def write_images(root: Path) -> None:
    """Write a small set in class folders."""
    rng = np.random.default_rng(5)
    for part, counts in (("train", (20, 12)), ("test", (2, 2))):
        for label, count in enumerate(counts):
            folder = root / part / f"class {label}"
            folder.mkdir(parents=True)
            for place in range(count):
                pixels = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{place}.png")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_killed_reader_ends_training_in_one_line(tmp_path: Path) -> None:
    """A DataLoader worker, killed while the network trains and while it waits."""
    write_images(tmp_path / "data")
    moments = np.random.default_rng(11).uniform(0, 1.0, 4)
    for turn, moment in enumerate(moments):
        out = tmp_path / f"run {turn}"
        settings = "--model resnet8 --epochs 5000 --batch-size 4 --image-size 16 --workers 2"
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "fastsam", "train", *settings.split(), "--quiet"),
                *("--data", "folder", "--data-root", str(tmp_path / "data"), "--out", str(out)),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            wait_for(out / "checkpoint.pt", process)
            time.sleep(moment)
            os.kill(children(process.pid)[turn % 2], signal.SIGKILL)
            error = process.communicate(timeout=60)[1]
        finally:
            process.kill()
        assert process.returncode == 1, error
        assert len(error.splitlines()) == 1, error
        assert error.startswith("fastsam: error: "), error
        assert "worker" in error


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("number", "interval"),
    [(signal.SIGKILL, "60"), (signal.SIGKILL, "0.1"), (signal.SIGSTOP, "0.1")],
)
def test_a_lost_rank_ends_the_others_in_one_line(
    number: int, interval: str, tmp_path: Path
) -> None:
    """The others notice it themselves, or torchrun stops them when it notices a dead one."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += ["--monitor-interval", interval, "--shutdown-timeout", "5"]
    logs = ["--redirects", "3", "--log-dir", str(tmp_path / "logs")]
    out = tmp_path / "run"
    process = subprocess.Popen(
        [
            *(sys.executable, *launch, *logs, "-m", "fastsam", "train", "--quiet"),
            *(
                "--method",
                "ldam-drw",
                "--epochs",
                "5000",
                "--rank-timeout",
                "20",
                "--out",
                str(out),
            ),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(out / "checkpoint.pt", process)
        for child in children(process.pid):
            if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes():
                os.kill(child, number)
                break
        else:
            pytest.fail("torchrun has no rank 1")
        began = time.monotonic()
        launcher = process.communicate(timeout=180)[1]
    finally:
        process.kill()
    assert process.returncode == 1, launcher
    (log,) = (tmp_path / "logs").rglob("0/stderr.log")
    error = log.read_text()
    assert len(error.splitlines()) == 1, error
    assert error.startswith("fastsam: error: rank 0: rank 1 did not take part"), error
    assert time.monotonic() - began < 120, "the time-out, the wait for the rank, and torchrun"
    assert (out / "checkpoint.pt").exists()
