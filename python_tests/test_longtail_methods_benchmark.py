"""The plan, the records and the summary of the comparison of long-tail methods."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.late_ascent.plan import Setup
from benchmarks.longtail_methods import runs, summary, tables
from benchmarks.longtail_methods.plan import BASELINE, GROUPS, Group, arms_of, ways
from benchmarks.longtail_methods.runs import Unit
from benchmarks.seed_runs import SeedRuns
from benchmarks.seed_scores import SCORES

SEEDS = 5
BETTER, WORSE = "crt sgd", "mislas sam"


def planted(generator: np.random.Generator, seed: int, name: str) -> dict[str, Any]:
    """Return a record whose accuracy depends on the seed far more than on the method."""
    level = 40 + 10 * seed + {BETTER: 3.0, WORSE: -4.0}.get(name, 0.0) + generator.normal(0, 0.1)
    raw = dict.fromkeys(SCORES, level)
    return {
        "parent": None,
        "gradients": 120.0,
        "test": {"raw": raw, "tau": {"tau": 1.0, **dict.fromkeys(SCORES, level + 2)}},
    }


def write(folder: Path, seed: int, groups: list[Group], seed_of_noise: int) -> None:
    generator = np.random.default_rng([seed_of_noise, seed])
    for group in groups:
        path = folder / group.name / f"seed-{seed}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        found = {arm.name: planted(generator, seed, arm.name) for arm in arms_of(group)}
        path.write_text(json.dumps({"runs": found}))


def test_the_summary_finds_the_planted_differences(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int
) -> None:
    monkeypatch.setattr(runs, "FOLDER", tmp_path)
    assert set(tables.tables().values()) == {"In progress.\n"}
    for number in range(SEEDS):
        write(tmp_path, number, list(GROUPS.values()), seed)
    write(tmp_path, SEEDS, list(GROUPS.values())[:1], seed)  # a seed that is not finished
    found = summary.summary()
    assert found is not None
    assert found.seeds == list(range(SEEDS))
    assert list(found.arms) == [f"{way} {name}" for way in ways() for name in ("sgd", "sam")]
    for name, gap, verdict in ((BETTER, 3.0, "better"), (WORSE, -4.0, "worse")):
        for kind in summary.KINDS:
            difference = found.arms[name].gap[kind]
            assert difference.mean == pytest.approx(gap, abs=0.2)
            assert difference.verdict() == verdict
    assert found.arms["lws sgd"].gap["raw"].verdict() == "no difference"
    assert found.arms["crt sam"].sam_gap["raw"]["tail"].mean == pytest.approx(-3, abs=0.2)
    assert found.arms["crt sam"].sam_gap["tau"]["balanced"].verdict() == "worse"
    assert not found.arms[BASELINE].gap
    assert not found.arms[BETTER].sam_gap
    assert found.arms[BASELINE].scores["raw"]["balanced"] == pytest.approx(
        [60, 10 * np.sqrt(2.5)], abs=0.5
    )

    sections = tables.tables()
    (line,) = (x for x in sections["longtail-methods-answers"].splitlines() if "| crt | sgd" in x)
    assert line.count("| better |") == 2
    (line,) = (x for x in sections["longtail-methods-sam"].splitlines() if "| mislas " in x)
    assert line.count("| worse |") == 2
    arms = sections["longtail-methods-arms"]
    assert arms.startswith("| method, 5 seeds |")
    assert arms.count("\n") == 2 + len(found.arms)


def test_origins_are_trained_before_what_continues_from_them() -> None:
    names = [arm.name for group in GROUPS.values() for arm in arms_of(group)]
    assert len(names) == len(set(names)) == 2 * len(ways()) == 20
    for group in GROUPS.values():
        done: set[str | None] = {None}
        for arm in arms_of(group):
            assert arm.origin in done
            done.add(arm.name)


def test_a_missing_origin_is_trained_again(tmp_path: Path) -> None:
    arms = arms_of(GROUPS["mixup"])
    file, trained = SeedRuns(tmp_path / "seed-0.json"), []

    def train(arm: Any) -> dict[str, Any]:
        trained.append(arm.name)
        parent = None if arm.origin is None else "w"
        return {"settings": {}, "parent": parent, "origin": arm.origin}

    file.train(arms, train, lambda arm: False)
    assert trained == list(file.records()) == [arm.name for arm in arms]
    stored = file.records()
    del stored["mislas sam"]
    file.path.write_text(json.dumps({"runs": stored}))
    trained.clear()
    file.train(arms, train, lambda arm: arm.name == "mixup sgd")
    assert trained == ["mixup sam", "mislas sam"]
    trained.clear()
    file.train(arms, train, lambda arm: False)
    assert not trained
    file.train(arms, train, lambda arm: arm.name != "mislas sam", networks=True)
    assert trained == ["mislas sam"]


@pytest.mark.slow
def test_a_short_comparison_from_end_to_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = (("threads", 1), ("validate_every", 1000))
    tiny = Setup("tiny", "digits-lt", settings, epochs=5, defer=4, seeds=1, ordered=False)
    monkeypatch.setattr(runs, "SETUP", tiny)
    monkeypatch.setattr(runs, "FOLDER", tmp_path / "records")
    # By default, the first and last epochs of CMO are not mixed.
    short = (("mixer", "cmo"), ("cmo_skip_first", 0), ("cmo_skip_last", 0))
    monkeypatch.setitem(GROUPS, "cmo", Group("cmo", settings=short))
    for group in GROUPS.values():
        unit = Unit(group, 0)
        assert unit.is_missing()
        unit.train(tmp_path / "runs")
        assert not unit.is_missing()
    found = summary.summary()
    assert found is not None
    arms = found.arms
    records = {
        name: record for g in GROUPS.values() for name, record in Unit(g, 0).runs.records().items()
    }
    steps = arms[BASELINE].gradients / tiny.epochs
    assert arms["ce sam"].gradients == (tiny.epochs + 1) * steps
    assert arms["crt sgd"].gradients == (tiny.epochs + 10) * steps
    assert arms["lws sam"].gradients == (tiny.epochs + 1 + 5) * steps
    assert arms["tau-norm sgd"].gradients == arms[BASELINE].gradients
    assert records["crt sgd"]["parent"] == records["tau-norm sgd"]["parent"]
    assert records["crt sgd"]["parent"] != records["crt sam"]["parent"]
    assert records["ce sam"]["origin"] == "ce sgd, epoch 4"
    # Logit adjustment as an arm of its own is the baseline after tau.
    adjusted, after = (
        records["logit-adjustment sgd"]["test"]["raw"],
        records[BASELINE]["test"]["tau"],
    )
    assert adjusted["balanced"] == after["balanced"]
    before = Unit(GROUPS["ce"], 0).runs.path.read_bytes()
    Unit(GROUPS["ce"], 0).train(tmp_path / "runs")
    assert Unit(GROUPS["ce"], 0).runs.path.read_bytes() == before
