"""Location of the cache: the folder in the variable, else one in the user's cache folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fastsam.cache import cache_folder


def test_the_variable_names_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTSAM_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path


@pytest.mark.parametrize("variable", [None, ""])
def test_the_folder_of_the_user(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str | None
) -> None:
    if variable is None:
        monkeypatch.delenv("FASTSAM_CACHE", raising=False)
    else:
        monkeypatch.setenv("FASTSAM_CACHE", variable)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    below = {"darwin": tmp_path / "Library" / "Caches"}.get(sys.platform, tmp_path / ".cache")
    if sys.platform != "win32":
        assert cache_folder() == below / "fastsam"
    if sys.platform.startswith("linux"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
        assert cache_folder() == tmp_path / "elsewhere" / "fastsam"
    assert not list(tmp_path.iterdir())  # the writer creates it
