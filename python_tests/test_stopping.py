"""Signals that stop a program, sent to this process."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import pytest

from fastsam import stopping
from fastsam.stopping import EXIT_INTERRUPTED, stop_signals


class ExitError(Exception):
    """Raised instead of ending the process."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the time in seconds, which only the test advances, and raise at an exit of the process."""
    now = [0.0]

    def leave(code: int) -> None:
        raise ExitError(code)

    monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(stopping.os, "_exit", leave)
    return now


@pytest.mark.parametrize("first", ["SIGTERM", "SIGUSR1", None])
def test_only_a_second_press_of_ctrl_c_ends_the_process(
    first: str | None, clock: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    with stop_signals() as request, request.deferred():
        if first is not None:
            os.kill(os.getpid(), getattr(signal, first))
            clock[0] += 5.0
        for _ in range(2):  # torchrun forwards a press
            os.kill(os.getpid(), signal.SIGINT)
            clock[0] += 0.5
        assert request.signal == (first or "SIGINT")
        assert capfd.readouterr().err.count("Ctrl-C stops at once") == 1
        clock[0] += 5.0
        with pytest.raises(ExitError, match=str(EXIT_INTERRUPTED)):
            os.kill(os.getpid(), signal.SIGINT)
