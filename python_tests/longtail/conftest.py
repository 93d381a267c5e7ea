"""Fixtures shared by the tests of long-tailed training."""

from __future__ import annotations

from pathlib import Path

import pytest

from python_tests.longtail.archives import write_cifar10, write_cifar100
from python_tests.longtail.prototypes import hundred_classes, inaturalist_classes

__all__ = ["hundred_classes", "inaturalist_classes"]


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
