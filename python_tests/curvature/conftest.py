"""Settings of the curvature tests."""

from __future__ import annotations

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    # torch's own first use of forward-mode differentiation, which the oracles need.
    config.addinivalue_line(
        "filterwarnings", "ignore:.torch.jit.script. is deprecated:FutureWarning"
    )


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
