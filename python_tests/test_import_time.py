"""Importing fastsam takes little time compared with torch. CPU time does not depend on other processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PUBLIC_NAMES = """
import sys, time
start = time.process_time()
import torch
middle = time.process_time()
import fastsam
for name in fastsam.__all__:
    getattr(fastsam, name)
end = time.process_time()
heavy = {"sympy", "torch.distributed.tensor", "torch._dynamo", "scipy", "sklearn", "matplotlib"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
print((end - start) / (middle - start))
"""

HELP = """
import contextlib, io, sys, time
start = time.process_time()
import torch
middle = time.process_time()
from fastsam.__main__ import main
sys.argv[1:] = ["--help"]
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as text:
    main()
end = time.process_time()
assert "usage: fastsam" in text.getvalue()
print((end - start) / (middle - start))
"""


@pytest.mark.parametrize(
    ("program", "limit"),
    [(PUBLIC_NAMES, 1.1), (HELP, 1.5)],
    ids=["every public name", "fastsam --help"],
)
def test_cpu_time_beside_torch(program: str, limit: float) -> None:
    """The first process writes the bytecode, as an installation does; the second is measured."""
    environment = {**os.environ}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
    assert float(done.stdout) < limit
