"""The walks of docs/architecture.md: every function exists and calls, or is called by, those it names."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
STOP = re.compile(r"^(\d+)\. `([\w.]+)` in `([\w/.]+)` .*?(Calls|Called by) ([\d, and]+)\.$")


@dataclass(frozen=True)
class Stop:
    """A function of a walk.

    Attributes:
        name: its qualified name.
        file: the file that defines it.
        calls: numbers of the stops that it calls.
        called_by: numbers of the stops that call it.
    """

    name: str
    file: str
    calls: tuple[int, ...]
    called_by: tuple[int, ...]


def walks() -> dict[str, dict[int, Stop]]:
    """Every walk of the page by its title."""
    found = {}
    for section in PAGE[PAGE.index("## Four walks") :].split("\n### ")[1:]:
        title, _, body = section.partition("\n")
        stops = {}
        for line in re.findall(r"^\d+\. .*$", body, flags=re.MULTILINE):
            match = STOP.match(line)
            assert match, f"cannot read: {line}"
            numbers = tuple(int(number) for number in re.findall(r"\d+", match[5]))
            down = match[4] == "Calls"
            stops[int(match[1])] = Stop(
                match[2], match[3], numbers if down else (), () if down else numbers
            )
        found[title] = stops
    return found


WALKS = walks()


def definition(name: str, file: str) -> ast.AST:
    """The function of a qualified name in a file."""
    node: ast.AST = ast.parse((ROOT / file).read_text("utf-8"))
    for part in name.split("."):
        inner = [
            child
            for child in ast.iter_child_nodes(node)
            if isinstance(child, (ast.ClassDef, ast.FunctionDef)) and child.name == part
        ]
        assert inner, f"{file} has no {name}"
        node = inner[0]
    return node


def called(name: str, file: str) -> set[str]:
    """The names that a function calls, without what is before the dot."""
    tree = definition(name, file)
    functions = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = {node.attr for node in functions if isinstance(node, ast.Attribute)}
    return names | {node.id for node in functions if isinstance(node, ast.Name)}


def last(stop: Stop) -> str:
    """The name by which a stop is called."""
    return stop.name.rpartition(".")[2]


def test_there_are_four_walks() -> None:
    assert list(WALKS) == ["A gradient", "rho", "A batch", "A Lanczos vector"]
    assert all(list(stops) == list(range(1, len(stops) + 1)) for stops in WALKS.values())


@pytest.mark.parametrize("title", WALKS)
def test_every_function_exists_and_calls_what_is_stated(title: str) -> None:
    stops = WALKS[title]
    for stop in stops.values():
        definition(stop.name, stop.file)
        for number in stop.calls:
            assert last(stops[number]) in called(stop.name, stop.file), (stop.name, number)
        for number in stop.called_by:
            caller = stops[number]
            assert last(stop) in called(caller.name, caller.file), (caller.name, stop.name)


@pytest.mark.parametrize("title", WALKS)
def test_every_stop_is_connected(title: str) -> None:
    """A walk is no list of strangers: every stop calls another one or is called by one."""
    stops = WALKS[title]
    linked = {n for s in stops.values() for n in (*s.calls, *s.called_by)}
    assert all(stop.calls or stop.called_by for stop in stops.values())
    assert linked <= set(stops)


def test_layers_are_those_of_the_package() -> None:
    """Every folder that the page names exists, and no layer of the package is missing."""
    table = PAGE[PAGE.index("## Layers") : PAGE.index("## Where something new goes")]
    named = re.findall(r"`((?:fastsam|csrc)/[\w/]+/)`", table)
    assert named
    assert all((ROOT / name).is_dir() for name in named)
    top = {path.name for path in (ROOT / "fastsam").iterdir() if (path / "__init__.py").is_file()}
    assert {f"fastsam/{name}/" for name in top} <= set(named)
