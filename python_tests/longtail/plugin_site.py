"""The example plug-ins, installed for tests."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastsam.longtail.registry import (
    _MEANINGS,
    PLUGINS,
    load_plugins,
    registered_settings,
    registries,
)

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "plugins"
MODULES = {
    "margin-loss": "margin_loss",
    "averaged-sgd": "averaged_sgd",
    "stripes": "stripes_data",
    "tiny-net": "tiny_network",
    "mean-shift": "mean_shift_calibrator",
    "remix": "remix_mixer",
    "balanced-mixup": "balanced_mixup_mixer",
    "unimix": "unimix_mixer",
    "late-balance": "late_balance_stages",
    "cutout": "cutout_augmentation",
}


def install(folder: Path, modules: dict[str, str]) -> None:
    """Create a folder as ``pip install --target`` would, for a package with these entry points."""
    folder.mkdir(exist_ok=True)
    for module in modules.values():
        if (EXAMPLES / f"{module}.py").is_file():
            (folder / f"{module}.py").write_text((EXAMPLES / f"{module}.py").read_text())
    info = folder / "examples-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: examples\nVersion: 1.0\n")
    lines = [f"{name} = {module}" for name, module in modules.items()]
    (info / "entry_points.txt").write_text(f"[{PLUGINS}]\n" + "\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plugins") / "site"
    install(folder, MODULES)
    return folder


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(site))
    registered_settings()  # all parts of the package are there
    before = [(found, dict(found)) for found in (*(r._parts for r in registries()), _MEANINGS)]
    load_plugins.cache_clear()
    importlib.invalidate_caches()
    yield
    load_plugins.cache_clear()
    for found, known in before:
        found.clear()
        found.update(known)
    for module in MODULES.values():
        sys.modules.pop(module, None)
