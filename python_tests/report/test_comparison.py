"""What a comparison over seeds says, against numbers worked out by hand and by scipy."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_rel

from fastsam.longtail.errors import DataError
from fastsam.report import Arm, PairedComparison, PairedPanel
from fastsam.report.canvas import svg
from fastsam.report.comparison import SCORES
from fastsam.report.figures import comparison_figure, comparison_png


def made(seed: int, seeds: int = 5) -> PairedPanel:
    """Three arms; calibration gives the first 4 points, the last is 3 points ahead of the second."""
    generator = np.random.default_rng(seed)

    def scores(level: float) -> dict[str, list[float]]:
        return {
            name: (level + place + generator.normal(0, 0.2, seeds)).tolist()
            for place, name in enumerate(SCORES)
        }

    arms = [
        Arm("plain", 100.0, scores(70), scores(74)),
        Arm("free", 100.0, scores(72), scores(74.1)),
        Arm("dear", 150.0, scores(75), scores(77.1)),
    ]
    return PairedPanel("data", arms, [["dear", "free"]])


def test_verdicts_say_who_wins_by_how_much_at_what_cost(seed: int) -> None:
    calibrated, free, dear, pair = made(seed).verdicts()
    assert calibrated[0] == "plain, calibrated vs. as trained: better."
    assert free[0] == "free vs. plain: no difference."
    assert free[1].endswith(" Cost: 1x the gradients.")
    assert dear[0] == "dear vs. plain: better."
    assert dear[1].startswith("After calibration: balanced accuracy +")
    assert dear[1].endswith(" Cost: 1.5x the gradients.")
    assert pair[0] == "dear vs. free: better."


def test_differences_are_those_of_scipy(seed: int) -> None:
    panel = made(seed)
    found = panel.difference("dear", "free", "raw", "tail")
    free, dear = (arm.raw["tail"] for arm in panel.arms[1:])
    expected = ttest_rel(dear, free)
    assert found.mean == pytest.approx(np.mean(dear) - np.mean(free))
    assert found.interval == pytest.approx(tuple(expected.confidence_interval(0.95)))
    low, high = expected.confidence_interval(0.95)
    assert f"{found.mean:+.1f} [{low:.1f}, {high:.1f}]" in panel.verdicts()[-1][1]


def test_table_has_a_row_for_each_arm_as_trained_and_calibrated(seed: int) -> None:
    panel = made(seed)
    table = panel.table()
    assert [row[0] for row in table.rows[:2]] == ["plain, raw", "plain, calibrated"]
    assert len(table.rows) == 6
    assert table.rows[-1][-1] == "1.50x"
    tail = np.array(panel.arms[2].calibrated["tail"])
    assert table.rows[-1][-2] == f"{tail.mean():.1f} +- {tail.std(ddof=1):.1f}"


def test_differences_hold_the_numbers_of_scipy_and_the_verdicts(seed: int) -> None:
    panel = made(seed)
    rows = panel.differences().rows
    assert [row[:2] for row in rows[:3]] == [
        ("free, minus plain", "as trained"),
        ("free, minus plain", "calibrated"),
        ("dear, minus plain", "as trained"),
    ]
    plain, free = panel.arms[0].calibrated, panel.arms[1].calibrated
    for score, cell in (("balanced", rows[1][3]), ("tail", rows[1][5])):
        low, high = ttest_rel(free[score], plain[score]).confidence_interval(0.95)
        mean = np.mean(free[score]) - np.mean(plain[score])
        assert cell == f"{mean:+.1f} [{low:.1f}, {high:.1f}]"
    assert [row[4] for row in rows[1::2]] == ["no difference", "better", "better"]
    assert rows[-1][-1] == "1.50x"


def test_without_calibration_the_verdict_is_on_runs_as_trained(seed: int) -> None:
    panel = made(seed)
    raw = PairedPanel("data", [replace(arm, calibrated={}, gradients=0) for arm in panel.arms], [])
    assert raw.judged == ("raw",)
    found = [verdict for verdict, _ in raw.verdicts()]
    assert found == ["free vs. plain: better.", "dear vs. plain: better."]
    assert all("x the gradients" not in numbers for _, numbers in raw.verdicts())  # unknown
    assert len(raw.differences().rows) == 2
    assert len(raw.table().rows) == 3


@pytest.mark.parametrize("seeds", [1, 4])
def test_figure_is_a_picture_with_every_arm(seeds: int, seed: int) -> None:
    from PIL import Image

    comparison = PairedComparison(seeds, [made(seed, seeds), made(seed + 1, seeds)])
    picture = svg(comparison_figure(comparison.panels))
    ElementTree.fromstring(picture)
    assert picture == svg(comparison_figure(comparison.panels))
    sizes = [
        Image.open(io.BytesIO(comparison_png(PairedComparison(seeds, panels)))).size
        for panels in (comparison.panels[:1], comparison.panels)
    ]
    assert sizes[0][0] == sizes[1][0]
    assert sizes[0][1] < sizes[1][1]


def test_one_seed_has_no_interval_and_no_verdict(seed: int) -> None:
    for verdict, numbers in made(seed, seeds=1).verdicts():
        assert verdict.endswith(": undecided.")
        assert "[" not in numbers


def test_file_keeps_a_comparison_and_refuses_others(tmp_path: Path, seed: int) -> None:
    comparison = PairedComparison(5, [made(seed)])
    comparison.save(tmp_path)
    path = tmp_path / PairedComparison.FILE
    assert PairedComparison.load(path) == comparison
    path.write_text("{}")
    with pytest.raises(DataError, match="not a comparison"):
        PairedComparison.load(path)
