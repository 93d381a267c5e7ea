"""What the documentation and the examples show works."""

from __future__ import annotations

import doctest
import importlib
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
MODULES = ["sam", "plain", "batch_norm", "rho", "capture", "local"]


def test_the_blocks_of_the_guide_run_in_order():
    text = (ROOT / "docs" / "sam.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) > 5
    torch.manual_seed(0)
    exec(compile("\n".join(blocks), "docs/sam.md", "exec"), {"__name__": "guide"})


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(f"fastsam.optim.{name}")
    failed, tried = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert failed == 0
    assert tried > 0 or name == "local"


def _quietly(path: str):
    """These packages warn of their own settings, which is not what is tested here."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return runpy.run_path(str(ROOT / "examples" / path))["main"]()


@pytest.mark.slow
def test_lightning_example():
    pytest.importorskip("lightning", exc_type=ImportError)
    losses = _quietly("lightning_sam.py")
    assert len(losses) == 40
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.slow
def test_accelerate_example():
    pytest.importorskip("accelerate", exc_type=ImportError)
    losses = _quietly("accelerate_sam.py")
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_local_ascent_example(ranks):
    import subprocess

    if not torch.distributed.is_gloo_available():
        pytest.skip("torch without gloo")
    output = subprocess.run(
        f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node {ranks} "
        f"{ROOT / 'examples' / 'ddp_local.py'}".split(),
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    losses = re.findall(r"rank \d: loss ([\d.]+) -> ([\d.]+)", output)
    assert len(losses) == ranks
    assert all(float(last) < float(first) for first, last in losses)
