"""Contents of packages, builds, and errors of unbuilt checkouts."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fastsam

ROOT = Path(__file__).parents[1]


def pyproject() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return table


def test_git_ignores_no_source() -> None:
    """A pattern such as ``demo/`` would keep a package of that name out of commits and of the sdist."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    folders = ("benchmarks", "csrc", "docs", "examples", "fastsam", "python_tests")
    sources = [path for name in folders for path in (ROOT / name).rglob("*.*") if path.is_file()]
    kept = [path for path in sources if path.suffix in (".py", ".cpp", ".cu", ".h", ".md")]
    assert len(kept) > 300
    ignored = subprocess.run(
        ["git", "check-ignore", "--no-index", "--stdin"],
        cwd=ROOT,
        input="\n".join(map(str, kept)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ignored.stdout == ""


def test_the_readme_of_an_index_has_no_relative_links() -> None:
    readme = (ROOT / "README.md").read_text()
    hook = pyproject()["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    for rule in hook["substitutions"]:
        readme = re.sub(rule["pattern"], rule["replacement"], readme)
    relative = r"\]\((?!https?:|#)"
    assert re.search(relative, (ROOT / "README.md").read_text())
    assert not re.search(relative, readme)
    assert "[arXiv 2010.01412](https://arxiv.org/abs/2010.01412)" in readme
    assert "Drop-in SAM" in readme
    assert readme.startswith("# Sharpness-Aware Minimization for PyTorch (not Segment Anything)\n")


def test_the_version_is_stated_once() -> None:
    table = pyproject()
    assert "version" in table["project"]["dynamic"]
    assert table["tool"]["scikit-build"]["metadata"]["version"]["input"] == "fastsam/__init__.py"
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {fastsam.__version__}\n" in citation


@pytest.fixture
def unbuilt(tmp_path: Path) -> Path:
    """Return a checkout that was never built."""
    native = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    shutil.copytree(ROOT / "fastsam", tmp_path / "fastsam", ignore=native)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_error_of_an_unbuilt_checkout_names_the_fix(unbuilt: Path) -> None:
    """An unbuilt checkout hides an installed package if Python starts inside it."""
    for arguments in (["-c", "from fastsam import SAM"], ["-m", "fastsam", "doctor"]):
        # Without site and its .pth files, no hook of an editable install finds the module.
        paths = [path for path in sys.path if path.endswith("site-packages")]
        program = [sys.executable, "-S", *arguments]
        done = subprocess.run(
            program,
            cwd=unbuilt,
            capture_output=True,
            text=True,
            check=False,
            env={"PYTHONPATH": ":".join([str(unbuilt), *paths])},
        )
        assert done.returncode == 1
        last = done.stderr.strip().splitlines()[-1]
        assert f"{unbuilt} is a checkout whose native module is not built" in last, done.stderr
        assert "pip install --editable ." in last
    assert done.stderr.count("\n") == 1
    assert last.startswith("fastsam: error: ")


def configure(build: Path, *options: str, path: str | None = None) -> tuple[int, str]:
    """Return exit status and output of a run of CMake."""
    tools = {
        name: shutil.which(name, path=f"{Path(sys.executable).parent}") or shutil.which(name)
        for name in ("cmake", "ninja")
    }
    if None in tools.values():
        pytest.skip("cmake or ninja is not installed")
    pybind11 = pytest.importorskip("pybind11")
    done = subprocess.run(
        [
            str(tools["cmake"]),
            *("-S", ROOT, "-B", build, "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={tools['ninja']}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *options,
        ],
        capture_output=True,
        text=True,
        check=False,
        env=None if path is None else {"PATH": path},
    )
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def test_the_error_of_a_build_without_a_compiler_names_the_fix(tmp_path: Path) -> None:
    status, output = configure(tmp_path / "build", path=str(tmp_path))
    assert status != 0
    assert "there is no C++ compiler: install g++ or clang++" in output


def test_the_build_reports_that_it_has_no_cuda(tmp_path: Path) -> None:
    status, output = configure(tmp_path / "build", "-DFASTSAM_CUDA=OFF")
    assert status == 0, output
    assert "fastsam: without CUDA kernels, because" in output
