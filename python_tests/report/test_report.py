"""Tables, figures and the page, from made results."""

from __future__ import annotations

import csv
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastsam.curvature import MatrixOperator, operator_spectrum
from fastsam.longtail import Checkpoint, Result
from fastsam.longtail.errors import CheckpointError, DataError
from fastsam.longtail.landscape import ClassSpectrum
from fastsam.longtail.trained.calibration import Calibration, CalibratorScore
from fastsam.report import (
    Run,
    Runs,
    accuracy_table,
    by_settings,
    read_runs,
    render,
    spectrum_table,
    write_report,
    write_tables,
)
from fastsam.report.canvas import svg
from fastsam.report.figures import comparison_figure, curves, spectra_panels
from fastsam.report.tables import differing_settings, settings_table
from fastsam.report.text_table import TextTable
from fastsam.report.timing import StepTiming, time_sam_step
from python_tests.report.made_runs import named_comparison, result, spectrum


def runs(*results: Result) -> list[Run]:
    return [Run(each) for each in results]


def test_table_is_aligned() -> None:
    assert str(TextTable(("a", "bb"), (("ccc", "d"),))) == "a    bb\nccc   d"


def test_tables_hold_the_numbers() -> None:
    results = [result("sgd", 80.0), result("sam", 90.0)]
    table = accuracy_table(by_settings(runs(*results)))
    assert table.header == (
        "test accuracy, %",
        "all",
        "balanced",
        "head",
        "tail",
        "ECE",
        "gradients",
        "seconds",
    )
    assert table.rows[1] == ("ce sam", "90.0", "90.0", "90.0", "45.0", "3.2", "", "1.5")
    counted = [replace(r, history=[replace(e, gradients=4.0) for e in r.history]) for r in results]
    costs = [row[6] for row in accuracy_table(by_settings(runs(*counted))).rows]
    assert costs == [f"{4 * len(results[1].history)}"] * 2
    mixed = accuracy_table(by_settings(runs(counted[0], results[1])))
    assert [row[6] for row in mixed.rows] == ["4", ""]
    (row,) = spectrum_table([spectrum()]).rows
    assert row[1].startswith("8 +-")
    assert row[2].startswith("-2 +-")
    assert row[3].startswith("0.2500 [0.2500")
    assert row[4:] == ("0.5", "0.25", "7")


def test_settings_show_what_differs_and_where_all_come_from() -> None:
    one, other = result("sgd", 80.0), result("sam", 90.0)
    other = replace(other, environment={"torch": "older"})
    groups = by_settings(runs(one, replace(one, config={**one.config, "seed": 1}), other))
    table = differing_settings(groups)
    columns = dict(zip(table.header, zip(*table.rows, strict=True), strict=True))
    assert columns["optimizer"] == ("sgd", "sam")
    assert columns["rho"] == ("", "0.05")
    assert columns["torch"] == ("x & y", "older")
    assert not {"seed", "lr", "data"} & columns.keys()
    every = {row[0]: row[1:] for row in settings_table(groups).rows}
    assert every["rho"][0] == "differs"
    assert every["lr_milestones"][0] == "80 90"
    assert every["momentum"][1] == one.sources["momentum"]
    assert "tau" not in every
    same = differing_settings(by_settings(runs(one)))
    assert same.header == ("settings that differ",)


def test_seeds_share_a_row_and_other_settings_are_named() -> None:
    groups = by_settings(
        runs(
            result("sam", 80.0, seed=0, subset_seed=0),
            result("sam", 84.0, seed=1, subset_seed=1),
            result("sam", 84.0, seed=1, subset_seed=1),  # the same run, found twice
            result("sam", 70.0, rho=[0.5]),
            result("sgd", 60.0),
        )
    )
    rows = accuracy_table(groups).rows
    assert [row[0] for row in rows] == ["ce sam, rho 0.05, 2 seeds", "ce sam, rho 0.5", "ce sgd"]
    assert [row[1] for row in rows] == ["82.0 +- 2.8", "70.0", "60.0"]


def test_a_folder_names_runs_that_differ_in_many_settings() -> None:
    def run(folder: str, **settings: object) -> Run:
        return Run(result("sam", 80.0, **settings), folder)

    many = {"lr": 0.5, "weight_decay": 0.1, "epochs": 7}
    groups = by_settings(
        [run("a/seed-0/way", seed=0), run("a/seed-1/way", seed=1), run("b/seed-0/way", **many)]
    )
    assert [group.name for group in groups] == [
        "ce sam in a/way, 2 seeds",
        "ce sam in b/seed-0/way",
    ]
    groups = by_settings([run("way-0", seed=0), run("way-1", seed=1), run("", **many)])
    assert groups[0].label == "ce sam, epochs 100, lr 0.1, weight_decay 0.0005"
    assert groups[1].label == "ce sam, epochs 7, lr 0.5, weight_decay 0.1"


def test_another_place_or_an_older_record_is_not_another_setting() -> None:
    here = result("sam", 80.0)
    there = replace(here, config={**here.config, "device": "cuda", "seed": 1, "workers": 8})
    assert [group.name for group in by_settings(runs(here, there))] == ["ce sam, 2 seeds"]
    older = replace(here, config={k: v for k, v in here.config.items() if k != "channels_last"})
    assert [group.name for group in by_settings(runs(older, here))] == ["ce sam"]
    ordered = replace(here, config={**here.config, "channels_last": True})
    names = [group.name for group in by_settings(runs(older, here, ordered))]
    assert names == ["ce sam", "ce sam, channels_last True"]


def test_page_names_every_data_set() -> None:
    one, other = result("sgd", 80.0), result("sam", 70.0)
    other = replace(other, config={**other.config, "imbalance": 7.5}, counts=[30, 4])
    shaped = replace(one, config={**one.config, "kind": "step"}, counts=[100, 20])
    page = render(Runs(runs(one, one, other, shaped)))
    assert "<h1>fastsam: digits-lt, imbalance 50; digits-lt, imbalance 7.5</h1>" in page
    assert page.count("imbalance 50: 102 training images in 2 classes") == 1
    assert page.count("imbalance 50: 120 training images in 2 classes") == 1
    assert "imbalance 7.5: 34 training images in 2 classes, 30 in the largest and 4" in page


def test_seeds_with_other_counts_share_a_line() -> None:
    one = result("sgd", 80.0)
    other = replace(one, config={**one.config, "seed": 1}, counts=[90, 12])
    noisy = replace(one, config={**one.config, "label_noise": 0.4})
    page = render(Runs(runs(one, other, noisy)))
    assert "102 training images in 2 classes, 90 to 100 in the largest and 2 to 12 in the" in page
    assert "imbalance 50, 40 % wrong labels: 102 training images" in page


def test_ratio_bounds_follow_the_residuals() -> None:
    item = spectrum()
    low, high = item.ratio_bounds
    assert low <= 0.25 <= high
    assert high - low < 1e-9
    loose = operator_spectrum(
        MatrixOperator(torch.diag(torch.linspace(-2, 8, 40, dtype=torch.float64))),
        steps=5,
        progress=False,
    )
    wide = ClassSpectrum(item.subject, loose)
    low, high = wide.ratio_bounds
    exact = (2 - loose.lambda_min_residual, 2 + loose.lambda_min_residual)
    assert loose.lambda_min_residual > 1e-3
    assert low < abs(loose.lambda_min) / loose.lambda_max < high
    assert exact[0] / 9 < high
    assert math.isfinite(high)


@pytest.mark.slow
def test_figures_are_well_formed_and_repeatable() -> None:
    def draw() -> str:
        return spectra_panels([spectrum(), spectrum("redrawn"), spectrum("3")])

    ElementTree.fromstring(draw())
    assert draw() == draw()


Draw = Callable[[ClassSpectrum, str], str]
FIGURES: dict[str, Draw] = {
    "spectra": lambda item, name: spectra_panels([item]),
    "curves": lambda item, name: curves({name: [(0, 1), (1, 2)]}, x="x", y="y", title="a"),
    "titles": lambda item, name: curves({"a": [(0, 1)]}, x=name, y=name, title=name),
    "comparison": lambda item, name: svg(comparison_figure(named_comparison(name).panels)),
}


@pytest.mark.parametrize("name", [r"$\frac$", "$x$", "a$b", r"\$y$", "$"])
@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_names_in_figures_are_no_mathematics(draw: Draw, name: str) -> None:
    """Matplotlib takes text between dollar signs for formulas, and fails on one that it cannot parse."""
    import matplotlib as mpl

    item = spectrum()
    item = ClassSpectrum(replace(item.subject, run=name, name=name, group=name), item.spectrum)
    with mpl.rc_context({"svg.fonttype": "none"}):  # text as text
        figure = draw(item, name)
    assert name in "".join(ElementTree.fromstring(figure).itertext())


def test_a_page_of_older_results_says_what_they_lack() -> None:
    page = render(Runs(runs(result("sgd", 80.0))))
    assert page.count("Results of an older version have no") == 2
    assert "no bins of confidence, so no line in the figure: ce sgd." in page
    assert "no date, version and command: ce sgd." in page


def test_sections_follow_what_there_is() -> None:
    timing = StepTiming([10.0, 11.0], [40.0, 55.0], 3, 100, 1e-8, 1, "cpu")
    shown = Run(result("sgd", 80.0), "a", (spectrum(), spectrum("redrawn")))
    page = render(Runs([shown], timing=timing))
    assert "A mistake, on purpose" in page
    assert "4.5 times faster (rounds: 4.0 to 5.0)" in page
    plain = render(Runs(runs(result("sgd", 80.0))))
    assert "mistake, on purpose" not in plain
    assert "times faster" not in plain
    assert "Differences" not in plain


def test_report_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=r"no result\.json"):
        write_report(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "result.json").write_text(result("sam", 70.0).to_json())
    spectrum().save(tmp_path / "a" / "spectra")
    page = write_report(tmp_path)
    assert "ce sam" in page.read_text()
    assert capsys.readouterr().err == ""
    before = page.read_bytes()
    foreign = {
        "b/result.json": b"[1]",
        "c/result.json": b"\xff\xfe",
        "d/result.json": result("sgd", 70.0).to_json().replace("70.0", "71.0").encode(),
        "e/result.json": b"[" * 100_000,
        "a/spectra/class-9-x.json": b"{}",
        "class-1.json": b'{"fastsam_spectrum": 1, "settings": {"subject": 3}}',
        "timing.json": b'{"fused": "fast"}',
    }
    for name, content in foreign.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert write_report(tmp_path).read_bytes() == before
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(foreign)
    for name in foreign:
        assert sum(str(tmp_path / name) in line for line in lines) == 1, name


def test_class_spectrum_round_trip(tmp_path: Path) -> None:
    saved = spectrum()
    loaded = ClassSpectrum.load(saved.save(tmp_path))
    assert loaded.subject == saved.subject
    assert loaded.spectrum.lambda_max == saved.spectrum.lambda_max


def test_timing_measures_equal_optimizers_and_leaves_the_model(tmp_path: Path) -> None:
    model = torch.nn.Linear(5, 3)
    before = [p.detach().clone() for p in model.parameters()]
    inputs, targets = torch.randn(9, 5), torch.arange(9) % 3
    timing = time_sam_step(
        model,
        lambda m: torch.nn.functional.cross_entropy(m(inputs), targets),
        rounds=2,
        steps=2,
    )
    assert timing.difference < 1e-5
    assert len(timing.fused) == len(timing.plain) == 2
    assert min(timing.fused + timing.plain) > 0
    assert (timing.tensors, timing.parameters) == (2, 18)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    timing.save(tmp_path)
    assert StepTiming.load(tmp_path / StepTiming.FILE) == timing
    (tmp_path / StepTiming.FILE).write_text("[]")
    with pytest.raises(DataError):
        StepTiming.load(tmp_path / StepTiming.FILE)


def test_calibrated_runs_are_listed_with_the_scores_of_their_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(result("sam", 70.0).to_json())
    assert "calibrated run" not in write_report(tmp_path).read_text()
    scores = (
        CalibratorScore("none", {}, 61.25, 1.5, 1.1),
        CalibratorScore("tau-norm", {"tau": 0.5}, 72.375, 0.98765, 1.3),
    )
    made = Calibration("tau-norm", {"tau": 0.5}, 1.3, scores, 240, "12ab")
    made.save(tmp_path / "a" / "calibration.json")
    assert "calibrated run" in write_report(tmp_path).read_text()
    write_tables(read_runs(tmp_path), tmp_path / "tables")
    with (tmp_path / "tables" / "calibrated.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header[0] == "calibrated run"
    assert rows == [["a", made.described, "240", "61.25", "72.38", "1.5000", "0.9877"]]
    (tmp_path / "a" / "calibration.json").write_text("damaged")
    assert "calibrated run" not in write_report(tmp_path).read_text()


def test_unfinished_and_failed_runs_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An interrupted run has settings and checkpoints within epochs, but no checkpoint.pt."""
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "result.json").write_text(result("sgd", 80.0).to_json())
    for name in ("interrupted", "failed"):
        (tmp_path / name / "resume").mkdir(parents=True)
        (tmp_path / name / "run.yaml").write_text("data: digits-lt\n")
    (tmp_path / "failed" / "error-rank-0.txt").write_text("out of memory\nTraceback ...\n")
    assert len(read_runs(tmp_path).runs) == 1
    interrupted = tmp_path / "interrupted"
    continues = f"is not finished; `fastsam train --resume --out {interrupted}` continues it"
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"fastsam: left out: {tmp_path / 'failed'} failed: out of memory",
        f"fastsam: left out: {interrupted} {continues}",
    ]
    with pytest.raises(CheckpointError, match="is not finished; `fastsam train --resume"):
        Checkpoint.load(interrupted)
