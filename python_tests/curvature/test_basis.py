"""Memory of the basis: a full disk raises an error, and a kill leaves no file."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastsam.curvature import CallableOperator, operator_spectrum

RUN = """
import sys
from pathlib import Path

import torch

from fastsam.curvature import CallableOperator, operator_spectrum

values = torch.linspace(-1, 1, 100_000)
operator = CallableOperator(lambda rows: rows * values, dimension=100_000, dtype=torch.float32)
{limit}
try:
    operator_spectrum(operator, steps=50, basis=Path(sys.argv[1]), progress=False)
except OSError as error:
    print(type(error).__name__, error)
    sys.exit(3)
"""


def run(folder: Path, limit: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN.format(limit=limit), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def check_refusal(found: subprocess.CompletedProcess[str], folder: Path) -> None:
    assert found.returncode != -signal.SIGBUS
    assert found.returncode == 3, found.stderr
    assert "the Lanczos basis needs 20.0 MB" in found.stdout
    assert f"in {folder}" in found.stdout
    assert "MB are free" in found.stdout
    assert "choose another folder" in found.stdout
    assert not list(folder.iterdir())


def test_a_full_disk_is_an_error(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this user may not mount a file system")
    try:
        found = run(folder)
        check_refusal(found, folder)
        assert "No space left on device" in found.stdout
        assert "where 8.4 MB are free" in found.stdout
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_limit_on_file_sizes_is_an_error(tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))"
    found = run(tmp_path, limit)
    check_refusal(found, tmp_path)
    assert "ulimit -f" in found.stdout


@pytest.mark.slow
def test_file_systems_that_cannot_reserve_are_filled(tmp_path):
    unsupported = """
import errno, os
def refuse(*_):
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")
os.posix_fallocate = refuse
"""
    assert run(tmp_path, unsupported).returncode == 0
    limit = (
        unsupported + "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))"
    )
    check_refusal(run(tmp_path, limit), tmp_path)


def test_the_file_has_no_name_during_the_run(tmp_path):
    """A kill at any moment therefore leaves no file."""
    folder = tmp_path / "basis"
    seen = []

    def product(rows: torch.Tensor) -> torch.Tensor:
        seen.append(list(folder.iterdir()))
        return rows * torch.arange(50)

    operator = CallableOperator(product, dimension=50)
    operator_spectrum(operator, steps=5, basis=folder, progress=False)
    assert seen == [[]] * 5


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("precious")
    operator = CallableOperator(lambda rows: rows * 2, dimension=5)
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="is not a folder"):
            operator_spectrum(operator, steps=5, basis=path)
    assert (tmp_path / "file").read_text() == "precious"
