"""The PDF figures, and what the command writes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsam.cli import main
from fastsam.curvature import MatrixOperator, operator_spectrum
from fastsam.longtail.landscape import ClassSpectrum
from fastsam.report import Run, Runs, read_runs, write_figures
from fastsam.report.palette import LIGHT
from fastsam.report.printed import figures
from python_tests.report.made_runs import random_result, result, spectrum

ALL = {"differences", "accuracy", "classes", "confusion", "calibration", "training", "spectra"}


def lines_of(axes: Any) -> Iterator[tuple[str, list[float], list[float]]]:
    """Color, x and y of every line of data."""
    for line in axes.get_lines():
        if line.get_color() in LIGHT:
            yield line.get_color(), list(line.get_xdata()), list(line.get_ydata())


@pytest.mark.slow
def test_figures_are_pdf_files_with_letters_and_without_dates(folder: Path, tmp_path: Path) -> None:
    paths = write_figures(read_runs(folder), tmp_path / "new")
    assert {path.stem for path in paths} == ALL
    for path in paths:
        content = path.read_bytes()
        assert content.startswith(b"%PDF")
        assert b"/FontFile2" in content  # fonts are embedded, letters are not drawn as shapes
        assert b"/Type3" not in content
        assert b"CreationDate" not in content
        assert (b"/Subtype /Image" in content) == (path.stem == "confusion")
    before = [path.read_bytes() for path in paths]
    assert [
        path.read_bytes() for path in write_figures(read_runs(folder), tmp_path / "new")
    ] == before


def test_curves_share_an_axis_and_have_the_numbers_of_the_files(folder: Path) -> None:
    runs = read_runs(folder)
    found = dict(figures(runs))
    panels = found["training"].axes
    assert len({tuple(ax.get_xlim()) for ax in panels}) == 1
    losses = [y for _, _, y in lines_of(panels[0])]
    assert sorted(losses) == sorted([e.loss for e in r.history] for r in runs.results)
    upper = found["classes"].axes[0]
    (late,) = (r for r in runs.results if r.config.get("ascent_start") == "defer")
    order = [0, 2, 1, 3]  # by training images
    assert [late.test.per_class[label] for label in order] in [y for _, _, y in lines_of(upper)]


def test_spectra_share_both_axes() -> None:
    item = spectrum()
    matrix = torch.diag(torch.tensor([-5.0, 0.5, 90.0], dtype=torch.float64))
    wide = operator_spectrum(MatrixOperator(matrix), steps=3, progress=False)
    other = ClassSpectrum(replace(item.subject, label=0, name="zero"), wide)
    runs = Runs([Run(random_result(random.Random(1), "sgd"), "a", (item, other))])
    axes = dict(figures(runs))["spectra"].axes
    assert len(axes) == 2
    assert len({(tuple(ax.get_xlim()), tuple(ax.get_ylim())) for ax in axes}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", [r"$\frac$", "a$b"])
def test_names_are_no_mathematics(name: str, tmp_path: Path) -> None:
    made = random_result(random.Random(1), "sgd")
    made = replace(
        made,
        class_names=[name, "b", "c", "d"],
        groups={name: [0], "tail": [1, 2, 3]},
        test=replace(made.test, groups={name: 1.0, "tail": 2.0}),
        config={**made.config, "data": name},
    )
    item = spectrum()
    item = ClassSpectrum(replace(item.subject, run=name, name=name), item.spectrum)
    assert len(write_figures(Runs([Run(made, name, (item,))]), tmp_path)) == 6


@pytest.mark.slow
def test_figures_of_older_results_leave_out_what_they_lack(tmp_path: Path) -> None:
    paths = write_figures(Runs([Run(result("sgd", 80.0))]), tmp_path)
    assert {path.stem for path in paths} == ALL - {"differences", "calibration", "spectra"}


@pytest.mark.slow
def test_the_command_writes_page_figures_and_tables(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--figures", str(tmp_path / "figures"), "--tables", str(tmp_path / "tables")]
    assert main(["report", str(folder), *options]) == 0
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == ALL
    tables = {path.name for path in (tmp_path / "tables").iterdir()}
    assert {"accuracy.csv", "accuracy.md", "accuracy.tex", "differences.tex"} <= tables
    assert capsys.readouterr().out.splitlines() == [
        f"report: {folder / 'report.html'}",
        f"figures: 7 files in {tmp_path / 'figures'}",
        f"tables: {len(tables)} files in {tmp_path / 'tables'}",
    ]
