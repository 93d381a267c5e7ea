"""The page: every number on it is that of the JSON files, and every text is escaped."""

from __future__ import annotations

import json
import math
import random
import re
import statistics
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_rel

from fastsam.report import (
    PairedComparison,
    Run,
    Runs,
    by_settings,
    read_runs,
    render,
    write_report,
    write_tables,
)
from fastsam.report.timing import StepTiming
from python_tests.report.made_runs import named_comparison, random_result, result, spectrum

EVIL = "<evil>&'\"|_$x$"


class Tables(HTMLParser):
    """The texts of all cells, by table and row, and the data of the figures."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.scripts: dict[str, str] = {}
        self.tags: set[str] = set()
        self._into: str | None = None
        self._name = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.add(tag)
        if "data-table" in values:
            self._name = str(values["data-table"])
            self.tables[self._name] = []
        elif tag == "tr":
            self.tables[self._name].append([])
        elif tag in ("td", "th"):
            self.tables[self._name][-1].append("")
            self._into = tag
        elif tag == "script":
            self._into = "script"
            self._script = values.get("id") or ""

    def handle_endtag(self, tag: str) -> None:
        if tag == self._into:
            self._into = None

    def handle_data(self, data: str) -> None:
        if self._into == "script":
            self.scripts[self._script] = self.scripts.get(self._script, "") + data
        elif self._into is not None:
            self.tables[self._name][-1][-1] += data


@pytest.fixture(scope="module")
def page(folder: Path) -> Tables:
    return Tables((folder / "report.html").read_text())


@pytest.fixture(scope="module")
def stored(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/result.json")}


def spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.1f}"


GROUPED = {
    "ce-drw sgd, 2 seeds": ["sgd-0", "sgd-1"],
    "ce-drw sam, ascent_start defer": ["late"],
    "ce-drw sam, ascent_start 0, 2 seeds": ["sam-0", "sam-1"],
}


def test_numbers_of_tables_are_those_of_the_files(
    page: Tables, stored: dict[str, dict[str, Any]]
) -> None:
    accuracy = {row[0]: row[1:] for row in page.tables["accuracy"][1:]}
    calibration = {row[0]: row[1:] for row in page.tables["calibration"][1:]}
    classes = page.tables["classes"]
    assert list(accuracy) == list(GROUPED)
    for name, members in GROUPED.items():
        runs = [stored[member] for member in members]
        tests = [run["test"] for run in runs]
        assert accuracy[name] == [
            spread([test["accuracy"] for test in tests]),
            spread([test["balanced"] for test in tests]),
            *(
                spread([test["groups"][group] for test in tests])
                for group in ("head", "mid", "tail")
            ),
            spread([test["ece"] for test in tests]),
            f"{statistics.mean(sum(e['gradients'] for e in run['history']) for run in runs):.0f}",
            spread([run["seconds"] for run in runs]),
        ]
        confidence = [sum(b["share"] * b["confidence"] for b in t["bins"]) / 100 for t in tests]
        assert calibration[name][1] == f"{statistics.mean(confidence):.1f}"
        assert calibration[name][3] == f"{statistics.mean(t['nll'] for t in tests):.3f}"
        column = classes[0].index(name)
        by_class = {row[0]: row[column] for row in classes[1:]}
        for label, class_name in enumerate(runs[0]["class_names"]):
            assert by_class[class_name] == spread([test["per_class"][label] for test in tests])
    assert [row[2] for row in classes[1:]] == ["90", "40", "7", "2"]


def test_confusions_are_sums_over_seeds(page: Tables, stored: dict[str, dict[str, Any]]) -> None:
    rows = [row[1:] for row in page.tables["confusions"][1:] if row[0] == "ce-drw sgd, 2 seeds"]
    names = stored["sgd-0"]["class_names"]
    matrix = np.zeros((4, 4), dtype=int)
    for run in ("sgd-0", "sgd-1"):
        for i, j, images in stored[run]["test"]["confusion"]:
            matrix[i, j] += images
    wrong = sorted((-matrix[i, j], i, j) for i in range(4) for j in range(4) if i != j)[:5]
    assert rows == [
        [names[i], names[j], str(-n), f"{-100 * n / matrix[i].sum():.1f}"] for n, i, j in wrong
    ]


def test_origins_are_those_of_the_files(page: Tables, stored: dict[str, dict[str, Any]]) -> None:
    header, *rows = page.tables["runs"]
    found = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert found.keys() == stored.keys()
    for name, row in found.items():
        origin = stored[name]["origin"]
        assert row["date"] == origin["date"]
        assert row["command"] == origin["command"]
        assert row["version"] == origin["version"]
        assert origin["commit"].startswith(row["commit"])
        assert row["seed"] == str(stored[name]["config"]["seed"])


def charts(page: Tables) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(page.scripts["report-data"])["charts"]
    return found


def traces(page: Tables, label: str) -> list[dict[str, Any]]:
    """Traces of the figure whose y axis has a title."""
    (found,) = (
        c for c in charts(page) if c["layout"]["yaxis"].get("title", {}).get("text") == label
    )
    data: list[dict[str, Any]] = found["data"]
    return data


@pytest.mark.parametrize(
    ("label", "value"), [("loss", "loss"), ("learning rate", "lr"), ("rho", "rho")]
)
def test_curves_are_those_of_the_files(
    label: str, value: str, page: Tables, stored: dict[str, dict[str, Any]]
) -> None:
    lines = [list(zip(trace["x"], trace["y"], strict=True)) for trace in traces(page, label)]
    expected = [
        [(epoch["epoch"], epoch[value]) for epoch in run["history"]]
        for run in stored.values()
        if run["history"][0][value] is not None
    ]
    assert sorted(lines) == sorted(expected)
    assert len(lines) == (3 if value == "rho" else 5)


def test_differences_of_pairs_are_those_of_the_files(
    page: Tables, stored: dict[str, dict[str, Any]]
) -> None:
    (row,) = page.tables["differences"][1:]
    assert row[:3] == ["sam, ascent_start 0, minus sgd", "as trained", "2"]
    for cell, score in ((row[3], "balanced"), (row[5], "tail")):
        sam, sgd = (
            [{**test, **test["groups"]}[score] for test in tests]
            for tests in (
                [stored[f"{name}-{seed}"]["test"] for seed in (0, 1)] for name in ("sam", "sgd")
            )
        )
        low, high = ttest_rel(sam, sgd).confidence_interval(0.95)
        assert cell == f"{np.mean(sam) - np.mean(sgd):+.1f} [{low:.1f}, {high:.1f}]"
    found = [c for c in charts(page) if "difference" in str(c["layout"]["xaxis"].get("title"))]
    assert len(found) == 2
    seeds, means = found[1]["data"]
    assert sorted(seeds["x"]) == pytest.approx(sorted(np.subtract(sam, sgd)))
    assert means["x"][0] + means["error_x"]["array"][0] == pytest.approx(high)
    assert means["text"][0].endswith(row[6])


def test_deferral_and_ascent_start_are_marked(page: Tables, stored: dict[str, Any]) -> None:
    defer = stored["late"]["config"]["defer_epoch"]
    (found,) = (
        c for c in charts(page) if c["layout"]["yaxis"].get("title", {}).get("text") == "loss"
    )
    ((shape,), (note,)) = found["layout"]["shapes"], found["layout"]["annotations"]
    assert shape["x0"] == shape["x1"] == note["x"] == defer + 0.5
    assert note["text"] == "deferral, ascents begin"
    assert note["name"] == "0 1 2"


def test_reliability_is_that_of_the_bins(page: Tables, stored: dict[str, dict[str, Any]]) -> None:
    (found,) = (
        c["data"]
        for c in charts(page)
        if c["layout"]["xaxis"].get("title", {}).get("text") == "confidence, %"
    )
    lines = [list(zip(t["x"], t["y"], t["customdata"], strict=True)) for t in found[1:]]
    expected = [
        [(b["confidence"], b["accuracy"], b["share"]) for b in run["test"]["bins"]]
        for run in stored.values()
    ]
    assert sorted(lines) == sorted(expected)


def test_matrices_are_shares_of_each_class(page: Tables, stored: dict[str, dict[str, Any]]) -> None:
    found = [c["data"][0] for c in charts(page) if c["data"][0]["type"] == "heatmap"]
    assert len(found) == 3
    matrix = np.zeros((4, 4))
    for i, j, images in stored["late"]["test"]["confusion"]:
        matrix[i, j] = images
    order = [0, 2, 1, 3]  # by training images
    matrix = matrix[np.ix_(order, order)]
    assert found[1]["customdata"] == matrix.tolist()
    np.testing.assert_allclose(found[1]["z"], 100 * matrix / matrix.sum(axis=1, keepdims=True))


def test_densities_are_those_of_the_spectrum(page: Tables, folder: Path) -> None:
    (item,) = read_runs(folder).spectra
    curve, ends = traces(page, "density")
    grid = np.array(curve["customdata"])
    np.testing.assert_allclose(curve["y"], item.spectrum.density(grid).clip(1e-7), rtol=1e-3)
    linear = 0.1  # a power of ten below a fiftieth of 8
    np.testing.assert_allclose(curve["x"], np.arcsinh(grid / linear), atol=1e-4)
    np.testing.assert_allclose(ends["x"], np.arcsinh(np.array([-2.0, 8.0]) / linear))
    assert ends["text"][0].startswith("smallest eigenvalue -2 within")


def test_figures_are_valid_for_plotly(page: Tables) -> None:
    from plotly.graph_objects import Figure

    for chart in charts(page):
        Figure(chart)  # refuses names and values that Plotly does not know


def test_copied_tables_have_the_texts_of_the_page(
    page: Tables, folder: Path, tmp_path: Path
) -> None:
    data = json.loads(page.scripts["report-data"])["tables"]
    write_tables(read_runs(folder), tmp_path)
    for name, rows in page.tables.items():
        assert data[name].keys() == {"csv", "md", "tex"}
        for format, lines in data[name].items():
            text = "".join(s + b.join(cells) + e + "\n" for s, cells, b, e, _ in lines)
            assert (tmp_path / f"{name}.{format}").read_text() == text
        markdown = [line for line in data[name]["md"] if line[4] is not None]
        unescaped = [
            [re.sub(r"\\(.)", r"\1", cell).replace("&amp;", "&") for cell in line[1]]
            for line in markdown
        ]
        assert unescaped == rows[1:]


def test_page_needs_no_network_and_holds_no_number_that_is_not_json(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    own = page[: page.index('id="report-data"')]
    assert not re.search(r"src=|<link|https?://", own)
    json.loads(Tables(page).scripts["report-data"], parse_constant=pytest.fail)


def test_numbers_that_are_not_finite_are_left_out_of_figures() -> None:
    made = random_result(random.Random(1), "sgd")
    test = replace(made.test, per_class=[math.nan, *made.test.per_class[1:]])
    text = render(Runs([Run(replace(made, test=test))]))
    found = Tables(text)
    json.loads(found.scripts["report-data"], parse_constant=pytest.fail)
    assert found.tables["classes"][1][3] == ""


def test_every_text_of_a_page_is_escaped() -> None:
    made = random_result(random.Random(1), "sgd")
    made = replace(
        made,
        config={**made.config, "data": EVIL, "model": EVIL},
        sources={"lr": EVIL},
        rule=EVIL,
        environment={EVIL: EVIL},
        subset_hash=EVIL,
        class_names=[EVIL, "b", "c", "d"],
        groups={EVIL: [0], "head": [1], "mid": [2], "tail": [3]},
        test=replace(made.test, groups={EVIL: 1.0, "tail": 2.0}),
        origin=replace(made.origin, **dict.fromkeys(asdict(made.origin), EVIL)),
    )
    shown = spectrum()
    shown = replace(shown, subject=replace(shown.subject, run=EVIL, name=EVIL))
    timing = StepTiming([10.0], [40.0], 3, 100, 1e-8, 1, EVIL)
    page = render(Runs([Run(made, EVIL, (shown,))], [shown], named_comparison(EVIL), timing))
    assert "<evil" not in page
    found = Tables(page)
    assert "evil" not in found.tags
    for name in ("accuracy", "classes", "runs", "settings", "environment", "spectra", "arms"):
        assert any(EVIL in cell for row in found.tables[name] for cell in row), name
    # Plotly reads a part of HTML in texts.
    texts = json.dumps(charts(found))
    assert "<evil" not in texts
    assert "&lt;evil&gt;&amp;" in texts


def test_fifty_runs_make_a_small_page() -> None:
    generator = random.Random(2)
    many = [
        Run(random_result(generator, optimizer, seed=seed, lr=lr), f"{optimizer}-{lr}-{seed}")
        for optimizer in ("sgd", "sam")
        for lr in (0.1, 0.2, 0.3, 0.4, 0.5)
        for seed in range(5)
    ]
    page = render(Runs(many))
    assert len(by_settings(many)) == 10
    assert len(page) < 2_600_000  # of which Plotly, compressed, is 2 MB
    assert Tables(page).tables["runs"][1:][-1][0] == "sam-0.5-4"


def test_thousands_of_classes_have_no_table_and_no_matrix() -> None:
    made, classes = random_result(random.Random(3), "sgd"), 5100
    many = replace(
        made,
        class_names=[f"c{place}" for place in range(classes)],
        counts=list(range(classes)),
        test=replace(made.test, per_class=[50.0] * classes),
    )
    page = render(Runs([Run(many)]))
    assert "The table would have 5100 cells; per_class.csv of each run holds the numbers." in page
    assert "No matrix is shown for more than 30 classes." in page
    found = Tables(page)
    assert "classes" not in found.tables
    assert len(found.tables["confusions"]) == 6
    assert not any(chart["data"][0]["type"] == "heatmap" for chart in charts(found))


def test_one_seed_has_differences_without_an_interval() -> None:
    panel = named_comparison("data").panels[0]
    first = [
        replace(arm, raw={k: v[:1] for k, v in arm.raw.items()}, calibrated={})
        for arm in panel.arms
    ]
    comparison = PairedComparison(1, [replace(panel, arms=first)])
    page = render(Runs([Run(random_result(random.Random(3), "sgd"))], comparison=comparison))
    assert "<p>1 paired seed.</p>" in page
    assert Tables(page).tables["differences"][1][3:5] == ["+0.0", "undecided"]


def test_a_run_with_the_settings_and_seeds_of_another_is_named(seed: int) -> None:
    made = random_result(random.Random(seed), "sam", seed=1)
    page = render(Runs([Run(made, folder) for folder in ("first", "copy")]))
    assert "because another run has their settings and seeds: copy." in page
    assert "because another run" not in render(Runs([Run(made, "first")]))


def test_results_of_older_versions_have_a_page(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    old = json.loads(result("sam", 70.0).to_json())
    for name in ("sha256", "origin", "contents", "steps_per_epoch", "parent"):
        del old[name]
    for name in ("bins", "nll", "top5", "macro_f1"):
        del old["test"][name]
    del old["history"][0]["gradients"]
    (tmp_path / "old" / "result.json").write_text(json.dumps(old))
    found = Tables(write_report(tmp_path).read_text())
    assert found.tables["calibration"][1] == ["ce sam", "3.2", "", "70.0", ""]
