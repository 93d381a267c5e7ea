"""The README's numbers match the committed results, and its links and make targets exist."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from benchmarks.readme import DOCUMENTS, README, rendered, stored_demo

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_numbers_are_those_of_the_results(document: Path) -> None:
    assert document.read_text() == rendered(document.read_text())


_SECTION = re.compile(r"<!-- results:.*?<!-- end -->", flags=re.DOTALL)
_DIFFERENCE = re.compile(r"(-?\d+\.\d+)\s+\[(-?\d+\.\d+),\s+(-?\d+\.\d+)\]")


def differences(text: str) -> set[tuple[float, ...]]:
    """Return all ``mean [low, high]`` of a text."""
    return {tuple(map(float, found)) for found in _DIFFERENCE.findall(text)}


def test_differences_in_sentences_are_in_a_table() -> None:
    """A sentence may turn the sign around: a table's -1.1 [-1.5, -0.7] is a loss of 1.1 [0.7, 1.5]."""
    texts = {path: path.read_text("utf-8") for path in (README, *(ROOT / "docs").rglob("*.md"))}
    tables = differences("\n".join(itertools.chain(*map(_SECTION.findall, texts.values()))))
    known = tables | {(-mean, -high, -low) for mean, low, high in tables}
    sentences = {path: differences(_SECTION.sub("", text)) for path, text in texts.items()}
    assert sum(map(len, sentences.values())) > 20
    unknown = {path.name: found - known for path, found in sentences.items() if found - known}
    assert not unknown


def test_advice_on_wrong_labels_follows_the_demo() -> None:
    """docs/sam/choose.md recommends SAM for many wrong labels because of this verdict."""
    comparison, _ = stored_demo()
    verdicts = [verdict for verdict, _ in comparison.panels[-1].verdicts()]
    assert "wrong labels" in comparison.panels[-1].title
    assert "SAM throughout vs. SGD: better." in verdicts


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text())
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    documents = README.read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    mentioned = set(re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)\b(?=`|\s+#)", documents))
    assert mentioned
    assert mentioned <= targets
