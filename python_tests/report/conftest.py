"""A folder with runs and their report."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from fastsam.report import write_report
from python_tests.report.made_runs import random_result, spectrum


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five runs: SGD and SAM with two seeds each, late SAM with one; a spectrum of one of them."""
    folder = tmp_path_factory.mktemp("runs")
    generator = random.Random(4)
    for name, optimizer, settings in (
        ("sgd-0", "sgd", {"seed": 0}),
        ("sgd-1", "sgd", {"seed": 1}),
        ("sam-0", "sam", {"seed": 0}),
        ("sam-1", "sam", {"seed": 1}),
        ("late", "sam", {"ascent_start": "defer"}),
    ):
        made = random_result(generator, optimizer, **settings)
        (folder / name).mkdir()
        (folder / name / "result.json").write_text(made.to_json())
    spectrum().save(folder / "sam-0" / "spectra")
    write_report(folder)
    return folder
