"""Packages that the base install lacks: the error names the package and the extra."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch

from fastsam.curvature import MatrixOperator, compare, operator_spectrum, to_scipy
from fastsam.extras import requires_extra

OPERATOR = MatrixOperator(torch.eye(3))


def spectrum(seed: int = 0):
    return operator_spectrum(OPERATOR, steps=3, seed=seed, progress=False)


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("scipy", lambda: compare(spectrum(), spectrum(1)).wasserstein),
        ("scipy", lambda: to_scipy(OPERATOR)),
        ("matplotlib", lambda: spectrum().plot()),
    ],
)
def test_a_missing_package_names_the_extra(
    package: str, call: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Missing:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name.partition(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    with pytest.raises(ImportError, match=rf'needs {package}: pip install "fastsam\[longtail\]"'):
        call()


def test_the_rest_of_a_comparison_needs_no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    difference = compare(spectrum(), spectrum(1))
    assert difference.lambda_max == pytest.approx(0, abs=1e-6)
    with pytest.raises(ImportError, match="longtail"):
        _ = difference.wasserstein


def test_other_errors_pass() -> None:
    with pytest.raises(ImportError, match="cannot import name"), requires_extra("longtail", "x"):
        from fastsam.extras import no_such_name  # noqa: F401
    with requires_extra("longtail", "x"):
        import fastsam.extras  # noqa: F401
