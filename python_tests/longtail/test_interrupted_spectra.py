"""Spectra of classes that are stopped or killed between any two steps continue to the same bits."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsam.cli import main
from fastsam.curvature import spectral_density
from fastsam.curvature.lanczos import resume
from fastsam.curvature.operators.model import ModelOperator
from fastsam.longtail import Checkpoint
from fastsam.longtail import landscape as landscapes
from fastsam.longtail.build import build_network
from fastsam.longtail.errors import CheckpointError, DataError
from fastsam.longtail.landscape import ClassSpectrum, landscape
from fastsam.longtail.models import MODELS, Model
from fastsam.stopping import Stopped, StopRequest
from python_tests.longtail.test_float16 import LinearFeatures
from python_tests.longtail.test_trainer import FEW, short

CLASSES = (0, 9)
STEPS = 6


class KilledError(Exception):
    """Emulates a kill."""


def pin(monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Fix the strategy of new spectra, which is measured otherwise; stored ones keep theirs."""

    def pinned(*arguments: Any, **given: Any) -> Any:
        state = given["checkpoint"]
        if state is None or not (state / "state.json").exists():
            given["strategy"] = "rebuild"
        return spectral_density(*arguments, **{**given, **options})

    monkeypatch.setattr(landscapes, "spectral_density", pinned)


@pytest.fixture
def at_product(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Return a function that calls another in the product of a given number, and lists the products.

    The product by which a resumed run verifies its operator does not count.
    """
    calls: list[int] = []
    events: dict[int, Callable[[], object]] = {}
    product = ModelOperator.matmat

    def counted(self: ModelOperator, vectors: Tensor) -> Tensor:
        calls.append(1)
        events.pop(len(calls), int)()
        return product(self, vectors)

    verify = resume.repeat_first_step

    def uncounted(*given: Any) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(ModelOperator, "matmat", product)
            return verify(*given)

    monkeypatch.setattr(ModelOperator, "matmat", counted)
    monkeypatch.setattr(resume, "repeat_first_step", uncounted)

    def arrange(number: int = 0, event: Callable[[], object] = int) -> list[int]:
        calls.clear()
        events.clear()
        events[number] = event
        return calls

    return arrange


def kill() -> None:
    raise KilledError


@pytest.fixture(scope="module", autouse=True)
def _linear() -> Iterator[None]:
    """Register the network ``linear``, which is fast."""
    made = Model(name="linear", build=lambda settings, channels: LinearFeatures(), summary="linear")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS._parts, "linear", made)
        yield


@pytest.fixture(scope="module")
def checkpoint(_linear: None) -> Checkpoint:
    config = short("ce", "sgd", model="linear")
    model = build_network(config, 10, 1)
    return Checkpoint(config, 1, 1, 10, model.state_dict(), {}, [])


def spectra(checkpoint: Checkpoint, out: Path | None, **options: Any) -> list[ClassSpectrum]:
    settings = {"steps": STEPS, "progress": False, "out": out, **options}
    return landscape(checkpoint.build_model(), FEW, checkpoint, CLASSES, **settings)


def assert_same(found: list[ClassSpectrum], expected: list[ClassSpectrum]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.subject == other.subject
        assert np.array_equal(one.spectrum.alpha, other.spectrum.alpha)
        assert np.array_equal(one.spectrum.beta, other.spectrum.beta)
        assert one.spectrum.loss == other.spectrum.loss


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("augment", "probes"),
    [
        ("none", 2),
        pytest.param("2", 1, marks=pytest.mark.slow),
        ("redrawn", 1),
    ],
)
def test_stopped_at_random_steps_no_step_is_repeated(
    augment: str,
    probes: int,
    checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at_product: Callable[..., list[int]],
) -> None:
    pin(monkeypatch)
    options = {"augment": augment, "probes": probes}
    expected = spectra(checkpoint, None, **options)
    rng = np.random.default_rng(7)
    messages, products = [], 0
    for _ in range(2 * STEPS + 1):
        request = StopRequest()
        step = int(rng.integers(1, STEPS))
        calls = at_product(step, partial(setattr, request, "signal", "SIGTERM"))
        try:
            found = spectra(checkpoint, tmp_path, **options, stop=request)
        except Stopped as stop:
            messages.append(str(stop))
            continue
        finally:
            products += len(calls)
        break
    assert len(messages) >= 2
    assert all("stopped by SIGTERM" in text and "same command again" in text for text in messages)
    assert_same(found, expected)
    assert products == 2 * STEPS
    names = [f"class-{label}-train-ce-{augment}.json" for label in CLASSES]
    assert [path.name for path in sorted(tmp_path.iterdir())] == names
    calls = at_product()
    assert_same(spectra(checkpoint, tmp_path, **options), expected)
    assert calls == []


@pytest.mark.parametrize(("interval", "repeated"), [(0, 1), (60, 3)])
def test_killed_it_keeps_finished_classes_and_the_last_checkpoint(
    interval: float,
    repeated: int,
    checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at_product: Callable[..., list[int]],
) -> None:
    pin(monkeypatch, checkpoint_interval=interval)
    expected = spectra(checkpoint, None)
    calls = at_product(STEPS + 3, kill)
    with pytest.raises(KilledError):
        spectra(checkpoint, tmp_path)
    assert_same(spectra(checkpoint, tmp_path), expected)
    assert len(calls) == 2 * STEPS + repeated


def test_a_signal_in_the_last_step_of_a_class_stops_before_the_next(
    checkpoint: Checkpoint, tmp_path: Path, at_product: Callable[..., list[int]]
) -> None:
    request = StopRequest()
    calls = at_product(STEPS, partial(setattr, request, "signal", "SIGTERM"))
    with pytest.raises(Stopped, match="class 9: stopped by SIGTERM; nothing more was saved"):
        spectra(checkpoint, tmp_path, stop=request)
    assert len(calls) == STEPS
    assert [path.name for path in tmp_path.iterdir()] == ["class-0-train-ce-none.json"]


def test_other_settings_are_refused_before_anything_is_computed(
    checkpoint: Checkpoint, tmp_path: Path, at_product: Callable[..., list[int]]
) -> None:
    calls = at_product(STEPS + 3, kill)
    with pytest.raises(KilledError):
        spectra(checkpoint, tmp_path)
    before, products = contents(tmp_path), len(calls)
    weights = {key: value + 1 for key, value in checkpoint.model.items()}
    other = Checkpoint(checkpoint.config, 1, 1, 10, weights, {}, [])
    for options, message in (
        ({"steps": 5}, r"class-0-\S+ contains another spectrum: steps was 6, is now 5"),
        ({"probes": 2}, r"probe_indices was \[0\], is now \[0, 1\]"),
        ({"seed": 3}, "seed was 0, is now 3; use the same settings, choose another --out"),
        ({"dtype": torch.float64}, "dtype was float32, is now float64"),
    ):
        with pytest.raises(CheckpointError, match=message):
            spectra(checkpoint, tmp_path, **options)
    with pytest.raises(CheckpointError, match="weights was"):
        spectra(other, tmp_path)
    assert contents(tmp_path) == before
    assert len(calls) == products


def test_an_unfinished_spectrum_with_other_settings_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, at_product: Callable[..., list[int]]
) -> None:
    request = StopRequest()
    at_product(3, partial(setattr, request, "signal", "SIGTERM"))
    with pytest.raises(Stopped):
        spectra(checkpoint, tmp_path, stop=request)
    before = contents(tmp_path)
    with pytest.raises(DataError, match=r"class 0: .*\.lanczos contains a run with other settings"):
        spectra(checkpoint, tmp_path, seed=3)
    assert contents(tmp_path) == before


def test_damaged_files_are_named(
    checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    at_product: Callable[..., list[int]],
) -> None:
    pin(monkeypatch)
    expected = spectra(checkpoint, None)
    request = StopRequest()
    at_product(STEPS + 3, partial(setattr, request, "signal", "SIGTERM"))
    with pytest.raises(Stopped):
        spectra(checkpoint, tmp_path, stop=request)
    finished, unfinished = sorted(tmp_path.iterdir())
    content = finished.read_text()
    finished.write_text(content.replace('"dimension": ', '"dimension": 1', 1))
    state = unfinished / "state.json"
    sound = state.read_bytes()
    state.write_bytes(sound[:-20])
    with pytest.raises(DataError, match=r"class 9: .*state\.json is damaged .*; remove"):
        spectra(checkpoint, tmp_path)
    message = capsys.readouterr().err
    assert f"{finished} is not a class spectrum" in message
    assert "creating it again" in message
    state.write_bytes(sound)
    calls = at_product()
    assert_same(spectra(checkpoint, tmp_path), expected)
    assert len(calls) == STEPS - 3  # class 0 was created again before the error
    assert capsys.readouterr().err == ""


def test_what_a_kill_leaves_of_a_finished_spectrum_is_removed(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(landscapes.LanczosCheckpoint, "remove", lambda folder: kill())
        with pytest.raises(KilledError):
            spectra(checkpoint, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    spectra(checkpoint, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".json", ".json"]


@pytest.fixture(scope="module")
def run(_linear: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    tiny = [
        "--model",
        "linear",
        "--epochs",
        "1",
        "--batch-size",
        "200",
        "--threads",
        "1",
        "--quiet",
    ]
    assert main(["train", "--method", "ce", "--optimizer", "sgd", *tiny, "--out", str(out)]) == 0
    return out


def test_ctrl_c_within_the_first_interval_keeps_what_is_there(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    at_product: Callable[..., list[int]],
) -> None:
    pin(monkeypatch)
    command = ["spectrum", str(run), "--classes", "8", "9", "--steps", "5", "--quiet", "--out"]
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    assert main([*command, str(whole)]) == 0
    calls = at_product(8, partial(signal.raise_signal, signal.SIGINT))
    capsys.readouterr()
    assert main([*command, str(out)]) == 75
    assert capsys.readouterr().err.splitlines()[-1] == (
        "fastsam: spectrum of class 9: stopped by SIGINT after step 3 of 5; to continue, make the same call "
        "or run the same command again"
    )
    assert main([*command, str(out), "--seed", "1"]) == 1
    assert "seed was 0, is now 1" in capsys.readouterr().err
    assert main([*command, str(out)]) == 0
    assert len(calls) == 10
    assert f"Continuing the spectra in {out}." in capsys.readouterr().out
    for path in whole.glob("*.json"):
        assert_same([ClassSpectrum.load(out / path.name)], [ClassSpectrum.load(path)])
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in whole.iterdir())
    assert (out / "spectra.svg").read_bytes() == (whole / "spectra.svg").read_bytes()
    # A folder with anything else is refused, and --overwrite computes again.
    assert main([*command, str(out), "--augment", "1"]) == 2
    assert "not empty; choose another --out or pass --overwrite" in capsys.readouterr().err
    at_product(7, partial(signal.raise_signal, signal.SIGTERM))
    assert main([*command, str(out), "--overwrite", "--seed", "1"]) == 75
    assert capsys.readouterr().err.endswith("run the same command again without --overwrite\n")
    assert main([*command, str(out), "--seed", "1"]) == 0
    assert len(calls) == 10


def test_without_a_folder_nothing_is_saved(
    run: Path, capsys: pytest.CaptureFixture[str], at_product: Callable[..., list[int]]
) -> None:
    at_product(2, partial(signal.raise_signal, signal.SIGTERM))
    assert main(["spectrum", str(run), "--classes", "9", "--steps", "5", "--quiet"]) == 75
    assert "after step 2 of 5; nothing was saved without" in capsys.readouterr().err


@pytest.mark.slow
def test_a_signal_before_the_first_product_stops_at_once(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def prepare(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the signal came too late")

    monkeypatch.setattr(ModelOperator, "prepare", prepare)
    shutil.rmtree(tmp_path)
    assert main(["spectrum", str(run), "--classes", "9", "--quiet", "--out", str(tmp_path)]) == 75
    assert "class 9: stopped by SIGINT; nothing more was saved" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
