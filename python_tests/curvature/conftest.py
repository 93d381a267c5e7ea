"""Settings of the curvature tests."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # torch's own first use of forward-mode differentiation, which the oracles need.
    config.addinivalue_line(
        "filterwarnings", "ignore:.torch.jit.script. is deprecated:FutureWarning"
    )


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Run every test on one CPU thread."""
