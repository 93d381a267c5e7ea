"""What the documentation of the spectra shows works."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import matplotlib as mpl
import pytest
import torch

ROOT = Path(__file__).parents[2]
MODULES = ["api", "eigenpairs", "escape", "losses", "operators", "spectrum"]


def test_the_blocks_of_the_guide_run_in_order(tmp_path, monkeypatch):
    mpl.use("Agg")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "spectra.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) > 8
    torch.manual_seed(0)
    exec(compile("\n".join(blocks), "docs/spectra.md", "exec"), {"__name__": "guide"})
    mpl.pyplot.close("all")


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(f"fastsam.curvature.{name}")
    failed, tried = doctest.testmod(module)
    assert failed == 0
    assert tried > 0
