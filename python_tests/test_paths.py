"""Paths may be text everywhere: in the signatures of the public names, and from training to the report."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import fastsam
from fastsam.curvature import Spectrum
from fastsam.longtail import Checkpoint, Result, Trainer, recipe
from fastsam.longtail.data import load_dataset
from fastsam.longtail.landscape import ClassSpectrum, landscape
from fastsam.longtail.trained import TrainedRun
from fastsam.longtail.training import RunFolder
from fastsam.report import read_runs, write_report

MADE_BY_FASTSAM = {"FilePrediction", "TrainedRun"}
"""Classes whose constructors users do not call."""


def public_callables() -> Iterator[tuple[str, Any]]:
    """Yield the public functions, constructors and methods of every public package."""
    for package in pkgutil.walk_packages(fastsam.__path__, "fastsam."):
        if not package.ispkg or "._" in package.name or package.name.startswith("fastsam.cli"):
            continue
        module = import_module(package.name)
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if inspect.isfunction(value):
                yield name, value
            elif inspect.isclass(value):
                for member in vars(value):
                    if member == "__init__" and name in MADE_BY_FASTSAM:
                        continue
                    if callable(getattr(value, member)) and (
                        not member.startswith("_") or member == "__init__"
                    ):
                        yield f"{name}.{member}", getattr(value, member)


def test_signatures_take_text() -> None:
    found = 0
    for name, function in public_callables():
        for parameter in inspect.signature(function).parameters.values():
            if "Path" in str(parameter.annotation):
                found += 1
                assert "str" in str(parameter.annotation), f"{name}({parameter})"
    assert found > 25


def test_text_from_training_to_the_report(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    settings = recipe("digits-lt", "ce", "sgd", epochs=1).config()
    result = Trainer(settings, out=folder, progress=False).fit()
    assert Result.load(f"{folder}/result.json").test == result.test
    assert Checkpoint.load(folder).epoch == 1
    assert RunFolder(folder).checkpoint == tmp_path / "run" / "checkpoint.pt"
    run = TrainedRun.load(folder)
    assert run.path == tmp_path / "run"
    data = load_dataset("digits-lt", progress=False)
    (spectrum,) = landscape(run.network, data, run.checkpoint, [9], steps=2, progress=False)
    saved = spectrum.save(folder)
    assert ClassSpectrum.load(str(saved)).subject == spectrum.subject
    spectrum.spectrum.save(f"{folder}/spectrum.npz")
    assert Spectrum.load(f"{folder}/spectrum.npz").lambda_max == spectrum.spectrum.lambda_max
    assert len(read_runs(str(tmp_path)).results) == 1
    assert write_report(folder) == tmp_path / "run" / "report.html"
