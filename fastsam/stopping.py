"""Signals that ask a program to save its state and to stop."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_STOPPED = 75
"""Exit code of a program that stopped because of a signal, before it was done: ``EX_TEMPFAIL`` of sysexits.h,
which asks the caller to try again. Schedulers can requeue a job by it."""
EXIT_INTERRUPTED = 130
"""Exit code after a second Ctrl-C, as shells use it."""
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)
)
"""Signals that ask a program to stop, of those that the system has: Windows has no SIGUSR1."""
_ONE_PRESS_SECONDS = 1.0
"""torchrun forwards the SIGINT of a Ctrl-C that its processes received from the terminal already."""


class Stopped(BaseException):
    """Raised if a signal stopped a program. The message says how to continue.

    Like ``KeyboardInterrupt`` it is no error, so ``except Exception`` does not catch it.
    """


class StopRequest:
    """Whether a signal asked this process to stop.

    Attributes:
        signal: name of the first signal; None before it.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._deferred = False
        self._pressed: float | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def check(self) -> None:
        """Raise :class:`Stopped` if a signal asked to stop, and all that is to be kept is saved."""
        if self:
            raise Stopped(
                f"stopped by {self.signal}; nothing more was saved. Run the same command again"
            )

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only record signals inside the context, whose code checks the request and saves its state.

        Outside it a signal raises :class:`Stopped` at once.
        """
        before, self._deferred = self._deferred, True
        try:
            yield
        finally:
            self._deferred = before

    def _receive(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        first = self.signal is None
        first_press = name == "SIGINT" and self._pressed is None
        if name == "SIGINT":
            now = time.monotonic()
            if self._pressed is None:
                self._pressed = now
            elif now - self._pressed > _ONE_PRESS_SECONDS:
                os._exit(EXIT_INTERRUPTED)
        if first:
            self.signal = name
        if first and not self._deferred:
            self.check()
        if first_press and os.environ.get("RANK", "0") == "0":
            # A handler may interrupt a write to sys.stderr, whose buffer cannot be entered twice.
            os.write(
                2, f"\nfastsam: {name}: stopping after this step; Ctrl-C stops at once\n".encode()
            )


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Record SIGTERM, SIGUSR1 and SIGINT inside the context, and yield the request that they make.

    A second Ctrl-C, at least a second after the first, ends the process at once with exit code 130. Only the
    main thread can receive signals: in another thread nothing changes.

    Example:
        >>> import os, signal
        >>> with stop_signals() as request, request.deferred():
        ...     os.kill(os.getpid(), signal.SIGUSR1)
        ...     request.signal
        'SIGUSR1'
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request._receive) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_with_parent() -> None:
    """Send SIGTERM to this process when its parent ends, on Linux; do nothing elsewhere.

    A launcher that is killed cannot stop its processes. They would train on and hold the lock of their run.
    """
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signal.SIGTERM), 0, 0, 0)


def outlast_parent_signals() -> None:
    """Keep a worker process alive while its parent finishes a step after a signal.

    A terminal, a scheduler and torchrun send their signals to workers too. Only the SIGTERM of the parent
    ends the worker, and the end of the parent, which a ``DataLoader`` worker notices itself.
    """
    for number in STOP_SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return
    terminate = {signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, terminate)

    def end_with_parent() -> None:
        while signal.sigwaitinfo(terminate).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()
