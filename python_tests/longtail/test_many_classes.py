"""Data sets of 100 classes and of as many as iNaturalist 2018: training, results and contact sheets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastsam.longtail import Result, Trainer, recipe
from fastsam.longtail.data import LongTailData
from fastsam.longtail.data.sheet import write_sheets


@pytest.mark.parametrize(
    "method",
    ["ldam-drw", *(pytest.param(name, marks=pytest.mark.slow) for name in ("vs", "eql", "ce-rs"))],
)
def test_a_hundred_classes_are_learned(method: str, hundred_classes: LongTailData) -> None:
    config = recipe(
        "own:prototypes", method, "sgd", model="resnet8", epochs=4, batch_size=64, threads=1
    ).config()
    result = Trainer(config, data=hundred_classes, progress=False).fit()
    assert result.test.accuracy > 10  # chance is 1
    assert len(result.test.per_class) == 100
    assert Result.from_json(result.to_json()) == result


@pytest.mark.slow
def test_as_many_classes_as_inaturalist_has(inaturalist_classes: LongTailData) -> None:
    config = recipe(
        "own:prototypes", "ce-drw", "sgd", model="resnet8", epochs=1, batch_size=512, threads=1
    ).config()
    result = Trainer(config, data=inaturalist_classes, progress=False).fit()
    assert result.counts == inaturalist_classes.counts.tolist()
    assert result.test.images == len(result.test.per_class) == 8142
    assert result.test.accuracy == pytest.approx(np.mean(result.test.per_class))
    assert np.isfinite(result.history[-1].loss)
    assert Result.from_json(result.to_json()) == result


def test_sheets_of_some_classes_from_head_to_tail(
    inaturalist_classes: LongTailData, tmp_path: Path
) -> None:
    sheets = write_sheets(inaturalist_classes, tmp_path, columns=3, rows=1, classes=5)
    names = [path.name for path in sheets]
    assert names[0] == "0000-0-3.png"
    assert names[-2:] == ["8141-8141-1.png", "overview.png"]
    assert len(names) == 6
