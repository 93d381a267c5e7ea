"""Settings of the optimizer tests."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def seed() -> int:
    """A fresh seed for every run, shown when the test fails."""
    value = secrets.randbelow(2**31)
    print(f"seed = {value}")
    return value
