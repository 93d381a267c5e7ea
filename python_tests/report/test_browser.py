"""The page in a browser: Debian's package chromium, without a window, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install playwright"
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="chromium is not installed: apt-get install chromium"
)
DRAW_ALL = """
Promise.all([...document.querySelectorAll("[data-chart]")].filter((box) => box.offsetParent).map(draw))
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield started
        started.close()


class Opened:
    """The report in a window of its own, with all figures drawn, and what the browser said about it."""

    def __init__(self, browser: Any, folder: Path, *, width: int, scheme: str) -> None:
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto((folder / "report.html").as_uri())
        self.page.evaluate(DRAW_ALL)

    def column(self, table: str, number: int) -> list[str]:
        """The visible cells of a column, from 1."""
        cells = self.page.locator(f'[data-table="{table}"] tbody tr:visible > :nth-child({number})')
        found: list[str] = cells.all_inner_texts()
        return found


@pytest.fixture(scope="module")
def wide(browser: Any, folder: Path) -> Iterator[Opened]:
    opened = Opened(browser, folder, width=1280, scheme="light")
    yield opened
    opened.page.close()


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_the_browser_says_nothing_and_nothing_scrolls_sideways(
    browser: Any, folder: Path, width: int, scheme: str
) -> None:
    opened = Opened(browser, folder, width=width, scheme=scheme)
    assert opened.page.locator(".js-plotly-plot").count() >= 8
    for summary in opened.page.locator("section summary").all():
        summary.click()
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    ground = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    assert opened.messages == []
    assert all(url.startswith(("file:", "data:", "blob:")) for url in opened.requests)
    opened.page.close()


def test_a_header_sorts_by_mouse_and_keyboard(wide: Opened) -> None:
    header = wide.page.locator('[data-table="accuracy"] thead th').nth(4)
    numbers = [float(text.split()[0]) for text in wide.column("accuracy", 5)]
    assert header.get_attribute("aria-sort") == "none"
    header.locator("button").click()
    assert header.get_attribute("aria-sort") == "ascending"
    assert [float(text.split()[0]) for text in wide.column("accuracy", 5)] == sorted(numbers)
    header.locator("button").press("Enter")
    assert header.get_attribute("aria-sort") == "descending"
    falling = [float(text.split()[0]) for text in wide.column("accuracy", 5)]
    assert falling == sorted(numbers, reverse=True)
    name = wide.page.locator('[data-table="accuracy"] thead th').nth(0)
    name.locator("button").click()
    assert header.get_attribute("aria-sort") == "none"
    assert wide.column("accuracy", 1) == sorted(wide.column("accuracy", 1))


def test_a_filter_keeps_the_rows_with_all_words(wide: Opened) -> None:
    box = wide.page.locator('[data-table="runs"] [data-filter]')
    box.fill("1 SAM-1")
    assert wide.column("runs", 1) == ["sam-1"]
    box.fill("")
    assert len(wide.column("runs", 1)) == 5


def test_a_hidden_run_leaves_figures_tables_and_copies(wide: Opened) -> None:
    page = wide.page
    toggle = page.locator("[data-toggle]").nth(0)
    loss = page.locator(".chart").filter(has_text="loss").first
    shown = "(box) => box.data.filter((trace) => trace.visible).length"
    columns = page.locator('[data-table="classes"] thead th:visible')
    assert (loss.evaluate(shown), columns.count()) == (5, 6)
    toggle.click()
    assert toggle.get_attribute("aria-pressed") == "false"
    page.wait_for_function(
        "(box) => box.data.filter((t) => t.visible).length === 3", arg=loss.element_handle()
    )
    assert all("sgd" not in name for name in wide.column("accuracy", 1) + wide.column("runs", 2))
    assert columns.count() == 5
    copied = page.evaluate(
        "['csv', 'md', 'tex'].map((f) => tableText(document.querySelector('[data-table=classes]'), f))"
    )
    for text, separator in zip(copied, (",", "|", "&"), strict=True):
        assert "sgd" not in text
        assert "sam" in text
        assert len({line.count(separator) for line in text.splitlines() if "head" in line}) == 1
    toggle.press("Space")
    assert len(wide.column("accuracy", 1)) == 3
    page.fill("#runs-filter", "defer")
    page.click("#runs-only")
    assert wide.column("accuracy", 1) == ["ce-drw sam, ascent_start defer"]
    assert page.inner_text("#runs-status") == "2 of 3 hidden"
    page.fill("#runs-filter", "")
    page.click("#runs-all")
    assert len(wide.column("accuracy", 1)) == 3


def test_a_table_is_copied_as_it_is_shown(wide: Opened, folder: Path) -> None:
    page = wide.page
    table = page.locator('[data-table="runs"]')
    table.locator("thead button").nth(0).click()
    table.locator("[data-filter]").fill("sgd")
    text = table.evaluate("(box) => tableText(box, 'csv')")
    assert [line.split(",")[0] for line in text.splitlines()] == ["folder", "sgd-0", "sgd-1"]
    table.locator('[data-copy="md"]').click()
    page.wait_for_function(
        "() => document.getElementById('copy').open"
        " || document.querySelector('[data-table=runs] [role=status]').textContent === 'Copied.'"
    )
    if page.locator("#copy").is_visible():  # the browser did not allow it: the reader copies
        assert page.input_value("#copy textarea").startswith("| folder | run |")
        page.click("#copy button")
    table.locator("[data-filter]").fill("")


def test_the_color_scheme_can_be_chosen(wide: Opened) -> None:
    page = wide.page
    loss = page.locator(".chart").filter(has_text="loss").first
    before = loss.evaluate("(box) => box.data[0].line.color")
    page.click("#theme")
    assert page.get_attribute("#theme", "aria-pressed") == "true"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"
    page.wait_for_function(
        "([box, color]) => box.data[0].line.color !== color", arg=[loss.element_handle(), before]
    )
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_one_matrix_is_shown_at_a_time(wide: Opened) -> None:
    figures = wide.page.locator("section:has([data-choice]) figure:visible figcaption")
    assert figures.all_inner_texts() == ["Confusion, ce-drw sgd, 2 seeds"]
    wide.page.select_option("[data-choice]", "1")
    assert figures.all_inner_texts() == ["Confusion, ce-drw sam, ascent_start defer"]
    assert wide.messages == []
