"""Fixtures shared by the tests of long-tailed training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from python_tests.longtail.archives import write_cifar10, write_cifar100
from python_tests.longtail.official_codes import Agreement
from python_tests.longtail.plugin_site import installed, site
from python_tests.longtail.prototypes import hundred_classes, inaturalist_classes

__all__ = ["hundred_classes", "inaturalist_classes", "installed", "site"]

AGREEMENT = pytest.StashKey[Agreement]()


@pytest.fixture
def agreement(request: pytest.FixtureRequest) -> Agreement:
    """The comparisons of this session with official codes."""
    return request.config.stash.setdefault(AGREEMENT, Agreement())


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the largest deviation from official codes."""
    if AGREEMENT in config.stash:
        terminalreporter.line(config.stash[AGREEMENT].summary())


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep official code on the CPU."""
    for kind in (torch.Tensor, torch.nn.Module):
        monkeypatch.setattr(kind, "cuda", lambda self, *_, **__: self)


@pytest.fixture
def in_float64(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep official code on the CPU, in float64 where it converts to float32."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(scope="session")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    root = tmp_path_factory.mktemp("cifar")
    sums = write_cifar10(root, per_class=20, test_per_class=3)
    return root, sums | write_cifar100(root, per_class=10, test_per_class=1)


@pytest.fixture
def cifar_root(cifar: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A generated archive, with torchvision's checksums replaced by those of the archive."""
    from torchvision.datasets import CIFAR10, CIFAR100

    root, sums = cifar
    for reader in (CIFAR10, CIFAR100):
        for part in ("train_list", "test_list"):
            known = [[name, sums[name]] for name, _ in getattr(reader, part)]
            monkeypatch.setattr(reader, part, known)
        meta = {**reader.meta, "md5": sums[reader.meta["filename"]]}
        monkeypatch.setattr(reader, "meta", meta)
    return root
