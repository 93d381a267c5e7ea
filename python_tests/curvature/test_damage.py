"""Damaged, foreign and truncated files raise one clear error and never change the result."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsam.curvature import CallableOperator, Spectrum, operator_spectrum

DIMENSION = 60


class KilledError(Exception):
    """Emulates a kill."""


def matrix() -> Tensor:
    square = torch.randn(DIMENSION, DIMENSION, generator=torch.Generator().manual_seed(0))
    return square + square.T


def operator(killed_at: int = 0) -> CallableOperator:
    calls = []

    def product(rows: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == killed_at:
            raise KilledError
        return rows @ matrix()

    return CallableOperator(product, dimension=DIMENSION, dtype=torch.float32)


def options(folder: Path, reorthogonalize: str) -> dict:
    return {
        "steps": 12,
        "probes": 2,
        "reorthogonalize": reorthogonalize,
        "checkpoint": folder,
        "checkpoint_interval": 0,
        "progress": False,
    }


def unfinished(folder: Path, reorthogonalize: str = "full") -> dict:
    """Leave a run in ``folder`` that was killed at its ninth step; return the options to resume it."""
    settings = options(folder, reorthogonalize)
    with pytest.raises(KilledError):
        operator_spectrum(operator(killed_at=9), **settings)
    return settings


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def check_message(error: ValueError, *words: str) -> None:
    message = str(error)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("reorthogonalize", ["full", "none"])
def test_flipped_bits_of_a_checkpoint_are_noticed(tmp_path, reorthogonalize):
    settings = unfinished(tmp_path / "run", reorthogonalize)
    copy = tmp_path / "copy"
    generator = np.random.default_rng(0)
    for number in range(200):
        shutil.copytree(tmp_path / "run", copy)
        files = sorted(copy.iterdir())
        # Every other flip in the state, the others in rows.
        rows = [path for path in files if path.name.startswith("row-")]
        states = [path for path in files if not path.name.startswith("row-")]
        path = generator.choice(np.array([states, rows][number % 2], dtype=object))
        flip(path, int(generator.integers(8 * path.stat().st_size)))
        with pytest.raises(ValueError, match="damaged") as caught:
            operator_spectrum(operator(), **{**settings, "checkpoint": copy})
        check_message(caught.value, str(path), "remove")
        shutil.rmtree(copy)
    resumed = operator_spectrum(operator(), **settings)
    whole = operator_spectrum(operator(), **{**settings, "checkpoint": None})
    assert np.array_equal(resumed.alpha, whole.alpha)
    assert np.array_equal(resumed.beta, whole.beta)


@pytest.mark.parametrize("reorthogonalize", ["full", "none"])
@pytest.mark.parametrize(
    "damage", ["empty", "half", "longer", "missing", "folder", "zeros", "swapped"]
)
def test_damaged_files_of_a_checkpoint_are_named(tmp_path, reorthogonalize, damage):
    settings = unfinished(tmp_path / "run", reorthogonalize)
    for name in ("state", "row"):
        if (name, damage) in (("state", "missing"), ("state", "swapped")):
            continue
        copy = tmp_path / f"{name}-copy"
        shutil.copytree(tmp_path / "run", copy)
        path, other = sorted(copy.glob(f"{name}*"))[-1], sorted(copy.glob("row*"))[0]
        content = path.read_bytes()
        path.unlink()
        if damage == "folder":
            path.mkdir()
        elif damage != "missing":
            path.write_bytes(
                {
                    "empty": b"",
                    "half": content[: len(content) // 2],
                    "longer": content + b"\0",
                    "zeros": bytes(len(content)),
                    "swapped": other.read_bytes(),
                }[damage]
            )
        with pytest.raises(ValueError, match="damaged") as caught:
            operator_spectrum(operator(), **{**settings, "checkpoint": copy})
        check_message(caught.value, str(path), "remove")


def test_checkpoints_of_earlier_formats_are_refused(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    np.savez(folder / "state.npz", alpha=np.zeros((1, 3)))
    with pytest.raises(ValueError, match="format of another version"):
        operator_spectrum(operator(), **options(folder, "full"))
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ValueError, match="is not a folder"):
        operator_spectrum(operator(), **options(tmp_path / "file", "full"))
    assert (tmp_path / "file").read_text() == "precious"


# Spectra.


def spectrum_of(seed: int = 0) -> Spectrum:
    return operator_spectrum(operator(), steps=9, probes=2, seed=seed, progress=False)


@pytest.mark.parametrize("suffix", ["json", "npz"])
def test_flipped_bits_of_a_saved_spectrum_are_noticed(tmp_path, suffix):
    spectrum, path = spectrum_of(), tmp_path / f"spectrum.{suffix}"
    spectrum.save(path)
    whole = path.read_bytes()
    generator = np.random.default_rng(1)
    refused = 0
    for _ in range(200):
        path.write_bytes(whole)
        flip(path, int(generator.integers(8 * len(whole))))
        try:
            found = Spectrum.load(path)
        except ValueError as error:
            check_message(error, str(path), "is not a spectrum written by fastsam")
            refused += 1
            continue
        # A flip that changes no content: in the date of an archive entry, or of e to E in 1e-10.
        assert found.summary() == spectrum.summary()
        assert found.settings == spectrum.settings
    assert refused > (190 if suffix == "json" else 100)


@pytest.mark.parametrize("suffix", ["json", "npz"])
def test_truncated_spectra_are_refused(tmp_path, suffix):
    path = tmp_path / f"spectrum.{suffix}"
    spectrum_of().save(path)
    whole = path.read_bytes()
    for length in np.linspace(0, len(whole) - 2, 40).astype(int):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is not a spectrum written by fastsam"):
            Spectrum.load(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match="is not a spectrum written by fastsam"):
        Spectrum.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"alpha": [[1.0]]},
        {"order": [1]},
        {"order": [0, 9]},
        {"order": [9, 99]},
        {"dimension": 0},
        {"eps": -1.0},
        {"alpha": [[float("nan")] * 9] * 2},
        {"unknown": 1},
        {"alpha": None},
    ],
)
def test_inconsistent_spectra_are_refused(tmp_path, change):
    path = tmp_path / "spectrum.json"
    spectrum_of().save(path)
    content = {**json.loads(path.read_text()), **change}
    del content["sha256"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is not a spectrum written by fastsam"):
        Spectrum.load(path)


@pytest.mark.parametrize("suffix", ["json", "npz"])
def test_spectra_of_earlier_versions_are_read(tmp_path, suffix):
    spectrum, path = spectrum_of(), tmp_path / f"spectrum.{suffix}"
    arrays = {name: getattr(spectrum, name) for name in ("alpha", "beta", "order")}
    scalars = {
        name: getattr(spectrum, name)
        for name in ("dimension", "eps", "loss", "gradient_norm", "weight_norm", "weight")
    }
    scalars["settings"] = {**spectrum.settings, "full_passes": 9}
    if suffix == "json":
        lists = {name: value.tolist() for name, value in arrays.items()}
        summary = {"negative_mass": 0.47, "negative_mass_stderr": 0.005}
        path.write_text(json.dumps({"fastsam_spectrum": 1, **scalars, **lists, "summary": summary}))
    else:
        np.savez(path, **arrays, fastsam_spectrum=json.dumps(scalars))
    loaded = Spectrum.load(path)
    assert np.array_equal(loaded.alpha, spectrum.alpha)
    assert loaded.summary() == spectrum.summary()


@pytest.mark.parametrize("suffix", ["json", "npz"])
def test_saving_replaces_a_link_and_not_its_target(tmp_path, suffix):
    target, link = tmp_path / f"thesis.{suffix}", tmp_path / f"spectrum.{suffix}"
    target.write_text("precious")
    link.symlink_to(target)
    spectrum_of().save(link)
    assert target.read_text() == "precious"
    assert not link.is_symlink()
    assert Spectrum.load(link).dimension == DIMENSION


@pytest.mark.parametrize("suffix", ["json", "npz"])
def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"spectrum.{suffix}"
    spectrum_of(seed=1).save(path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            spectrum_of(seed=2).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    umask = os.umask(0o022)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
