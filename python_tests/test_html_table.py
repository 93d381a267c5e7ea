"""Tables for notebooks: numbers are those of the object, text is escaped, missing numbers are dashes."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from fastsam import spectral_density
from fastsam.curvature import MatrixOperator, operator_spectrum
from fastsam.html_table import html_table
from fastsam.longtail import Result
from python_tests.report.made_runs import random_result, result

HOSTILE = "<script>alert('1 & 2')</script>"


class Table(HTMLParser):
    """The cells of a table, row by row, and the tags in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begin a row or a cell."""
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        """Add text to the last cell."""
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip("\n")

    def __getitem__(self, name: str) -> list[str]:
        """Return the cells of a row after its name."""
        (row,) = [cells for first, *cells in self.rows if first == name]
        return row


def table(shown: object) -> Table:
    """Read the table that a notebook shows."""
    text: str = shown._repr_html_()  # type: ignore[attr-defined]
    assert "color" not in text
    return Table(text)


def number(text: str) -> float:
    """Return the only number of a text."""
    (found,) = re.findall(r"-?\d+(?:\.\d+)?(?:e[+-]\d+)?", text.replace("95 %", ""))
    return float(found)


def test_a_spectrum_shows_its_numbers_with_their_errors(seed: int) -> None:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    batch = torch.randn(20, 4), torch.randint(3, (20,))
    spectrum = spectral_density(
        model, torch.nn.CrossEntropyLoss(), batch, steps=5, probes=2, seed=seed, progress=False
    )
    shown, below = table(spectrum), spectrum.mass_below()

    assert {
        name: number(shown[name][0])
        for name in ("lambda_max", "lambda_min", "loss", "dimension", "probes", "steps")
    } == pytest.approx(
        {
            "lambda_max": spectrum.lambda_max,
            "lambda_min": spectrum.lambda_min,
            "loss": spectrum.loss,
            "dimension": 51,
            "probes": 2,
            "steps": 5,
        },
        rel=1e-5,
    )
    for name, value, error in (
        ("lambda_max", spectrum.lambda_max, spectrum.lambda_max_residual),
        ("lambda_min", spectrum.lambda_min, spectrum.lambda_min_residual),
        ("trace", spectrum.trace, spectrum.trace_stderr),
        (
            "squared Frobenius norm",
            spectrum.frobenius_norm_squared,
            spectrum.frobenius_norm_squared_stderr,
        ),
    ):
        assert number(shown[name][0]) == pytest.approx(value, rel=1e-5)
        assert number(shown[name][1]) == pytest.approx(error, rel=1e-2)
    assert number(shown["gradient norm"][0]) == pytest.approx(spectrum.gradient_norm, rel=1e-5)
    assert number(shown["weight norm"][0]) == pytest.approx(spectrum.weight_norm, rel=1e-5)
    mass = shown[f"mass below {below.threshold:.3g}"]
    assert number(mass[0]) == pytest.approx(below.value, rel=1e-5)
    lower, upper = (number(part) for part in mass[1].split(" to "))
    assert (lower, upper) == pytest.approx((below.lower, below.upper), rel=1e-2)


def test_a_spectrum_of_a_matrix_has_no_loss() -> None:
    spectrum = operator_spectrum(MatrixOperator(torch.zeros(3, 3)), steps=3, progress=False)
    shown = table(spectrum)
    assert math.isnan(spectrum.ratio)
    for name in ("loss", "gradient norm", "weight norm", "|lambda_min / lambda_max|"):
        assert shown[name] == ["–", ""]


def worst(run: Result) -> str:
    """The name of the class with the smallest accuracy."""
    return run.class_names[int(np.argmin(run.test.per_class))]


def test_a_result_shows_its_metrics(seed: int) -> None:
    run = random_result(random.Random(seed), "sam")
    shown, test = table(run), run.test
    expected = {
        "accuracy": test.accuracy,
        "balanced accuracy": test.balanced,
        **test.groups,
        "worst class": min(test.per_class),
        "negative log-likelihood": test.nll,
        "expected calibration error": test.ece,
        "cost": run.gradients,
    }
    assert {"head", "mid", "tail"} <= set(expected)
    for name, value in expected.items():
        assert value is not None
        assert number(shown[name][0]) == pytest.approx(value, rel=1e-5)
    assert shown["worst class"][1] == f"% ({worst(run)})"
    for name in ("data", "method", "optimizer"):
        assert shown[name][0] == run.config[name]


def test_results_of_older_versions_have_dashes() -> None:
    shown = table(result("sgd", 50.0))
    assert shown["negative log-likelihood"][0] == "–"
    assert shown["cost"][0] == "–"


def test_markup_in_names_is_text() -> None:
    run = replace(
        result("sgd", 50.0, data=f"own:{HOSTILE}", method=HOSTILE),
        class_names=[HOSTILE, HOSTILE],
        rule=HOSTILE,
    )
    shown = table(run)
    assert shown.tags <= {"table", "thead", "tbody", "tr", "th", "td"}
    assert shown["data"][0] == f"own:{HOSTILE}"
    assert shown["worst class"][1] == f"% ({HOSTILE})"
    assert shown["weights"][0] == HOSTILE


def test_cells() -> None:
    cells = Table(html_table(["a", '"<b>"'], [["x\x1b[2J\n<y>", None, math.nan, 12345678, 1 / 3]]))
    assert cells.rows == [
        ["a", '"<b>"'],
        ["x\\x1b[2J <y>", "–", "–", "12345678", "0.333333"],
    ]
