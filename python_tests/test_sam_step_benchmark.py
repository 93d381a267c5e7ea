"""The SAM step's benchmark: short memory, and freeing of measured contestants."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import peers, sam_step
from benchmarks.peers import FLOOR
from benchmarks.sam_step import SamStep
from benchmarks.shapes import CASES
from benchmarks.timing import Ratio, Timing, interleaved

SHAPES = [(30, 7), (11,)]
ELEMENTS = 221
PEERS = {"fastsam", "fastsam, no check", "plain PyTorch", "careful foreach", "foreach", FLOOR}
BASE = peers.BASES["SGD"]
HELD_BYTES = 4 * (3 + BASE.state)


plain = peers.plain


def in_a_cycle(parameters: Sequence[Tensor], base: peers.Base) -> Callable[[], object]:
    """Return a peer that only the garbage collector can free."""

    run = plain(parameters, base)
    cycle: list[object] = [run]
    cycle.append(cycle)

    def step() -> None:
        assert cycle[0] is run
        run()

    return step


@pytest.fixture
def contests(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Record which contestants are timed together, and check that earlier ones were freed."""
    timed: list[list[str]] = []
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    make_parameters = sam_step.parameters_of

    def making(*args: Any) -> list[Tensor]:
        parameters = make_parameters(*args)
        alive.update(parameters)
        return parameters

    def timing(steps: dict[str, Callable[[], object]], **settings: Any) -> Any:
        assert len(alive) == len(SHAPES) * len(steps)
        timed.append(list(steps))
        return interleaved(steps, rounds=2, calls=1, device=settings["device"])

    monkeypatch.setattr(sam_step, "parameters_of", making)
    monkeypatch.setattr(sam_step, "interleaved", timing)
    monkeypatch.setattr(sam_step, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(sam_step.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sam_step.peers, "plain", in_a_cycle)
    monkeypatch.setitem(CASES, "small", SHAPES)
    return timed


def results(folder: Path) -> dict[str, Any]:
    SamStep(cases=("small",), bases=("SGD",), threads=(1,), device="cpu", out=folder).run()
    (file,) = folder.glob("sam_step*.json")
    (row,) = json.loads(file.read_text())["rows"]
    assert (row["case"], row["base"], row["threads"]) == ("small", "SGD", 1)
    return row


def limit(monkeypatch: pytest.MonkeyPatch, contestants: int) -> None:
    """Limit memory to a number of contestants."""
    bytes_per_parameter = contestants * HELD_BYTES + sam_step.WORKING_BYTES
    monkeypatch.setattr(sam_step, "_room", lambda device: ELEMENTS * bytes_per_parameter)


def test_peers_that_all_fit_are_timed_in_turn(
    contests: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limit(monkeypatch, len(PEERS))
    case = results(tmp_path)
    assert [set(names) for names in contests] == [PEERS]
    assert case["timed_together"] == len(PEERS)


@pytest.mark.slow
@pytest.mark.parametrize("room", [2, 4])
def test_peers_that_do_not_all_fit_are_timed_in_pairs_with_fastsam(
    room: int, contests: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limit(monkeypatch, room)
    case = results(tmp_path)
    assert all(len(names) == 2 and names[0] == "fastsam" for names in contests)
    assert {names[1] for names in contests} == PEERS - {"fastsam"}
    assert case["timed_together"] == 2
    assert set(case["peers"]) == PEERS
    assert next(iter(case["peers"])) == "fastsam"
    assert case["peers"]["fastsam"]["ratio"]["median"] == 1.0
    assert all(
        row["median"] > 0 and row["cpu_median"] > 0 and row["ratio"]["median"] > 0
        for row in case["peers"].values()
    )


def test_a_ratio_is_to_fastsam_in_the_same_pair(
    contests: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The machine slows down from pair to pair; the time of a step is given by its name."""
    slower = iter(range(1, 100))

    def timing(steps: dict[str, Callable[[], object]], **settings: Any) -> dict[str, Timing]:
        factor = next(slower)
        times = {name: (1.0 * factor * len(name),) * 7 for name in steps}
        return {name: Timing(wall=t, cpu=t, calls_per_sample=1) for name, t in times.items()}

    monkeypatch.setattr(sam_step, "interleaved", timing)
    limit(monkeypatch, 3)
    for name, row in results(tmp_path)["peers"].items():
        for ratio in (row["ratio"], row["cpu_ratio"]):
            expected = pytest.approx(len(name) / len("fastsam"))
            assert ratio == {"median": expected, "lower": expected, "upper": expected}


def test_a_case_without_two_fits_is_omitted(
    contests: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limit(monkeypatch, 1)
    SamStep(cases=("small",), bases=("SGD",), threads=(1,), device="cpu").run()
    assert not contests
    assert "skipped, because two" in capsys.readouterr().out


def test_a_billion_elements_run_in_80_gb() -> None:
    def make(parameters: Sequence[Tensor], base: peers.Base) -> Callable[[], object]:
        raise AssertionError("only to be counted")

    contestants = dict.fromkeys([*PEERS, "reference file", "pytorch_optimizer"], make)
    elements = sum(map(math.prod, CASES["one-1e9"]))
    pairs = sam_step._contests(contestants, elements, BASE, 78e9)
    assert len(pairs) == len(contestants) - 1


@pytest.mark.parametrize("base", peers.BASES)
def test_peers_agree_with_every_base(base: str) -> None:
    """The benchmark checks it before it times anything; here for peers that may be too slow to time."""
    weights = []
    for make in (peers.fused, peers.careful, peers.foreach, peers.plain):
        parameters = sam_step.parameters_of(SHAPES, torch.device("cpu"))
        step = make(parameters, peers.BASES[base])
        for _ in range(3):
            step()
        weights.append(parameters)
    for other in weights[1:]:
        for found, expected in zip(other, weights[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_interval_of_a_paired_ratio_covers_the_true_median() -> None:
    """95 % nominal; the order statistics of 21 pairs give at least that."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(400):
        noise = torch.randn(21, generator=generator, dtype=torch.float64).exp()
        ratio = Ratio.of(tuple((1.5 * noise).tolist()), (1.0,) * 21)
        assert ratio.lower <= ratio.median <= ratio.upper
        covered += ratio.lower <= 1.5 <= ratio.upper
    assert 0.95 <= covered / 400 < 1.0


def test_few_pairs_have_no_interval() -> None:
    ratio = Ratio.of((2.0,) * 5, (1.0,) * 5)
    assert (ratio.median, ratio.lower, ratio.upper) == (2.0, 0.0, math.inf)


def test_shapes_have_the_sizes_of_their_models() -> None:
    millions = {
        "resnet32": 0.464,
        "resnet18": 11.69,
        "resnet50": 25.56,
        "vit-s16": 22.05,
        "gpt2": 124.44,
    }
    for name, expected in millions.items():
        assert sum(map(math.prod, CASES[name])) / 1e6 == pytest.approx(expected, rel=1e-3)
