"""The built documentation: links, anchors and pictures exist, and nothing comes from the network."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SITE = ROOT / "build" / "site"


@dataclass
class Page(HTMLParser):
    """What a page refers to, and what can be referred to in it."""

    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=lambda: {"", "__top"})

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect links, anchors, and what the browser loads."""
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag in ("img", "script", "iframe") and values.get("src"):
            self.loads.append(values["src"])
        elif tag == "link" and values.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.loads.append(values["href"])


@pytest.fixture(scope="module")
def pages() -> dict[Path, Page]:
    """The pages of the site that `make docs` built."""
    if not (SITE / "index.html").is_file() or _newest(ROOT / "docs") > _newest(SITE):
        pytest.skip("build/site is missing or older than docs: make docs")
    found = {}
    for path in SITE.rglob("*.html"):
        found[path] = Page()
        found[path].feed(path.read_text("utf-8"))
    return found


def _newest(folder: Path) -> float:
    return max(path.stat().st_mtime for path in folder.rglob("*") if path.is_file())


def test_links_and_anchors_lead_somewhere(pages: dict[Path, Page]) -> None:
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https", "mailto"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                broken.append(f"{path.relative_to(SITE)}: {link}")
            elif target.suffix == ".html" and unquote(parts.fragment) not in pages[target].anchors:
                broken.append(f"{path.relative_to(SITE)}: {link} (no such anchor)")
    # The page of a missing page is served under any path, so its links are absolute.
    assert [text for text in broken if not text.startswith("404.html")] == []


def test_nothing_is_loaded_from_the_network(pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        for source in page.loads:
            assert not urlsplit(source).netloc, f"{path.relative_to(SITE)} loads {source}"
            if path.name != "404.html":
                assert (path.parent / unquote(urlsplit(source).path)).is_file(), (path, source)


def test_every_page_is_in_the_navigation() -> None:
    def files(entry: object) -> list[str]:
        if isinstance(entry, dict):
            entry = list(entry.values())
        return [entry] if isinstance(entry, str) else [f for item in entry for f in files(item)]  # type: ignore[union-attr]

    listed = files(yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"])
    docs = ROOT / "docs"
    assert sorted(listed) == sorted(str(path.relative_to(docs)) for path in docs.rglob("*.md"))


def test_files_are_included(pages: dict[Path, Page]) -> None:
    """A line that includes a file is no text of a page: formatters of code blocks may break it."""
    for path in pages:
        text = re.sub(r"<[^>]+>", "", path.read_text("utf-8"))
        assert not re.search(r"--8\s*&lt;\s*--", text), path.relative_to(SITE)


def test_the_search_index_knows_the_pages(pages: dict[Path, Page]) -> None:
    index = (SITE / "search.json").read_text("utf-8")
    for word in ("spectral_density", "ascent_due", "calibrate", "torchrun"):
        assert word in index
