"""Progress: a bar on a terminal, one line per minute elsewhere, nothing if disabled."""

from __future__ import annotations

import io
import sys

import pytest

from fastsam.progress import ProgressBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def use(bar: ProgressBar) -> None:
    with bar:
        for _ in range(3):
            bar.update(note="going")
        bar.write("a line")


@pytest.mark.parametrize(
    ("stream", "enabled"), [(Terminal(), False), (io.StringIO(), True), (io.StringIO(), False)]
)
def test_a_disabled_bar_prints_nothing(monkeypatch, stream, enabled):
    monkeypatch.setattr(sys, "stderr", stream)
    use(ProgressBar(total=3, description="work", enabled=enabled))
    assert stream.getvalue() == ""


def test_without_tqdm_nothing_is_printed(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    use(ProgressBar(total=3, description="work"))
    assert stream.getvalue() == ""


def test_a_log_gets_a_line_a_minute(monkeypatch):
    stream, clock = io.StringIO(), iter(range(0, 1000, 25))
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("fastsam.progress.time.monotonic", lambda: float(next(clock)))
    with ProgressBar(total=9, description="work", unit="epoch") as bar:
        for number in range(9):
            bar.update(note=f"loss {number}")
    lines = stream.getvalue().splitlines()
    assert lines == [
        "work: epoch 3 of 9, loss 2",
        "work: epoch 6 of 9, loss 5",
        "work: epoch 9 of 9, loss 8",
    ]


def test_the_bar_is_visible_on_a_terminal(monkeypatch):
    pytest.importorskip("tqdm")
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    bar = ProgressBar(total=3, description="work")
    bar._bar.delay = 0  # do not wait for a second in a test
    use(bar)
    assert "a line" in stream.getvalue()
    bar.close()  # may be called twice
