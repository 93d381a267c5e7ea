"""Install the wheel and the sdist under every Python and torch, and print a table of the results.

Environment variables choose the rows:

- ``PYTHONS``: Python versions from pyenv or the PATH. Default "3.10 3.11 3.12 3.13".
- ``TORCHES``: torch versions; "2.9" is its newest patch release. Default "2.9 newest".
- ``ENVIRONMENTS``: a folder that keeps the environments with torch for the next run, 5 to 7 GB each. By
  default each is deleted after its rows.
- ``TESTS``: tests to run with the installed wheel under the first Python and each torch, such as
  ``python_tests/optim``. The libraries of the integrations are installed for them. By default none.

In every row pip installs the package and its dependencies into a new environment. "none" in the column
"tools" means that the PATH contains only the ``bin`` of that environment. Without a compiler, the sdist must
then fail to install with a clear message. Next, ``smoke.py`` runs outside the checkout. Inside an unbuilt
checkout the command ``fastsam`` must work, and importing fastsam, which finds the sources there, must fail
with advice. The sdist is built without nvcc, so its rows cover a build without CUDA.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

CHECKOUT = Path(__file__).resolve().parents[1]
SMOKE = str(CHECKOUT / ".ci" / "smoke.py")
NEEDED_BY_TESTS = (
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "cmake",
    "ninja",
    "pybind11",
    "timm",
    "torchvision",
)
READ_BY_TESTS = ("benchmarks", "csrc", "docs", "examples", "python_tests")

Artifact = Literal["wheel", "sdist"]
Outcome = Literal["ok", "refused", "FAILED", "-"]


@dataclass(frozen=True)
class Row:
    """One installation and its results."""

    python: str
    torch: str
    artifact: Artifact
    compiler: bool
    install: Outcome = "-"
    outside: Outcome = "-"
    inside: Outcome = "-"
    tests: Outcome = "-"

    @property
    def results(self) -> tuple[Outcome, ...]:
        """Results of the checks."""
        return (self.install, self.outside, self.inside, self.tests)

    def line(self) -> str:
        """Return the row as a line of a Markdown table."""
        tools = "compiler" if self.compiler else "none"
        return f"| {' | '.join([self.python, self.torch, self.artifact, tools, *self.results])} |"


class Log:
    """Runs commands and appends them and their output to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.unlink(missing_ok=True)

    def run(self, *command: object, path: str = os.environ["PATH"], cwd: Path) -> tuple[bool, str]:
        """Run a command with ``path`` as its PATH; return whether it succeeded, and its output."""
        environment = {**os.environ, "PATH": path}
        for name in ("PYTHONPATH", "CC", "CXX", "CUDACXX", "VIRTUAL_ENV"):
            environment.pop(name, None)
        done = subprocess.run(
            [str(word) for word in command],
            cwd=cwd,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        with self.path.open("a") as log:
            print(f"$ PATH={path}", *command, file=log)
            print(f"{done.stdout}exit {done.returncode}\n", file=log)
        return done.returncode == 0, done.stdout

    def must(self, *command: object, cwd: Path) -> None:
        """Run a command, and exit if it fails."""
        worked, output = self.run(*command, cwd=cwd)
        if not worked:
            sys.exit(f"{' '.join(map(str, command))} failed:\n{output[-2000:]}")


def interpreter(version: str) -> str:
    """Return the path of a Python: the newest of this version in pyenv, or else that of the PATH."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    patches = {int(path.name.split(".")[2]): path for path in root.glob(f"versions/{version}.*")}
    if patches:
        return str(patches[max(patches)] / "bin" / "python3")
    found = shutil.which(f"python{version}")
    if found is None:
        sys.exit(
            f"Python {version} was not found: install it with pyenv, or remove it from PYTHONS"
        )
    return found


@contextmanager
def environment_with_torch(python: str, torch: str, log: Log) -> Iterator[Path]:
    """Create an environment with torch, and without this project and its other dependencies."""
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(os.environ.get("ENVIRONMENTS", temporary)).resolve()
        folder = place / f"python{python}-torch{torch}"
        if not (folder / "ready").exists():
            place.mkdir(parents=True, exist_ok=True)
            pip = (folder / "bin" / "python", "-m", "pip", "install", "--quiet")
            log.must(interpreter(python), "-m", "venv", "--clear", folder, cwd=place)
            log.must(*pip, "--upgrade", "pip", cwd=place)
            log.must(*pip, "torch" if torch == "newest" else f"torch=={torch}.*", cwd=place)
            (folder / "ready").touch()
        yield folder


@contextmanager
def fresh_environment(base: Path, log: Log) -> Iterator[Path]:
    """Create an empty environment that can import the packages of ``base``."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "environment"
        log.must(base / "bin" / "python", "-m", "venv", folder, cwd=base)
        (packages,) = base.glob("lib/python*/site-packages")
        (own,) = folder.glob("lib/python*/site-packages")
        (own / "torch.pth").write_text(f"{packages}\n")
        yield folder


def search_path(environment: Path, *, compiler: bool) -> str:
    """Return the PATH of a row, without nvcc."""
    folders = [str(environment / "bin")]
    if compiler:
        given = os.environ["PATH"].split(os.pathsep)
        folders += [folder for folder in given if not Path(folder, "nvcc").exists()]
    return os.pathsep.join(folders)


def checked(row: Row, base: Path, package: Path, unbuilt: Path, tests: list[str], log: Log) -> Row:
    """Install ``package`` as described by a row, and return the row with its results."""
    with fresh_environment(base, log) as environment:
        path = search_path(environment, compiler=row.compiler)
        python = environment / "bin" / "python"
        worked, output = log.run(
            python, "-m", "pip", "install", "--no-cache-dir", package, path=path, cwd=environment
        )
        if not worked:
            expected = row.artifact == "sdist" and not row.compiler
            named = "there is no C++ compiler" in " ".join(output.split())
            return replace(row, install="refused" if expected and named else "FAILED")
        outside, _ = log.run(python, SMOKE, path=path, cwd=environment)
        command, _ = log.run(environment / "bin" / "fastsam", "doctor", path=path, cwd=unbuilt)
        hidden, output = log.run(python, "-c", "import fastsam.optim", path=path, cwd=unbuilt)
        advised = "start Python in another folder" in output.strip().rpartition("\n")[2]
        return replace(
            row,
            install="ok",
            outside=outcome(outside),
            inside=outcome(command and advised and not hidden),
            tests=outcome(pass_tests(environment, package, tests, log)) if tests else "-",
        )


def pass_tests(environment: Path, package: Path, tests: list[str], log: Log) -> bool:
    """Return whether the installed package passes tests outside the checkout."""
    python = environment / "bin" / "python"
    _, version = log.run(python, "-c", "import torch; print(torch.__version__)", cwd=environment)
    # timm and torchvision would replace torch by the one that their newest release wants.
    constraint = environment / "constraint.txt"
    constraint.write_text(f"torch=={version.strip().partition('+')[0]}\n")
    extras = f"{package}[longtail,integrations]"
    pip = (python, "-m", "pip", "install", "--quiet", "--constraint", constraint)
    log.must(*pip, extras, *NEEDED_BY_TESTS, cwd=environment)
    place = environment / "tests"
    for name in READ_BY_TESTS:
        shutil.copytree(CHECKOUT / name, place / name)
    for file in CHECKOUT.glob("*.*"):
        if file.is_file():
            shutil.copy(file, place)
    path = f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"
    pytest = (python, "-m", "pytest", "-q", "--numprocesses", "2", "-m", "not slow")
    return log.run(*pytest, *tests, path=path, cwd=place)[0]


def check_sources(names: list[str]) -> None:
    """Exit if the sdist contains build products or test data, or lacks a module."""
    inside = {name.partition("/")[2] for name in names}
    wrong = [name for name in inside if Path(name).suffix in (".a", ".o", ".pyc", ".so", ".xz")]
    modules = {str(path.relative_to(CHECKOUT)) for path in CHECKOUT.glob("fastsam/**/*.py")}
    if wrong or modules - inside:
        sys.exit(
            f"the sdist must not contain {sorted(wrong)}, and must contain {sorted(modules - inside)}"
        )


def outcome(worked: bool) -> Outcome:
    """Return the text of a cell."""
    return "ok" if worked else "FAILED"


def main() -> int:
    """Check every row, print the table, and return 0 if nothing failed, else 1."""
    pythons = os.environ.get("PYTHONS", "3.10 3.11 3.12 3.13").split()
    torches = os.environ.get("TORCHES", "2.9 newest").split()
    tests = os.environ.get("TESTS", "").split()
    build = CHECKOUT / "build"
    build.mkdir(exist_ok=True)
    log = Log(build / "release-check.log")
    print(f"log: {log.path}", flush=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        log.must(sys.executable, "-m", "build", "--sdist", "--outdir", folder, cwd=CHECKOUT)
        (sdist,) = folder.glob("*.tar.gz")
        with tarfile.open(sdist) as archive:
            check_sources(archive.getnames())
            archive.extractall(folder, filter="data")
        unbuilt = folder / sdist.name.removesuffix(".tar.gz")
        print("| Python | torch | package | tools | install | outside | inside | tests |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
        for python in pythons:
            wheels = folder / python
            for torch in torches:
                with environment_with_torch(python, torch, log) as base:
                    if not wheels.exists():
                        # Build from the sdist, so that the wheel reveals files that the sdist lacks.
                        build_wheel = CHECKOUT / ".ci" / "wheel"
                        log.must(build_wheel, base / "bin" / "python", wheels, sdist, cwd=folder)
                    (wheel,) = wheels.glob("*.whl")
                    packages: dict[Artifact, Path] = {"wheel": wheel, "sdist": sdist}
                    for artifact, package in packages.items():
                        for compiler in (False, True):
                            row = Row(python, torch, artifact, compiler)
                            tested = python == pythons[0] and artifact == "wheel" and not compiler
                            suite = tests if tested else []
                            rows.append(checked(row, base, package, unbuilt, suite, log))
                            print(rows[-1].line(), flush=True)
    return 1 if any("FAILED" in row.results for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
