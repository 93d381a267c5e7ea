"""The error of a rank names the rank that failed or is missing, and each rank that fails writes a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from fastsam.distributed import World, torchrun_world
from fastsam.rank_errors import RankError
from python_tests.ranks import free_port, torchrun_variables

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")

TIMEOUT = 3.0
SIZE = 3


def _join(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= torchrun_variables(rank, SIZE, port)
    os.environ["TORCHELASTIC_ERROR_FILE"] = f"{folder}/elastic-{rank}.json"


def _use(rank: int, folder: str, what: str) -> None:
    with torchrun_world("cpu", timeout=TIMEOUT, errors=Path(folder)) as world:
        world.all_reduce([torch.ones(2)])
        if rank == 1 and what == "raises":
            raise KeyError("the reason")
        if rank == 1 and what == "dies":
            os._exit(3)
        if rank == 1 and what == "sleeps":
            time.sleep(6 * TIMEOUT)
        world.all_reduce([torch.ones(2)])


def _rank(rank: int, port: int, folder: str, what: str) -> None:
    _join(rank, port, folder)
    try:
        _use(rank, folder, what)
    except (RankError, KeyError) as error:
        Path(folder, f"seen-{rank}").write_text(f"{type(error).__name__}: {error}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("raises", "rank {}: rank 1 failed: KeyError: 'the reason'. Its own error is in"),
        ("sleeps", "rank {}: rank 1 did not take part in a collective within 3 seconds."),
        ("dies", "rank {}: rank 1 did not take part in a collective within 3 seconds."),
    ],
)
def test_the_message_names_the_rank(what: str, message: str, tmp_path: Path) -> None:
    for rank in range(SIZE):
        (tmp_path / f"error-rank-{rank}.txt").write_text("of an earlier run")
    port = free_port()
    context = torch.multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_rank, args=(rank, port, str(tmp_path), what))
        for rank in range(SIZE)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    for rank in (0, 2):
        seen = (tmp_path / f"seen-{rank}").read_text()
        assert seen.startswith("RankError: " + message.format(rank)), seen
        written = (tmp_path / f"error-rank-{rank}.txt").read_text()
        assert written.startswith(f"rank {rank} on ")
        assert message.format(rank) in written
        assert "world.all_reduce" in written, "the traceback shows where the rank waited"
        elastic = json.loads((tmp_path / f"elastic-{rank}.json").read_text())
        assert message.format(rank) in elastic["message"]["message"]
    own = tmp_path / "error-rank-1.txt"
    if what == "raises":
        assert "KeyError: 'the reason'" in own.read_text()
    if what == "dies":
        assert not own.exists(), "the file of the earlier run is gone"


SCRIPT = """
import os, sys
from fastsam.cli import main
from fastsam.longtail.training.step import Stepper

if os.environ["RANK"] == "1":
    def broken(*arguments):
        raise OSError("the disk of rank 1 is gone")
    Stepper._step = broken
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_training_run(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    options = ("--method", "ce", "--optimizer", "sgd", "--epochs", "1", "--rank-timeout", "20")
    done = subprocess.run(
        [sys.executable, *launcher, str(script), "train", *options, "--out", str(tmp_path / "run")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode != 0
    error = (tmp_path / "run" / "error-rank-1.txt").read_text()
    assert "OSError: the disk of rank 1 is gone" in error
    assert "the disk of rank 1 is gone" in done.stderr


def test_one_process_reports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(KeyError), torchrun_world("cpu", errors=tmp_path) as world:
        raise KeyError(world == World())
    assert not list(tmp_path.iterdir())
