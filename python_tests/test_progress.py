"""The progress bar: visible on a terminal, silent everywhere else."""

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
def test_silent(monkeypatch, stream, enabled):
    monkeypatch.setattr(sys, "stderr", stream)
    use(ProgressBar(total=3, description="work", enabled=enabled))
    assert stream.getvalue() == ""


def test_silent_without_tqdm(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    use(ProgressBar(total=3, description="work"))
    assert stream.getvalue() == ""


def test_visible_on_a_terminal(monkeypatch):
    pytest.importorskip("tqdm")
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    bar = ProgressBar(total=3, description="work")
    bar._bar.delay = 0  # do not wait for a second in a test
    use(bar)
    assert "a line" in stream.getvalue()
    bar.close()  # twice is fine
