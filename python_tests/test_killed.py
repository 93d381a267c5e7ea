"""Commands that are killed at any moment end, when they are given again, in the uninterrupted result."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

KILLS, CHAINS = 30, 5
"""How often the command is killed, in so many folders; each is then left to end."""
LATEST_SECONDS = 12.0

COMMAND = [
    *(sys.executable, "-m", "fastsam.cli", "reproduce", "figure3", "--data", "digits-lt"),
    *("--epochs", "12", "--batch-size", "92", "--steps", "2", "--threads", "1", "--quiet", "--out"),
]


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run says, but for the time it took; of other files that they are there.

    Spectra have their extremes to rounding: by which way products are computed is measured anew.
    """
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == "result.json":
            content = json.loads(path.read_text())
            for record in content["history"]:
                del record["seconds"]
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
    """The same with plain numbers, to be compared with tolerances on the other side."""
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
