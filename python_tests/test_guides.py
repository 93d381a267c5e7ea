"""Examples in README, guides and docstrings work: Python runs, commands parse."""

from __future__ import annotations

import doctest
import importlib
import re
import shlex
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]
GUIDES = sorted((ROOT / "docs").rglob("*.md"))
FENCE = re.compile(
    r"(?P<mark><!-- not run: [^>]+ -->\s*)?"
    r"^(?P<indent> *)```(?P<language>\w+)[^\n]*\n(?P<body>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)


def blocks(path: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language, without those that are not run or include a file."""
    return [
        textwrap.dedent(match["body"])
        for match in FENCE.finditer(path.read_text("utf-8"))
        if match["language"] == language and not match["mark"] and "--8<--" not in match["body"]
    ]


def page(path: Path) -> str:
    """Return the name of a test's page."""
    return str(path.relative_to(ROOT).with_suffix(""))


def modules_with_examples() -> list[str]:
    files = (ROOT / "fastsam").rglob("*.py")
    return sorted(
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for file in files
        if ">>> " in file.read_text()
    )


@pytest.fixture
def headless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no figures, and write files to a temporary folder."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.mark.parametrize("guide", [path for path in GUIDES if blocks(path, "python")], ids=page)
@pytest.mark.usefixtures("headless")
def test_python_blocks_run_in_order(guide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "\n".join(blocks(guide, "python"))
    module = ModuleType("guide")  # dataclasses look up the module that they are in
    monkeypatch.setitem(sys.modules, "guide", module)
    exec(compile(code, str(guide), "exec"), vars(module))


@pytest.mark.parametrize("document", [ROOT / "README.md", *GUIDES], ids=page)
def test_commands_parse(document: Path) -> None:
    """Every `fastsam` command parses with all of its flags."""
    pytest.importorskip("tyro")
    from fastsam import cli

    shell = "\n".join(blocks(document, "sh")).replace("\\\n", "")
    pattern = r"(?:^fastsam|fastsam\.cli) (.+?)(?:\s{2,}#.*)?$"
    for command in re.findall(pattern, shell, re.MULTILINE):
        cli.parse(shlex.split(command))


def test_there_is_something_to_run_and_to_parse() -> None:
    """Pages that teach code run it, and the pattern of a fence has not stopped matching."""
    runnable = {page(path) for path in GUIDES if blocks(path, "python")}
    assert {
        "docs/get-started",
        *(f"docs/sam/{name}" for name in ("index", "when-to-ascend", "precision", "variants")),
        *(
            f"docs/spectra/{name}"
            for name in ("index", "data", "error-bars", "memory", "escape", "surfaces")
        ),
        *(f"docs/longtail/{name}" for name in ("own-data", "methods", "plugins", "trained")),
        *(
            f"docs/migrate/{name}"
            for name in ("sam", "pytorch-optimizer", "pyhessian", "curvlinops")
        ),
    } <= runnable
    commands = {
        page(path) for path in GUIDES if "\nfastsam " in "\n" + "\n".join(blocks(path, "sh"))
    }
    assert {"docs/get-started", "docs/longtail/train", "docs/longtail/own-data"} <= commands


@pytest.mark.parametrize("document", GUIDES, ids=page)
def test_every_fence_is_read(document: Path) -> None:
    """A block that the pattern of a fence misses would never run."""
    text = document.read_text("utf-8")
    assert len(re.findall(r"^ *```\w", text, re.MULTILINE)) == len(FENCE.findall(text))


@pytest.mark.parametrize("name", modules_with_examples())
@pytest.mark.usefixtures("headless")
def test_examples_in_docstrings_run(name: str) -> None:
    if name.startswith("fastsam.optim.local"):
        pytest.skip("its example needs several processes: examples/ddp_local.py has it")
    module = importlib.import_module(name)
    failed, tried = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert tried > 0
    assert failed == 0
