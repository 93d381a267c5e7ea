"""The benchmark of the data path: its contestants read, and its checks hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.data_path import DataPath


@pytest.mark.slow
def test_a_small_race(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    DataPath(images=4, batch_size=4, batches=1, rounds=2, device="cpu", out=tmp_path).run()
    assert "training: CPU time of the worker per image" in capsys.readouterr().out
    stored = json.loads((tmp_path / "data_path-cpu.json").read_text())
    assert stored["checks"]["largest_difference_from_pillow"] <= 2
    assert len(stored["checks"]["equal_bits"]) == 6
    for part in stored["worker"].values():
        assert {"fastsam", "fastsam, packed", "before", "script"} <= part.keys()
        assert all(row["samples"] == 2 for row in part.values())
    assert stored["device_part"].keys() == {"augment, normalize", "normalize"}
