"""Runs that are killed or asked to stop at random moments end on the bits of the uninterrupted run.

``FASTSAM_INTERRUPTIONS`` multiplies the number of interruptions: 20 makes 100 kills and 40 requests to stop.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastsam.longtail import Checkpoint
from fastsam.longtail.training import RunFolder
from python_tests.test_killed import children

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")

SCALE = int(os.environ.get("FASTSAM_INTERRUPTIONS", "1"))
SEED = int(os.environ.get("FASTSAM_TEST_SEED", "25"))
MOST_REPEATED = 6
SCRIPT = Path(__file__).with_name("counted_run.py")
TRAIN = [
    *("train", "--method", "ldam-drw", "--optimizer", "sam", "--epochs", "8", "--batch-size", "48"),
    *("--checkpoint-steps", str(MOST_REPEATED), "--threads", "1", "--quiet", "--resume", "auto"),
]
TORCHRUN = [
    *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    *("--max-restarts", "100", "--monitor-interval", "0.1"),
    *("--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"),
]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    # Rank 0 hosts the store of the process group itself, so that a restart does not meet the old one.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    "PYTHONPATH": os.pathsep.join(
        [str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")]
    ).rstrip(os.pathsep),
}


def start(out: Path, *, ranks: int = 1, command: Sequence[str] = TRAIN) -> subprocess.Popen[str]:
    launcher = TORCHRUN if ranks > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, str(SCRIPT), *command, "--out", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


def finish(out: Path, *, ranks: int = 1, command: Sequence[str] = TRAIN) -> dict[str, Any]:
    """Run a command to its end, and return the state of the run."""
    process = start(out, ranks=ranks, command=command)
    error = process.communicate(timeout=600)[1]
    assert process.returncode == 0, error
    return state(out)


def state(out: Path) -> dict[str, Any]:
    """Return what the uninterrupted run has too."""
    checkpoint = Checkpoint.load(out)
    result = json.loads((out / "result.json").read_text())
    return {
        "weights": checkpoint.model,
        "optimizer": checkpoint.optimizer["state"],
        "losses": [epoch["loss"] for epoch in result["history"]],
        "gradients": [epoch["gradients"] for epoch in result["history"]],
        "test": result["test"],
    }


def assert_same(one: Any, other: Any) -> None:
    """Check that two nested values are equal, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_same(value, other[key])
    else:
        assert one == other


def steps_of(out: Path, rank: int = 0) -> list[str]:
    file = out.parent / f"{out.name}-steps-{rank}.txt"
    return file.read_text().splitlines() if file.exists() else []


def most_repeated(lines: list[str]) -> int:
    """Return how many steps at most one start of the run repeated of those before it."""
    most, seen = 0, set[str]()
    for part in "\n".join(lines).split("start\n"):
        steps = part.splitlines()
        most = max(most, sum(step in seen for step in steps))
        seen.update(steps)
    return most


def wait_for_steps(out: Path, count: int, process: subprocess.Popen[str]) -> bool:
    """Wait until rank 0 has made more than ``count`` steps; return False if the run has ended before."""
    return wait_until(lambda: len(steps_of(out)) > count, process)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> bool:
    """Wait until a condition holds; return False if the run has ended before."""
    end = time.monotonic() + 240.0
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < end
        time.sleep(0.01)
    return True


def wait_for_point(out: Path, process: subprocess.Popen[str], before: str, *, within: bool) -> str:
    """Wait until the newest checkpoint is another one, of a whole epoch or within one; return its name."""
    newest = before

    def moved() -> bool:
        nonlocal newest
        newest = next((point.name for point in RunFolder(out).points()), before)
        return newest != before and ("step" in newest) is within

    assert wait_until(moved, process), process.communicate()
    return newest


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """The uninterrupted run on one and on two ranks."""
    folder = tmp_path_factory.mktemp("whole")
    found = {}
    for ranks in (1, 2):
        found[ranks] = finish(folder / str(ranks), ranks=ranks)
    return found


@pytest.mark.parametrize(
    ("ranks", "number", "count"),
    [(1, signal.SIGKILL, 3), (1, signal.SIGTERM, 1), (2, signal.SIGKILL, 2)],
)
def test_interrupted_at_random_moments(
    ranks: int, number: int, count: int, whole: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    rng = np.random.default_rng([SEED, ranks, number])
    left, chain = count * SCALE, 0
    while left > 0:
        out = tmp_path / str(chain)
        chain += 1
        while True:
            process = start(out, ranks=ranks)
            ended = False
            while left > 0 and not ended:
                ended = not wait_for_steps(
                    out, len(steps_of(out)) + int(rng.integers(0, 12)), process
                )
                time.sleep(float(rng.uniform(0, 0.1)))
                if not ended:
                    victims = children(process.pid) if ranks > 1 else [process.pid]
                    os.kill(int(rng.choice(victims)), number)
                    left -= 1
                if ranks == 1:
                    break
            error = process.communicate(timeout=600)[1]
            if process.returncode == 0:
                assert steps_of(out)  # otherwise no moment would ever come
                break
            if number == signal.SIGKILL:
                assert ranks == 1, error
                assert process.returncode == -signal.SIGKILL, error
                assert error == ""
            else:
                assert process.returncode == 75, error
                # Before the first step, there is nothing to save: "Run the same command again".
                assert "run the same command" in error.lower()
                assert len(error.strip().splitlines()) <= 2, error
        assert_same(state(out), whole[ranks])
        assert not [*out.rglob(".fastsam-*")]
        assert most_repeated(steps_of(out)) <= (0 if number == signal.SIGTERM else MOST_REPEATED)


@pytest.mark.slow
def test_two_ranks_asked_to_stop_both_save(
    whole: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    """The launcher passes SIGTERM on to both ranks, at different moments."""
    rng = np.random.default_rng([SEED, 2])
    for turn in range(SCALE):
        out = tmp_path / str(turn)
        process = start(out, ranks=2)
        assert wait_for_steps(out, int(rng.integers(0, 20)), process)
        process.terminate()
        error = process.communicate(timeout=120)[1]
        assert process.returncode not in (0, None), error
        assert error.count("run the same command with --resume auto") == 2, error
        assert_same(finish(out, ranks=2), whole[2])
        assert most_repeated(steps_of(out)) == 0


@pytest.mark.slow
def test_ranks_end_with_their_launcher(whole: dict[int, dict[str, Any]], tmp_path: Path) -> None:
    """Otherwise they would train on and hold the lock of the run."""
    out = tmp_path / "run"
    process = start(out, ranks=2)
    assert wait_for_steps(out, 20, process)
    process.kill()
    process.communicate(timeout=60)  # the ranks have ended: they hold the pipe, too
    assert_same(finish(out, ranks=2), whole[2])
    assert most_repeated(steps_of(out)) <= MOST_REPEATED


def write_stub(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


@pytest.mark.slow
def test_the_slurm_script_queues_itself_until_the_run_is_finished(
    whole: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    """Stubs stand for Slurm. ``FASTSAM_PREEMPT_SECONDS`` preempts each job after a time instead of steps.

    Each of the 48 steps then takes a second longer, so that the run needs several jobs of 20 seconds.
    """
    seconds = float(os.environ.get("FASTSAM_PREEMPT_SECONDS", "0"))
    steps = 1 if seconds else 15
    stubs, out = tmp_path / "bin", tmp_path / "run"
    stubs.mkdir()
    write_stub(stubs / "srun", 'test "$1" = --cpus-per-task=64 && shift && exec "$@"')
    write_stub(
        stubs / "scontrol",
        f'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> {tmp_path}/requeued; fi',
    )
    write_stub(stubs / "torchrun", f'exec {sys.executable} -m torch.distributed.run "$@"')
    write_stub(stubs / "fastsam", f'exec {sys.executable} {SCRIPT} "$@"')
    options = [option for option in TRAIN[1:] if option not in ("--resume", "auto")]
    jobs = 0
    while not (out / "result.json").exists():
        jobs, began = jobs + 1, time.monotonic()
        assert jobs < 100
        job = subprocess.Popen(
            ["bash", str(SCRIPT.parents[1] / "examples" / "train.sbatch"), str(out), *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **ENVIRONMENT,
                "PATH": f"{stubs}:{os.environ['PATH']}",
                "SLURM_JOB_ID": str(jobs),
                "SLURM_JOB_NUM_NODES": "1",
                "SLURM_JOB_NODELIST": "here",
                "SLURM_GPUS_ON_NODE": "2",
                "SLURM_CPUS_PER_TASK": "64",
                "FASTSAM_STEP_SECONDS": "1" if seconds else "0",
            },
        )
        if wait_for_steps(out, len(steps_of(out)) + steps, job):
            time.sleep(max(0.0, began + seconds - time.monotonic()))
            for child in children(job.pid):
                os.kill(child, signal.SIGUSR1)
        error = job.communicate(timeout=300)[1]
        assert job.returncode == 0, error
    assert jobs >= 3
    requeued = (tmp_path / "requeued").read_text().splitlines()
    assert requeued == [f"requeue {job}" for job in range(1, jobs)]
    assert_same(state(out), whole[2])
    assert most_repeated(steps_of(out)) == 0
