"""Settings of the optimizer tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Run every test on one CPU thread."""
