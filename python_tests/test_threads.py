"""The thread count inside a context, after it, and in threads that start later."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from fastsam.threads import cpu_threads


@pytest.fixture(autouse=True)
def _seven_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(7)
    yield
    torch.set_num_threads(before)


def in_a_thread(function: Callable[[], object]) -> None:
    """Run ``function`` in a new thread, and raise its error."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def inherited() -> int:
    """Return the number of threads that a new thread inherits."""
    counts: list[int] = []
    in_a_thread(lambda: counts.append(torch.get_num_threads()))
    return counts[0]


def test_inside_and_afterwards() -> None:
    with cpu_threads(3):
        assert torch.get_num_threads() == 3
        assert inherited() == 3
    assert torch.get_num_threads() == inherited() == 7


@pytest.mark.parametrize("count", [None, 0])
def test_none_does_not_change_the_number(count: int | None) -> None:
    with cpu_threads(count):
        assert torch.get_num_threads() == 7
    assert torch.get_num_threads() == inherited() == 7


def test_nested_contexts_restore_the_number_that_each_found() -> None:
    with cpu_threads(3):
        with cpu_threads(2):
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == inherited() == 3
    assert torch.get_num_threads() == inherited() == 7


def test_the_number_is_restored_after_an_error() -> None:
    with pytest.raises(KeyError), cpu_threads(3):
        raise KeyError
    with pytest.raises(RuntimeError), cpu_threads(-1):  # torch rejects it
        pass
    assert torch.get_num_threads() == inherited() == 7


@pytest.mark.parametrize("first_leaves_first", [True, False])
def test_contexts_that_overlap_in_two_threads(first_leaves_first: bool) -> None:
    """Each thread has its own number inside, and no thread inherits a context's number afterwards."""
    outer = cpu_threads(3)
    outer.__enter__()
    entered, may_leave = threading.Event(), threading.Event()
    counts: list[int] = []

    def other() -> None:
        with cpu_threads(2):
            entered.set()
            assert may_leave.wait(60)
            counts.append(torch.get_num_threads())

    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(60)
    assert torch.get_num_threads() == 3
    if first_leaves_first:
        outer.__exit__(None, None, None)
        assert torch.get_num_threads() == 7
    may_leave.set()
    thread.join()
    if not first_leaves_first:
        assert torch.get_num_threads() == 3
        outer.__exit__(None, None, None)
    assert counts == [2]
    assert torch.get_num_threads() == inherited() == 7


@pytest.mark.parametrize("first_leaves_first", [True, False])
def test_contexts_of_one_thread_that_are_not_nested(first_leaves_first: bool) -> None:
    """As with generators."""
    with cpu_threads(6):
        contexts = [cpu_threads(3), cpu_threads(2)]
        for context in contexts:
            context.__enter__()
        for number, context in enumerate(contexts if first_leaves_first else contexts[::-1]):
            context.__exit__(None, None, None)
            if number == 0:
                assert torch.get_num_threads() == (2 if first_leaves_first else 3)
        assert torch.get_num_threads() == inherited() == 6
    assert torch.get_num_threads() == inherited() == 7


def test_overlapping_threads_inside_an_open_context() -> None:
    """The first of the two workers closes first; the second inherited its number."""
    with cpu_threads(6):
        first, second = cpu_threads(3), cpu_threads(2)
        events = [threading.Event() for _ in range(3)]

        def one() -> None:
            first.__enter__()
            events[0].set()
            assert events[1].wait(60)
            first.__exit__(None, None, None)
            events[2].set()

        def other() -> None:
            assert events[0].wait(60)
            second.__enter__()
            events[1].set()
            assert events[2].wait(60)
            second.__exit__(None, None, None)

        workers = [threading.Thread(target=work) for work in (one, other)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert torch.get_num_threads() == inherited() == 6
