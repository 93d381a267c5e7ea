"""What importing fastsam loads beside torch; ``python -m benchmarks startup`` measures how long it takes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PUBLIC_NAMES = """
import fastsam
for name in fastsam.__all__:
    getattr(fastsam, name)
"""

HELP = """
import contextlib, io
from fastsam.__main__ import main
sys.argv[1:] = ["--help"]
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as text:
    main()
assert "usage: fastsam" in text.getvalue()
"""


@pytest.mark.parametrize(
    ("program", "packages"),
    [
        (PUBLIC_NAMES, {"fastsam", "numpy"}),
        (HELP, {"fastsam", "numpy", "tyro", "docstring_parser"}),
    ],
    ids=["every public name", "fastsam --help"],
)
def test_packages_beside_torch(program: str, packages: set[str]) -> None:
    """Neither loads a slow part of torch that ``import torch`` leaves out, such as torch._dynamo."""
    before = "import json, sys, torch\nbefore = set(sys.modules)\n"
    after = "\nprint(json.dumps(sorted(set(sys.modules) - before)))"
    done = subprocess.run(
        [sys.executable, "-c", before + program + after],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {module.partition(".")[0] for module in json.loads(done.stdout)}
    # Compiled modules may add a private module of their own, as Cython's runtime does.
    third_party = {name for name in loaded - sys.stdlib_module_names if not name.startswith("_")}
    assert third_party == packages
