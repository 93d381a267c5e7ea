"""Reports of runs that lack a score, a cost or curvature."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from fastsam.curvature import MatrixOperator, operator_spectrum
from fastsam.longtail import Result
from fastsam.longtail.landscape import ClassSpectrum
from fastsam.report import Run, Runs, accuracy_table, by_settings, render, spectrum_table
from fastsam.report.charts import accuracy, differences
from fastsam.report.comparison import PairedPanel
from fastsam.report.figures import comparison_figure, spectra_panels
from fastsam.report.pairs import paired_panels
from fastsam.report.printed import figures
from python_tests.report.made_runs import random_result, spectrum
from python_tests.report.test_page import Tables, charts


@pytest.fixture
def generator(seed: int) -> random.Random:
    return random.Random(seed)


def without(made: Result, group: str) -> Result:
    """Remove a group of classes, as data without such classes has none."""
    groups = {name: score for name, score in made.test.groups.items() if name != group}
    return replace(made, test=replace(made.test, groups=groups))


def uncounted(made: Result) -> Result:
    """Remove the cost, as an older version did not count it."""
    return replace(made, history=[replace(epoch, gradients=None) for epoch in made.history])


def trained(generator: random.Random, optimizer: str, seeds: int = 2) -> list[Result]:
    return [random_result(generator, optimizer, seed=k) for k in range(seeds)]


def panel(*results: Result) -> PairedPanel:
    (found,) = paired_panels(by_settings([Run(each) for each in results]))
    return found


def page(*results: Result) -> Tables:
    """Return the page; the JSON of its figures may not hold NaN or infinity."""
    found = Tables(render(Runs([Run(each) for each in results])))
    json.loads(found.scripts["report-data"], parse_constant=pytest.fail)
    return found


def test_a_group_that_no_run_has_is_compared_nowhere(generator: random.Random) -> None:
    sgd, sam = (
        [without(made, "tail") for made in trained(generator, optimizer)]
        for optimizer in ("sgd", "sam")
    )
    found = page(*sgd, *sam)
    gap = np.mean([a.test.balanced - b.test.balanced for a, b in zip(sam, sgd, strict=True)])
    (row,) = found.tables["differences"][1:]
    assert row[3].startswith(f"{gap:+.1f} [")
    assert row[5:7] == ["", "unknown"]
    assert "tail" not in found.tables["accuracy"][0]
    (verdict,) = panel(*sgd, *sam).verdicts()
    assert "unknown" not in verdict[0]
    assert "tail" not in verdict[1]
    assert "nan" not in verdict[1]
    titles = [chart.title for chart in differences([panel(*sgd, *sam)])]
    assert titles == ["Balanced accuracy"]


def test_a_score_that_one_seed_lacks_is_unknown(generator: random.Random) -> None:
    sgd, sam, late = (trained(generator, name) for name in ("sgd", "sam", "asam"))
    late[1] = without(late[1], "tail")
    groups = by_settings([Run(each) for each in (*sgd, *sam, *late)])
    cells = dict(zip(("sgd", "sam", "asam"), accuracy_table(groups).rows, strict=True))
    tails = [made.test.groups["tail"] for made in sgd]
    assert cells["sgd"][5] == f"{np.mean(tails):.1f} +- {np.std(tails, ddof=1):.1f}"
    assert cells["asam"][5] == ""
    assert cells["asam"][4] != ""
    seeds, means = accuracy(groups).data[-2:]
    assert late[0].test.groups["tail"] in seeds["y"]
    assert len(means["y"]) == len(means["error_y"]["array"]) == 4
    compared = panel(*sgd, *sam, *late)
    balanced, tail = differences([compared])
    assert len(balanced.data[1]["x"]) == 2
    assert balanced.layout["annotations"] == []
    assert len(tail.data[1]["x"]) == 1
    (note,) = tail.layout["annotations"]
    assert (note["text"], note["y"]) == ("unknown", 1)
    assert [x is None for x in tail.data[0]["x"]] == [False, False, False, True]


def test_a_printed_figure_names_what_is_unknown(generator: random.Random) -> None:
    sgd, sam = trained(generator, "sgd"), trained(generator, "sam")
    sam[0] = without(sam[0], "tail")
    balanced, tail = comparison_figure([panel(*sgd, *sam)]).axes
    assert [text.get_text() for text in balanced.texts] == []
    assert [text.get_text() for text in tail.texts] == ["unknown"]

    def intervals(axes: Axes) -> list[Any]:
        bars = [each for each in axes.collections if isinstance(each, LineCollection)]
        drawn = [segment for bar in bars for segment in bar.get_segments()]
        return [each for each in drawn if np.isfinite(each).all() and len(each)]

    assert len(intervals(balanced)) == 1
    assert intervals(tail) == []


def test_runs_on_two_sets_one_without_a_group(generator: random.Random) -> None:
    sgd = trained(generator, "sgd")
    other = [
        without(replace(made, config={**made.config, "imbalance": 7.5}), "tail")
        for made in trained(generator, "sgd")
    ]
    first, second = page(*sgd, *other).tables["accuracy"][1:]
    tails = [made.test.groups["tail"] for made in sgd]
    assert first[5] == f"{np.mean(tails):.1f} ± {np.std(tails, ddof=1):.1f}"
    assert second[5] == ""
    upper = dict(figures(Runs([Run(each) for each in (*sgd, *other)])))["accuracy"].axes[0]
    assert len(upper.get_xticks()) == 5


def test_a_class_without_test_images(generator: random.Random) -> None:
    made = [
        replace(one, test=replace(one.test, per_class=[math.nan, *one.test.per_class[1:]]))
        for one in trained(generator, "sgd")
    ]
    found = page(*made)
    assert found.tables["classes"][1][3] == ""
    assert found.tables["classes"][2][3] != ""
    (drawn,) = (
        c["data"][0] for c in charts(found) if "training images" in str(c["data"][-1].get("name"))
    )
    assert [y is None for y in drawn["y"]] == [True, False, False, False]
    assert dict(figures(Runs([Run(each) for each in made])))["classes"]


@pytest.mark.parametrize("older", ["sam", "sgd", "one seed of sam"])
def test_unknown_costs_are_left_out(older: str, generator: random.Random) -> None:
    sgd, sam = trained(generator, "sgd"), trained(generator, "sam")
    if older == "sgd":
        sgd = list(map(uncounted, sgd))
    else:
        sam = [uncounted(sam[0]), sam[1] if "seed" in older else uncounted(sam[1])]
    compared = panel(*sgd, *sam)
    assert math.isnan(compared.cost("sam"))
    assert "Cost" not in compared.verdicts()[0][1]
    assert compared.differences().rows[0][-1] == ""
    assert [row[-1] for row in compared.table().rows][1:] == [""]
    labels = comparison_figure([compared]).axes[0].get_yticklabels()
    assert all("gradients" not in label.get_text() for label in labels)


def test_costs_of_two_arms_are_compared_also_if_the_first_did_not_count(
    generator: random.Random,
) -> None:
    sgd, sam, asam = (trained(generator, name) for name in ("sgd", "sam", "asam"))
    found = panel(*map(uncounted, sgd), *sam, *asam)
    found = replace(found, pairs=[["asam", "sam"]])
    costs = [np.mean([made.gradients for made in each]) for each in (asam, sam)]
    assert [row[-1] for row in found.differences().rows] == [
        "",
        "",
        f"{costs[0] / costs[1]:.2f}x",
    ]


def zero() -> ClassSpectrum:
    """Return the spectrum of a Hessian that is 0."""
    matrix = MatrixOperator(torch.zeros(4, 4, dtype=torch.float64))
    return replace(spectrum(), spectrum=operator_spectrum(matrix, steps=3, progress=False))


def test_a_hessian_of_zero_has_no_ratio(generator: random.Random) -> None:
    item = zero()
    assert (item.spectrum.lambda_max, item.spectrum.lambda_max_residual) == (0, 0)
    assert all(map(math.isnan, item.ratio_bounds))
    (row,) = spectrum_table([item]).rows
    assert row[3] == "-"
    made = random_result(generator, "sgd")
    found = Tables(render(Runs([Run(made, "a", (item, spectrum("3")))])))
    ratios = [row[3] for row in found.tables["spectra"][1:]]
    assert "-" in ratios
    assert any(ratio.startswith("0.2500 [") for ratio in ratios)
    assert "nan" not in spectra_panels([item])
