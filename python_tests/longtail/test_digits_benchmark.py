"""The digits benchmark: intervals, choice on validation images, and resuming."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_rel

from benchmarks import longtail_digits, machine
from benchmarks.longtail_digits import LongtailDigits, Run, differences, summary
from benchmarks.readme import _longtail_digits_table


def rows(seed: int) -> list[dict[str, float]]:
    drawn = np.random.default_rng(seed).normal(80, 2, (5, 4))
    return [dict(zip(longtail_digits.MEASURES, row, strict=True)) for row in drawn.tolist()]


def test_intervals_are_those_of_the_paired_t_test() -> None:
    left, right = rows(1), rows(2)
    for name, gap in differences(left, right).items():
        interval = ttest_rel(
            [r[name] for r in left], [r[name] for r in right]
        ).confidence_interval()
        assert gap["mean"] - gap["confidence_95"] == pytest.approx(interval.low)
        assert gap["mean"] + gap["confidence_95"] == pytest.approx(interval.high)
    assert summary(left)["tail"]["std"] == pytest.approx(np.std([r["tail"] for r in left], ddof=1))


def test_it_resumes_and_selects_on_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[Run] = []

    def train(self: Run) -> dict[str, Any]:
        trained.append(self)
        settings = dict(self.settings)
        good = settings.get("rho") == (0.2,) or settings.get("lr") == 0.05
        # Test accuracy would choose differently.
        value = 50.0 + self.seed + settings["epochs"] / 100
        test = dict.fromkeys(longtail_digits.MEASURES, value - 5 * good)
        return {"validation": 70.0 + good, "test": test, "subset": str(self.seed), "seconds": 0.0}

    monkeypatch.setattr(Run, "train", train)
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    clock = itertools.count()
    monkeypatch.setattr(longtail_digits.time, "monotonic", lambda: 30.0 * next(clock))
    case = {"cache": tmp_path / "cache", "seeds": 2, "save": True}
    with pytest.raises(SystemExit, match="runs are left"):
        LongtailDigits(**case, minutes=5.0).run()
    before = len(trained)
    assert 0 < before < 64
    LongtailDigits(**case).run()
    assert len(trained) == len({run.key for run in trained}) == 64 + 8
    (file,) = tmp_path.glob("longtail*.json")
    results = json.loads(file.read_text())
    assert results["subsets"] == ["0", "1"]
    entry = results["methods"]["vs"]
    assert entry["chosen"]["sgd"] == {"lr": 0.05, "weight_decay": 0.0005, "epochs": 60}
    assert entry["chosen"]["sam"]["rho"] == [0.2]
    assert [row["tail"] for row in entry["test"]["sam"]] == [45.6, 46.6]
    assert [row["tail"] for row in entry["test"]["sgd, twice the epochs"]] == [46.2, 47.2]
    assert [row["tail"] for row in entry["test"][longtail_digits.ALIKE]] == [50.6, 51.6]
    table = _longtail_digits_table(results)
    assert (
        "| vs, tail | 46.1 +- 0.7 | 46.1 +- 0.7 | 46.7 +- 0.7 | 51.1 +- 0.7 | +0.0 +- 0.0 |"
        in table
    )
    assert "vs: sgd lr 0.05 weight_decay 0.0005, sam rho 0.2" in table
    assert "ce all: worse" in table
