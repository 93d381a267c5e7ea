"""Errors for packages that the base install lacks name the package and the extra."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from fastsam.curvature import MatrixOperator, compare, operator_spectrum, to_scipy
from fastsam.extras import (
    TIED_TO_TORCH,
    Extra,
    install_command,
    matching_command,
    requires_extra,
)
from fastsam.longtail.models import build_model

ROOT = Path(__file__).parents[1]
OPERATOR = MatrixOperator(torch.eye(3))


def project_table() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


def spectrum(seed: int = 0):
    return operator_spectrum(OPERATOR, steps=3, seed=seed, progress=False)


@pytest.mark.parametrize(
    ("package", "call", "command"),
    [
        (
            "scipy",
            lambda: compare(spectrum(), spectrum(1)).wasserstein,
            'pip install ".[longtail]" in a checkout of fastsam',
        ),
        (
            "scipy",
            lambda: to_scipy(OPERATOR),
            'pip install ".[longtail]" in a checkout of fastsam',
        ),
        (
            "matplotlib",
            lambda: spectrum().plot(),
            'pip install ".[plots]" in a checkout of fastsam',
        ),
        (
            "torchvision",
            lambda: build_model("resnet18", 10),
            f"pip install torchvision torch=={metadata.version('torch')}",
        ),
        (
            "timm",
            lambda: build_model("timm:resnet10t", 10),
            f"pip install timm torch=={metadata.version('torch')}",
        ),
    ],
)
def test_a_missing_package_names_the_command(
    package: str, call: Callable[[], object], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Missing:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name.partition(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    with pytest.raises(ImportError, match=re.escape(f"needs {package}: {command}")):
        call()


@pytest.mark.parametrize(
    ("torch_version", "index"),
    [
        ("2.14.1", ""),
        ("2.9.1+cpu", "https://download.pytorch.org/whl/cpu"),
        ("2.9.1+cu126", "https://download.pytorch.org/whl/cu126"),
        ("2.9.1+rocm6.4", "https://download.pytorch.org/whl/rocm6.4"),
        ("2.15.0.dev20261001+cu130", "https://download.pytorch.org/whl/nightly/cu130"),
        ("2.9.0a0+git1234567", ""),  # built from source, so no index has a matching torchvision
    ],
)
def test_the_installed_torch_is_kept(torch_version: str, index: str) -> None:
    expected = f"pip install torchvision torch=={torch_version}"
    if index:
        expected += f" --extra-index-url {index}"
    assert matching_command("torchvision", torch=torch_version) == expected


def test_no_extra_can_replace_torch() -> None:
    project = project_table()
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {re.split(r"[^\w.-]", requirement)[0] for listed in lists for requirement in listed}
    assert "torch" in names
    assert not names & set(TIED_TO_TORCH)


@pytest.mark.parametrize("extra", get_args(Extra))
def test_every_extra_exists(extra: Extra) -> None:
    project = project_table()
    assert project["optional-dependencies"][extra]
    assert install_command("some-package", extra) == (
        f'pip install ".[{extra}]" in a checkout of fastsam'
    )


def test_no_message_advises_to_install_another_project() -> None:
    """The distribution ``fastsam`` on PyPI is another project."""
    folders = [ROOT / name for name in ("docs", "fastsam", "benchmarks", "examples")]
    texts = [ROOT / "README.md"]
    texts += [
        path for folder in folders for path in folder.rglob("*.*") if path.suffix in (".md", ".py")
    ]
    assert len(texts) > 200
    for path in texts:
        advice = re.search(r"""pip install (-\S+ )*["']?fastsam(?!-torch)""", path.read_text())
        assert advice is None, f"{path}: {advice[0]}"


def test_the_rest_of_a_comparison_needs_no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    difference = compare(spectrum(), spectrum(1))
    assert difference.lambda_max == pytest.approx(0, abs=1e-6)
    with pytest.raises(ImportError, match="longtail"):
        _ = difference.wasserstein


def test_other_errors_propagate() -> None:
    with pytest.raises(ImportError, match="cannot import name"), requires_extra("longtail", "x"):
        from fastsam.extras import no_such_name  # noqa: F401
    with requires_extra("longtail", "x"):
        import fastsam.extras  # noqa: F401
