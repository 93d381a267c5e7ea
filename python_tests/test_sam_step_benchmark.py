"""The SAM step's benchmark where memory is short, and that it lets go of what it measured."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from benchmarks import sam_step
from benchmarks.peers import plain
from benchmarks.sam_step import FLOOR, SamStep
from benchmarks.shapes import CASES
from benchmarks.timing import interleaved

SHAPES = [(30, 7), (11,)]
ELEMENTS = 221
PEERS = {"fastsam", "fastsam, no check", "plain PyTorch", "foreach + fused SGD", FLOOR}


def in_a_cycle(parameters: Sequence[Tensor]) -> Callable[[], object]:
    """A peer that only the garbage collector can free."""

    run = plain(parameters)
    cycle: list[object] = [run]
    cycle.append(cycle)

    def step() -> None:
        assert cycle[0] is run
        run()

    return step


@pytest.fixture
def contests(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The contestants that are timed together; every one before them must be gone by then."""
    timed: list[list[str]] = []
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    make_parameters = sam_step._parameters

    def making(*args: Any) -> list[Tensor]:
        parameters = make_parameters(*args)
        alive.update(parameters)
        return parameters

    def timing(steps: dict[str, Callable[[], object]], **settings: Any) -> Any:
        assert len(alive) == len(SHAPES) * len(steps)
        timed.append(list(steps))
        return interleaved(steps, rounds=2, calls=1, device=settings["device"])

    monkeypatch.setattr(sam_step, "_parameters", making)
    monkeypatch.setattr(sam_step, "interleaved", timing)
    monkeypatch.setattr(sam_step, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(sam_step.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sam_step.peers, "plain", in_a_cycle)
    monkeypatch.setitem(CASES, "small", SHAPES)
    return timed


def results(folder: Path) -> dict[str, Any]:
    SamStep(cases=("small",), device="cpu", out=folder).run()
    (file,) = folder.glob("sam_step*.json")
    return json.loads(file.read_text())["cases"]["small"]


def limit(monkeypatch: pytest.MonkeyPatch, contestants: int) -> None:
    """Room for just so many."""
    bytes_per_parameter = contestants * sam_step.HELD_BYTES + sam_step.WORKING_BYTES
    monkeypatch.setattr(sam_step, "_room", lambda device: ELEMENTS * bytes_per_parameter)


def test_where_all_fit_they_are_timed_in_turn(
    contests: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limit(monkeypatch, len(PEERS))
    case = results(tmp_path)
    assert [set(names) for names in contests] == [PEERS]
    assert case["timed_together"] == len(PEERS)


@pytest.mark.parametrize("room", [2, 4])
def test_where_not_all_fit_each_peer_is_timed_with_fastsam(
    room: int, contests: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limit(monkeypatch, room)
    case = results(tmp_path)
    assert all(len(names) == 2 and names[0] == "fastsam" for names in contests)
    assert {names[1] for names in contests} == PEERS - {"fastsam"}
    assert case["timed_together"] == 2
    assert set(case["peers"]) == PEERS
    assert next(iter(case["peers"])) == "fastsam"
    assert case["peers"]["fastsam"]["ratio"] == 1.0
    assert all(row["median"] > 0 and row["ratio"] > 0 for row in case["peers"].values())


def test_a_ratio_is_to_fastsam_in_the_same_pair(
    contests: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every pair finds the machine slower than the one before; a step takes as long as its name."""
    slower = iter(range(1, 100))

    class Clocked:
        def __init__(self, median: float) -> None:
            self.median = median

        def as_dict(self) -> dict[str, float]:
            return dict.fromkeys(("median", "lower_quartile", "upper_quartile"), self.median)

    def timing(steps: dict[str, Callable[[], object]], **settings: Any) -> dict[str, Clocked]:
        factor = next(slower)
        return {name: Clocked(factor * len(name)) for name in steps}

    monkeypatch.setattr(sam_step, "interleaved", timing)
    limit(monkeypatch, 3)
    for name, row in results(tmp_path)["peers"].items():
        assert row["ratio"] == pytest.approx(len(name) / len("fastsam"))


def test_where_no_two_fit_the_case_is_left_out(
    contests: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limit(monkeypatch, 1)
    SamStep(cases=("small",), device="cpu").run()
    assert not contests
    assert "left out" in capsys.readouterr().out


def test_a_billion_elements_run_in_80_gb() -> None:
    def make(parameters: Sequence[Tensor]) -> Callable[[], object]:
        raise AssertionError("only to be counted")

    contestants = dict.fromkeys([*PEERS, "reference file", "pytorch_optimizer"], make)
    pairs = sam_step._contests(contestants, CASES["one-1e9"], 78e9)
    assert len(pairs) == len(contestants) - 1
