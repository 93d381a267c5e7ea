"""The default number of workers, from the cores of a rank."""

from __future__ import annotations

import os

import pytest

from fastsam.longtail.data.worker_count import cores_of_rank, default_workers, prefetched


@pytest.mark.parametrize(
    ("cores", "ranks", "own", "workers"),
    [
        (1, None, 1, 1),
        (2, "", 2, 1),
        (8, "1", 8, 7),
        (8, "2", 4, 3),
        (8, "3", 2, 1),
        (4, "8", 1, 1),
        (64, "0", 64, 16),
        (64, "four", 64, 16),
    ],
)
def test_cores_are_divided_among_the_ranks_of_a_machine(
    cores: int, ranks: str | None, own: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    environment = {} if ranks is None else {"LOCAL_WORLD_SIZE": ranks}
    assert cores_of_rank(environment) == own
    assert default_workers(own) == workers
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert cores_of_rank(environment) == own


def test_few_workers_read_further_ahead() -> None:
    assert [prefetched(workers) for workers in (0, 1, 2, 4, 5, 100)] == [None, 8, 4, 2, 2, 2]
