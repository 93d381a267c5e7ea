"""The architecture: imports only go down the layers, and the native core does not use torch."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from fastsam.kernels import extension

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fastsam"

FOUNDATION = {
    "cache",
    "csv_text",
    "disk_space",
    "distributed",
    "extras",
    "files",
    "html_table",
    "progress",
    "rank_errors",
    "records",
    "stopping",
    "text",
    "threads",
    "upload",
}
"""Foundation modules, below everything except the native module and its Python functions."""

LAYERS: dict[str, set[str]] = {
    "_native": set(),
    **{name: set() for name in FOUNDATION},
    "csv_text": {"text"},
    "distributed": {"rank_errors", "stopping"},
    "files": {"disk_space"},
    "rank_errors": {"stopping", "text"},
    "html_table": {"text"},
    "progress": {"text"},
    "kernels": {"_native"},
    "optim": {"kernels", *FOUNDATION},
    "curvature": {"kernels", *FOUNDATION},
    "integrations": {"optim", *FOUNDATION},
    "longtail": {"optim", "curvature", "kernels", *FOUNDATION},
    "report": {"longtail", "optim", "curvature", *FOUNDATION},
    "demo": {"report", "longtail", "optim", "curvature", *FOUNDATION},
    "__main__": {"cli", "distributed"},
    "cli": {"demo", "report", "longtail", "optim", "curvature", "kernels", *FOUNDATION},
}
"""Allowed imports of each part of the package, besides itself."""

CORE = ("kernels", "optim", "curvature", "integrations", *FOUNDATION)
BASE_DEPENDENCIES = {"torch", "numpy", "tyro", "psutil", "platformdirs"}
"""Packages of an installation without extras."""

CORE_IMPORTS = {"torch", "numpy", "fastsam"}
"""Allowed top-level imports of core modules; all others must be inside functions."""


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Return the dotted names that a module imports anywhere, including inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    here = part(path)
    assert here in LAYERS, f"{here} is a new part of the package: say what it may import"
    for name in imported(path):
        words = name.split(".")
        if words[0] != "fastsam":
            continue
        there = words[1] if len(words) > 1 else ""
        if there not in LAYERS:  # a public name of the package, which only the command line may use
            assert here in ("cli", "demo", "report", "longtail"), f"{path} imports {name}"
            continue
        assert there == here or there in LAYERS[here], f"{path} imports {name}"


LONGTAIL_LAYERS = (
    ("errors", "measured", "precision"),
    ("seeds", "settings"),
    ("registry", "runtime", "origin"),
    ("classes", "data"),
    ("weight_files", "base_optimizers", "stages", "named_recipes"),
    ("schedules", "models", "predictions"),
    ("features", "sharding", "tunings"),
    ("calibrators",),
    ("objective", "scores"),
    ("metrics",),
    ("results",),
    ("losses", "optimizers", "mixers"),
    ("methods", "run_settings"),
    ("samplers", "config"),
    ("recipes", "differences", "trainable", "finite", "archive"),
    ("build",),
    ("sharded_archive",),
    ("checkpoint", "tracking", "run_file"),
    ("class_loss", "start", "norms", "stage_plan"),
    ("training", "landscape", "trained"),
    ("sweeps",),
    ("published",),
    ("reproduce", "tuning"),
)
"""Parts of ``fastsam.longtail`` from the bottom up; each may import those before it."""


@pytest.mark.parametrize(
    "path",
    [p for p in modules() if part(p) == "longtail" and p != PACKAGE / "longtail" / "__init__.py"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_imports_go_down_in_longtail_too(path: Path) -> None:
    height = {name: place for place, names in enumerate(LONGTAIL_LAYERS) for name in names}
    here = path.relative_to(PACKAGE / "longtail").parts[0].removesuffix(".py")
    assert here in height, f"{here} is a new part of the package: say where it stands"
    for name in imported(path):
        words = name.split(".")
        if words[:2] == ["fastsam", "longtail"] and len(words) > 2 and words[2] != here:
            assert height[words[2]] <= height[here], f"{path} imports {name}"


def test_training_does_not_distinguish_parts_by_class() -> None:
    for path in (PACKAGE / "longtail" / "training").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "isinstance",
                "issubclass",
            ):
                assert ast.unparse(node.args[1]) == "str", f"{path}: {ast.unparse(node)}"


OPTIM_LAYERS: dict[str, set[str]] = {
    "passes": set(),
    "_engine": {"passes"},
    "plain": set(),
    "batch_norm": set(),
    "skipped": set(),
    "schedules": {"_engine"},
    "late_phase": {"_engine"},
    "layers": set(),
    "sam": {"_engine", "passes"},
    "local": {"sam", "passes"},
    "m_sharpness": {"sam"},
    "rehearsal": {"sam"},
    "obstacles": {"_engine", "sam"},
    "capture": {"sam", "obstacles", "batch_norm", "skipped", "rehearsal", "_engine"},
    "variants": {"_engine", "sam", "passes"},
}
"""Allowed imports of each part of ``fastsam.optim``, besides itself."""


@pytest.mark.parametrize(
    "path",
    [p for p in modules() if part(p) == "optim" and p != PACKAGE / "optim" / "__init__.py"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_imports_go_down_in_optim_too(path: Path) -> None:
    here = path.relative_to(PACKAGE / "optim").parts[0].removesuffix(".py")
    there = {name.split(".")[2] for name in imported(path) if re.match(r"fastsam\.optim\.\w", name)}
    assert there <= OPTIM_LAYERS[here] | {here}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_private_packages_are_imported_only_by_their_own_package(path: Path) -> None:
    for name in imported(path):
        words = name.split(".")
        for index, word in enumerate(words[1:], start=1):
            owner = PACKAGE.joinpath(*words[1:index])
            if words[0] == "fastsam" and word.startswith("_") and (owner / word).is_dir():
                assert owner in path.parents, f"{path} imports {name}"


def top_level_imports(path: Path) -> set[str]:
    """Return the packages that importing a module imports."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize(
    "path",
    [path for path in modules() if part(path) in CORE],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_the_core_imports_torch_and_numpy_only(path: Path) -> None:
    foreign = top_level_imports(path) - CORE_IMPORTS - set(sys.stdlib_module_names)
    assert not foreign


def test_the_base_install_matches_pyproject() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    line = re.search(r"^dependencies = \[(.*)\]$", text, re.MULTILINE)
    assert line is not None
    assert set(re.findall(r'"([\w-]+)', line[1])) == BASE_DEPENDENCIES


def is_guarded(node: ast.AST) -> bool:
    """Return whether imports in this block are guarded by ``requires_extra``, or never run."""
    if isinstance(node, ast.With):
        return "requires_extra(" in ast.unparse(node.items[0])
    if isinstance(node, ast.Try):
        caught = [ast.unparse(handler.type) for handler in node.handlers if handler.type]
        return "ImportError" in caught
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def unguarded_imports(tree: ast.AST) -> set[str]:
    """Return the packages that a module imports outside of guards."""
    names: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.add(node.module.partition(".")[0])
        elif not is_guarded(node):
            names |= unguarded_imports(node)
    return names


@pytest.mark.parametrize(
    "path",
    [path for path in modules() if part(path) not in ("longtail", "cli", "demo")],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_a_missing_package_is_reported_with_its_extra(path: Path) -> None:
    imports = unguarded_imports(ast.parse(path.read_text()))
    assert not imports - BASE_DEPENDENCIES - {"fastsam"} - set(sys.stdlib_module_names)


def dotted(path: Path) -> str:
    """Return the name of a module, such as ``fastsam.curvature.api``, without ``__init__``."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_at_once(path: Path) -> set[str]:
    """Return the modules of this package that importing a module imports, without their parent packages."""
    known = {dotted(other) for other in PACKAGE.rglob("*.py")}
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= {member if member in known else node.module for member in members}
    return names & known - {dotted(path)}


def test_no_modules_import_each_other() -> None:
    graph = {dotted(path): imported_at_once(path) for path in PACKAGE.rglob("*.py")}
    assert sum(map(len, graph.values())) > 200
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"an import circle: {' < '.join(error.args[1])}")


SHARED_CLASS_NAMES: dict[str, str] = {}
"""Names that two public classes may share, with the reason."""


def test_no_two_public_classes_have_one_name() -> None:
    places: dict[str, list[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(dotted(path))
    shared = {name: where for name, where in places.items() if len(where) > 1}
    assert len(places) > 100
    assert {name: where for name, where in shared.items() if name not in SHARED_CLASS_NAMES} == {}
    assert set(SHARED_CLASS_NAMES) <= set(shared), "a listed name is no longer shared: remove it"


MOST_LINES = 400


def test_no_file_is_long() -> None:
    lines = {
        str(path.relative_to(PACKAGE)): len(path.read_text().splitlines())
        for path in PACKAGE.rglob("*.py")
    }
    longer = {name for name, count in lines.items() if count > MOST_LINES}
    assert not longer, f"more than {MOST_LINES} lines: split by subject"


def test_there_is_no_torch_in_the_native_sources() -> None:
    for path in (ROOT / "csrc").rglob("*.*"):
        includes = re.findall(r"#\s*include\s*[<\"](.+?)[>\"]", path.read_text())
        assert not [name for name in includes if re.match(r"torch|ATen|c10", name)], path


def test_only_the_bindings_know_python() -> None:
    for path in (ROOT / "csrc").rglob("*.*"):
        if path.parent.name != "bindings":
            assert "pybind11" not in path.read_text(), path
            assert "Python.h" not in path.read_text(), path


def test_the_native_module_links_no_torch() -> None:
    if shutil.which("ldd") is None:
        pytest.skip("there is no ldd on this system")
    linked = subprocess.run(
        ["ldd", extension.module().__file__ or ""], capture_output=True, text=True, check=True
    ).stdout
    assert "libstdc++" in linked or "libc++" in linked
    assert not re.search(r"libtorch|libc10|libcuda\.|libcudart", linked)
