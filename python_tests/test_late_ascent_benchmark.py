"""The plan and the statistics of the comparison of late SAM with late SGD."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.late_ascent import (
    arms,
    choice,
    command,
    curvature,
    curvature_summary,
    records,
    summary,
    tables,
)
from benchmarks.late_ascent.command import ORDER
from benchmarks.late_ascent.plan import (
    BASES,
    METHODS,
    OWN_TRIALS,
    SAM_TRIALS,
    SETUPS,
    SGD_TRIALS,
    TUNING_SEEDS,
    Arm,
    Setup,
    class_order,
    late_sam,
    late_sgd,
    more_trials,
)
from benchmarks.late_ascent.records import Stage, Unit
from benchmarks.late_ascent.verdict import holm
from benchmarks.seed_scores import SCORES
from fastsam.longtail.calibrators.logit_adjustment import TAUS


def test_ten_seeds_give_every_class_every_rank() -> None:
    orders = np.array([class_order(seed) for seed in range(10)])
    for line in (*orders, *orders.T):
        assert sorted(line) == list(range(10))


def test_both_families_have_as_many_trials() -> None:
    assert len(SGD_TRIALS) == len(SAM_TRIALS) == 8
    assert len({arm.name for arm in (*SGD_TRIALS, *SAM_TRIALS)}) == 16
    assert not more_trials(late_sgd(0.1, 1), late_sam(0.1, 0.3))
    more = more_trials(late_sgd(0.3, 10), late_sam(0.1, 0.1))
    assert [arm.factor for arm in more["sgd"]] == [1.0, 1.0]
    assert [dict(arm.settings)["rho"] for arm in more["sam"]] == [(0.02,), (0.02,)]
    more = more_trials(late_sgd(0.03, 1), late_sam(0.01, 0.6))
    assert [arm.factor for arm in more["sgd"]] == [0.003, 0.003]
    assert [dict(arm.settings)["rho"] for arm in more["sam"]] == [(1.2,), (1.2,)]


def test_every_setup_is_trained_in_some_order() -> None:
    assert {name for name, _ in ORDER} == set(SETUPS)
    assert set(OWN_TRIALS) <= set(SETUPS)


def test_the_late_phase_may_be_twice_as_long() -> None:
    schedule = SETUPS["fashion-600"].schedule(0.1, late=2)
    assert schedule == {
        "epochs": 72,
        "defer_epoch": 48,
        "lr_milestones": (48, 60),
        "lr_factors": (0.1, 0.001),
    }


def test_holm_by_hand() -> None:
    assert holm({"a": 0.04, "b": 0.001, "c": 0.03}) == pytest.approx(
        {"a": 0.06, "b": 0.003, "c": 0.06}
    )


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Setup:
    """Return a plan of three epochs on digits, with records in a temporary folder."""
    setup = Setup("tiny", "digits-lt", (("threads", 1),), epochs=3, defer=2, seeds=1, ordered=False)
    monkeypatch.setitem(SETUPS, "tiny", setup)
    for module in (records, curvature):
        monkeypatch.setattr(module, "FOLDER", tmp_path / "records")
    return setup


def test_runs_are_recorded_one_by_one_and_not_repeated(tiny: Setup, tmp_path: Path) -> None:
    unit, values = Unit("tiny", "ce-drw", 0), {"lr": 0.1, "weight_decay": 5e-4}
    base = Arm("base", branched=False)
    trials = [base, late_sgd(0.1, 10), late_sam(0.1, 0.05)]
    unit.train(trials[:2], values, tmp_path / "runs")
    first = unit.records()
    assert list(first) == ["base", "sgd late lr 0.1 wd 10"]
    unit.train(trials, values, tmp_path / "runs")
    found = unit.records()
    assert list(found) == [arm.name for arm in trials]
    assert {name: found[name] for name in first} == first
    sgd, sam = found["sgd late lr 0.1 wd 10"], found["sam late lr 0.1 rho 0.05"]
    assert sgd["settings"]["weight_decay"] == 5e-3
    assert sgd["parent"] == sam["parent"]
    assert sam["gradients"] > sgd["gradients"] == found["base"]["gradients"]
    assert sgd["test"]["tau"]["tau"] == TAUS[np.argmax(sgd["validation"]["by tau"])]


@pytest.mark.parametrize("name", OWN_TRIALS)
def test_trials_from_scratch_train_with_their_own_settings(
    name: str, tiny: Setup, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (method,) = SETUPS[name].methods
    own = {family: trials[-1:] for family, trials in OWN_TRIALS[name].items()}
    monkeypatch.setitem(OWN_TRIALS, name, own)
    small = replace(tiny, methods=(method,), deferred=SETUPS[name].deferred)
    monkeypatch.setitem(SETUPS, name, small)
    monkeypatch.setattr(command, "ORDER", ((name, "primary"),))
    monkeypatch.setattr(command.LateAscent, "_choose", lambda self, deadline: {})
    monkeypatch.setattr(command.LateAscent, "_report", lambda self: None)
    monkeypatch.setattr(
        command, "in_processes", lambda task, items, jobs: [task(*item) for item in items]
    )
    command.LateAscent(setups=(name,), cache=tmp_path / "runs").run()
    for number in (*TUNING_SEEDS, 0):
        found = Unit(name, method, number).records()
        for arm in itertools.chain(*own.values()):
            wanted = json.loads(json.dumps(dict(arm.settings)))
            assert {key: found[arm.name]["settings"][key] for key in wanted} == wanted
            assert ("test" in found[arm.name]) == (number == 0)


def test_records_of_tuning_seeds_do_not_know_the_test_set(tiny: Setup, tmp_path: Path) -> None:
    unit = Unit(tiny.name, "ce-drw", TUNING_SEEDS[0])
    unit.train([Arm("base", branched=False)], {"lr": 0.1, "weight_decay": 5e-4}, tmp_path / "runs")
    (record,) = unit.records().values()
    assert "test" not in record
    assert record["validation"]["by tau"]


@pytest.mark.slow
def test_curvature_of_the_switch_and_both_ends(tiny: Setup, tmp_path: Path) -> None:
    unit, values = Unit(tiny.name, "ldam-drw", 0), {"lr": 0.1, "weight_decay": 5e-4}
    sam = late_sam(0.1, 0.05)
    unit.train([Arm("base", branched=False), sam], values, tmp_path / "runs")
    curvature.measure_curvature(tiny, unit, {"sam": sam}, tmp_path / "runs")
    found = json.loads(curvature.spectra_path(unit).read_text())
    assert list(found) == ["switch", "sam", "initialization"]
    for place in ("switch", "sam"):
        assert [len(found[place][group]) for group in ("head", "tail")] == [3, 3]
        for entry in found[place]["tail"].values():
            assert entry["lambda_min"] < entry["lambda_max"]
            assert entry["gradient_norm"] > 0
    assert found["switch"]["tail"] != found["sam"]["tail"]
    assert set(found["initialization"]) == {*found["sam"]["head"], *found["sam"]["tail"]}


def test_a_class_below_the_resolution_of_float32_is_measured_in_float64() -> None:
    network = nn.Linear(3, 2)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[8.0, 0.0, 0.0], [-8.0, 0.0, 0.0]]))
        network.bias.zero_()
    inputs = torch.tensor([[1.0, 0.3, -0.2], [1.02, -0.7, 0.4], [0.99, 0.1, 0.9]])
    targets = torch.zeros(3, dtype=torch.int64)
    exact = torch.autograd.functional.hessian(
        lambda weight: nn.functional.cross_entropy(inputs.double() @ weight.T, targets),
        network.weight.detach().double(),
    )
    found = curvature._spectrum(network, inputs, targets)
    assert found["precision"] == "float64"
    assert found["loss"] < 1e-6
    # The bias shares the curvature of the first input, which is about 1.
    top = float(torch.linalg.eigvalsh(exact.reshape(6, 6))[-1])
    assert top < found["lambda_max"] < 2 * top


def test_branches_of_other_weights_are_dropped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(records, "FOLDER", tmp_path)
    parents = iter(["one", "one", "two"])

    def trained(
        setup: Setup, method: str, arm: Arm, *rest: object, tested: bool
    ) -> dict[str, object]:
        return {"settings": {}, "parent": next(parents) if arm.branched else None}

    monkeypatch.setattr(records, "train_arm", trained)
    unit, base = Unit("digits", "ce-drw", 0), Arm("base", branched=False)
    trials = [base, late_sgd(0.1, 1), late_sgd(0.3, 1), late_sam(0.1, 0.1)]
    unit.train(trials, {}, tmp_path / "runs")
    assert list(unit.records()) == ["base", "sam late lr 0.1 rho 0.1"]


def fake(level: float, generator: np.random.Generator, parent: str | None) -> dict[str, object]:
    """Return a record with balanced accuracies around ``level``."""
    scores = {name: float(level + generator.normal(0, 0.1)) for name in SCORES}
    return {
        "parent": parent,
        "gradients": 10.0,
        "clean training": {"accuracy": 100.0, "nll": 0.0},
        "validation": {"by tau": [level, level + 1], "by tau, few": [level]},
        "test": {"raw": scores, "tau": {"tau": 1.0, **scores}, "tau, few": scores},
    }


def measured(generator: np.random.Generator, change: float, label: str) -> dict[str, object]:
    """Return spectra of one tail class whose lambda_max SAM multiplies by ``exp(-change)`` at equal loss."""

    def entry(
        largest: float, lowest: float, gradient: float, loss: float = 0.1
    ) -> dict[str, dict[str, object]]:
        shown = {
            "lambda_max": largest,
            "lambda_min": lowest,
            "lambda_min_residual": 0.01,
            "trace": 3.0,
            "loss": loss,
            "gradient_norm": gradient,
            "weight_norm": 2.0,
        }
        head = {**shown, "lambda_max": 2 / largest, "lambda_min": 1.0}
        return {"head": {"0": head}, "tail": {label: shown}}

    level = float(np.exp(generator.normal()))
    return {
        "switch": entry(level, -0.5 * level - 0.02, 0.5, loss=0.3),
        "sgd": entry(level, -0.01 * level, 0.5),
        "sam": entry(level * math.exp(-change), -0.5 * level - 0.02, 5.0),
        "initialization": {"0": 10.0, label: 10.0},
    }


def test_curvature_answers_match_the_input(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    changes = generator.uniform(0.5, 1.5, 6)
    monkeypatch.setattr(records, "FOLDER", tmp_path)
    monkeypatch.setattr(curvature, "FOLDER", tmp_path)
    arms_by_name = {"sgd": late_sgd(0.1, 1), "sam": late_sam(0.1, 0.1)}
    monkeypatch.setattr(curvature_summary, "winners", lambda setup, method: arms_by_name)
    units = [Unit("tiny", "ce-drw", number, "second") for number in range(6)]
    assert curvature_summary.curvature_summary(units) is None
    for unit, change in zip(units, changes, strict=True):
        unit.path.parent.mkdir(parents=True, exist_ok=True)
        runs = {
            arms_by_name[name].name: {"test": {kind: {"tail": gain} for kind in ("raw", "tau")}}
            for name, gain in (("sgd", 50.0), ("sam", 50.0 + 10 * change))
        }
        unit.path.write_text(json.dumps({"runs": runs}))
        path = curvature.spectra_path(unit)
        path.write_text(json.dumps(measured(generator, change, "9")))
    found = curvature_summary.curvature_summary(units)
    assert found is not None
    tail = found["negative curvature"]["tail"]
    assert tail["switch"]["negative curvature"] == tail["switch"]["of"] == 6
    assert tail["sgd"]["negative curvature"] == 0  # |lambda_min| is too small
    assert tail["sam"]["negative curvature"] == 0  # the gradient is too large
    assert found["negative curvature"]["head"]["switch"]["lambda_min below its residual"] == 0
    changed = found["sam minus sgd"]["tail"]
    opposite = found["sam minus sgd"]["head"]["log lambda_max"]
    assert opposite["mean"] == pytest.approx(changes.mean())
    assert changed["log lambda_max"]["mean"] == pytest.approx(-changes.mean())
    assert changed["log lambda_max at equal loss"]["mean"] == pytest.approx(-changes.mean())
    assert changed["log loss"]["mean"] == 0
    # The larger the drop of lambda_max, the larger the gain: exactly so here.
    assert found["correlation with the change of tail accuracy"]["raw"]["r"] == pytest.approx(-1)


@pytest.mark.parametrize("within", [False, True])
def test_the_slope_within_a_class_ignores_differences_between_classes(
    within: bool, seed: int
) -> None:
    """Classes differ along a slope of -2, the checkpoints of a class along a slope of 0.5."""
    generator = np.random.default_rng(seed)

    def place(shift: float) -> dict[str, Any]:
        entries = {}
        for label, level in levels.items():
            loss = level + shift
            entries[label] = {
                "loss": math.exp(loss),
                "lambda_max": math.exp(-2 * level + 0.5 * shift),
            }
        return {"tail": entries}

    measured = []
    for _ in range(5):
        levels = dict(zip("789", generator.normal(size=3), strict=True))
        shifts = generator.normal(scale=0.1, size=3)
        measured.append(
            {name: place(s) for name, s in zip(("switch", "sgd", "sam"), shifts, strict=True)}
        )
    found = curvature_summary._slope(measured, "tail", within=within)
    if within:
        assert found == pytest.approx(0.5)
    else:
        points = [
            (math.log(entry["loss"]), math.log(entry["lambda_max"]))
            for one in measured
            for each in one.values()
            for entry in each["tail"].values()
        ]
        assert found == pytest.approx(np.polyfit(*zip(*points, strict=True), 1)[0])


@pytest.mark.slow
def test_the_summary_finds_the_planted_difference(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int
) -> None:
    monkeypatch.setattr(records, "FOLDER", tmp_path)
    generator = np.random.default_rng(seed)
    best = {"sgd late lr 0.1 wd 1": 70.0, "sam late lr 0.1 rho 0.1": 72.5}

    def write(unit: Unit, arms: Iterable[Arm]) -> None:
        runs = {
            arm.name: fake(best.get(arm.name, 60.0), generator, "w" if arm.branched else None)
            for arm in arms
        }
        unit.path.parent.mkdir(parents=True, exist_ok=True)
        unit.path.write_text(json.dumps({"runs": runs}))

    for method, tuned in itertools.product(METHODS, TUNING_SEEDS):
        write(Unit("fashion-600", method, tuned, "bases"), map(choice.base_arm, BASES))
        write(Unit("fashion-600", method, tuned), [*SGD_TRIALS, *SAM_TRIALS])
    for method, number in itertools.product(METHODS, range(10)):
        trained: dict[Stage, list[Arm]] = {"late": [], "second": []}
        for tier in get_args(arms.Tier):
            stage = arms.stage_of("fashion-600", tier)
            trained[stage] += arms.arms_of("fashion-600", method, tier)
        for stage, these in trained.items():
            write(Unit("fashion-600", method, number, stage), these)
    monkeypatch.setattr(summary, "curvature_summary", lambda units: {"of": units[0].stage})
    found = summary.summary()
    names = [f"fashion-600 {method}" for method in METHODS]
    assert list(found["setups"]) == [x for name in names for x in (name, f"{name}, second run")]
    second = found["setups"]["fashion-600 ce-drw, second run"]
    assert second["primary"]["p, corrected"] == second["primary"]["p"]
    assert second["primary"]["mean"] == pytest.approx(2.5, abs=0.3)
    assert "sgd late lr 0.1 wd 1, other order" in second["arms"]
    table = found["setups"]["fashion-600 ce-drw"]
    assert table["chosen"] == {"sgd": "sgd late lr 0.1 wd 1", "sam": "sam late lr 0.1 rho 0.1"}
    assert table["primary"]["mean"] == pytest.approx(2.5, abs=0.3)
    assert table["primary"]["verdict"] == "better"
    primaries = [found["setups"][f"fashion-600 {method}"]["primary"] for method in METHODS]
    smaller, larger = sorted(primaries, key=lambda primary: primary["p"])
    assert smaller["p, corrected"] == 2 * smaller["p"]
    assert larger["p, corrected"] == max(larger["p"], smaller["p, corrected"])
    assert table["arms"]["sam rho 0.6"]["raw"]["tail"][0] == pytest.approx(60, abs=0.2)
    equal = table["at equal rate"]
    assert (equal["sgd"], equal["sam"]) == ("sgd late lr 0.1 wd 1", "sam late lr 0.1 rho 0.1")
    assert equal["tau"]["balanced"]["mean"] == table["primary"]["mean"]
    again = table["reported seeds"]
    assert again["candidates"] == {"sgd": 2, "sam": 1}
    assert (again["sgd"], again["sam"]) == ("sgd late lr 0.1 wd 1", "sam late lr 0.1 rho 0.1")
    assert again["mean"] == table["primary"]["mean"]
    gap = table["minus the chosen SGD"]["raw"]["sam rho 0.6"]["tail"]
    assert gap["mean"] == pytest.approx(-10.0, abs=0.3)
    assert table["curvature"] is None
    assert second["curvature"] == {"of": "second"}
    for each in found["setups"].values():
        each["curvature"] = None
    tuning = found["tuning"]["ce-drw"]["late"]["100 images"]
    assert max(tuning, key=tuning.__getitem__) == "sam late lr 0.1 rho 0.1"

    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps(found))
    sections = tables.tables()
    assert "| sam late lr 0.1 rho 0.1 | **73.50** | **72.50** |" in sections["late-ascent-tuning"]
    assert "**better**" in sections["late-ascent-answers"]
    arms_shown = sections["late-ascent-arms"]
    assert arms_shown.count("| sam rho 0.6 |") == 2
    panel = tables.comparison().panels[0]
    gap = panel.difference("chosen SAM", panel.arms[0].name, "calibrated", "balanced")
    assert gap.mean == pytest.approx(table["primary"]["mean"])
