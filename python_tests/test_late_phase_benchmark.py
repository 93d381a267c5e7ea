"""The benchmark of steps without an ascent and of runs with a late phase."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.late_phase import LatePhase
from benchmarks.shapes import CASES


@pytest.mark.slow
def test_both_parts_are_measured_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(CASES, "small", [(30, 7), (11,)])
    LatePhase(
        cases=("small",),
        threads=(1,),
        rounds=6,
        runs=2,
        model="resnet8",
        batch_size=2,
        steps=10,
        out=tmp_path,
    ).run()
    found = json.loads((tmp_path / "late_phase-cpu.json").read_text())
    assert [(row["base"], row["peer"], row["ratio_of_bytes"]) for row in found["steps"]] == [
        ("SGD", "fastsam", pytest.approx(24 / 20)),
        ("SGD", "fastsam, no check", 1.0),
        ("AdamW", "fastsam", pytest.approx(32 / 28)),
        ("AdamW", "fastsam, no check", 1.0),
    ]
    for row in found["steps"]:
        assert row["met"] == (row["ratio"]["upper"] <= row["bar"])
        assert row["ratio"]["median"] > 0
    assert all(len(seconds) == 2 for seconds in found["run"]["cpu_seconds"].values())
