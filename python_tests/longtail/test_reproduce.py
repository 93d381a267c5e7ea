"""Tables and figures of the paper: the numbers are consistent, and all of them can be run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastsam.cli import main
from fastsam.longtail import Checkpoint
from fastsam.longtail.data import DATASETS
from fastsam.longtail.errors import CheckpointError, UsageError
from fastsam.longtail.landscape import ClassSpectrum
from fastsam.longtail.measured import Measured
from fastsam.longtail.published import (
    ACCURACIES,
    EXTREMES,
    FIGURES,
    TABLES,
    Variant,
    combinations,
)
from fastsam.longtail.recipes import recipe
from fastsam.longtail.reproduce import reproduce_figure, reproduce_table, summarize
from fastsam.longtail.results import Result
from fastsam.longtail.settings import Entry
from python_tests.report.made_runs import result

SIZES = {
    "cifar10-lt": (3, 4, 3),
    "cifar100-lt": (36, 35, 29),
    "imagenet-lt": (390, 445, 165),
    "inaturalist18": (842, 3701, 3599),
}
TINY = {"epochs": 2, "batch_size": 138}


@pytest.mark.parametrize("key", ACCURACIES, ids=" ".join)
def test_published_groups_add_up_to_the_overall_accuracy(key: tuple[str, str]) -> None:
    """Test sets are balanced, so the overall accuracy is the mean weighted by classes."""
    row = {name: value for name, (value, _) in ACCURACIES[key].items()}
    if set(row) != {"all", "head", "mid", "tail"}:
        assert row  # some of it is not known
        return
    sizes = SIZES[key[0]]
    mean = sum(n * row[g] for n, g in zip(sizes, ("head", "mid", "tail"), strict=True)) / sum(sizes)
    assert row["all"] == pytest.approx(mean, abs=0.11)


def test_published_numbers_belong_to_a_row_or_a_panel() -> None:
    rows = {(data, row.name) for t in TABLES.values() for data in t.data for row in t.rows}
    assert set(ACCURACIES) <= rows
    panels = {(n, r.name, c) for n, f in FIGURES.items() for r in f.runs for c in f.classes}
    assert set(EXTREMES) <= panels
    assert all(low < 0 < high for low, high in EXTREMES.values())


def test_a_group_that_the_data_does_not_have_is_unknown_over_several_seeds() -> None:
    """The made results have head and tail classes only."""
    found = summarize([result("sgd", 80.0), result("sgd", 82.0)])
    assert found["all"] == pytest.approx((81.0, 2**0.5))
    assert {name: str(number) for name, number in found.items()} == {
        "all": "81.0 +- 1.4",
        "head": "81.0 +- 1.4",
        "mid": "",
        "tail": "40.5 +- 0.7",
    }


def test_every_combination_of_the_paper_has_a_recipe() -> None:
    assert {"table1", "table2", "table3", "table4", "table5"} <= set(TABLES)
    assert {"figure1", "figure2", "figure3", "figure5", "figure6", "figure7"} <= set(FIGURES)
    assert len(combinations()) == 38
    for table in TABLES.values():
        for data in table.data:
            for row in table.rows:
                recipe(data, row.method, row.optimizer, **row.settings).config()


def test_names_of_variants() -> None:
    assert Variant("ce", "sgd").name == "ce-sgd"
    assert Variant("ce", "sam", {"rho": (0.1, 0.5), "imbalance": 50.0, "kind": "step"}).name == (
        "ce-sam-rho-0.1-0.5-imbalance-50-kind-step"
    )


def test_only_an_unchanged_recipe_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = {"all": (75.5, 0.2)}
    monkeypatch.setitem(ACCURACIES, ("digits-lt", "ce-drw-sgd"), number)
    shortest = {"epochs": 1, "lr_milestones": (1, 1), "warmup_epochs": 0, "defer_epoch": 0}
    for name, value in shortest.items():
        monkeypatch.setitem(DATASETS["digits-lt"].recipe, name, Entry(value, "test"))
    rows = [
        next(
            reproduce_table(
                "table4", "digits-lt", tmp_path / folder, seeds=1, progress=False, **given
            )
        )
        for folder, given in (("same", {"threads": 1}), ("other", {"lr": 0.05}))
    ]
    assert [row.published for row in rows] == [number, {}]


def test_published_numbers_stand_below_their_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {"all": Measured(75.5, 0.2), "tail": Measured(60.0)}
    monkeypatch.setitem(ACCURACIES, ("digits-lt", "ce-drw-sgd"), known)
    shortest = {"epochs": 1, "lr_milestones": (1, 1), "warmup_epochs": 0, "defer_epoch": 0}
    for name, value in shortest.items():
        monkeypatch.setitem(DATASETS["digits-lt"].recipe, name, Entry(value, "test"))
    options = ["--data", "digits-lt", "--seeds", "1", "--quiet", "--out", str(tmp_path)]
    assert main(["reproduce", "table4", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(n for n, line in enumerate(lines) if line.startswith("ce-drw-sgd"))
    assert lines[row + 1].split() == ["published", "75.5", "+-", "0.2", "-", "-", "60.0"]
    assert len(lines[row]) == len(lines[row + 1])
    assert not lines[row + 2].strip().startswith("published")


@pytest.mark.slow
def test_a_figure_along_training_loads_existing_spectra(tmp_path: Path) -> None:
    def run() -> list[ClassSpectrum]:
        panels = reproduce_figure("figure3", "digits-lt", tmp_path, steps=2, progress=False, **TINY)
        return [panel.item for panel in panels]

    first = run()
    epochs = [item.subject.epoch for item in first]
    assert epochs == [1] * 5 + [2] * 5 + [1] * 5 + [2] * 5
    assert [item.subject.label for item in first[:5]] == [0, 2, 5, 7, 8]
    assert first[0].spectrum.lambda_max != first[5].spectrum.lambda_max
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    again = run()
    assert [a.spectrum.lambda_max for a in again] == [f.spectrum.lambda_max for f in first]
    assert {path: path.stat().st_mtime_ns for path in files} == files


@pytest.mark.slow
def test_runs_of_another_device_are_shared(tmp_path: Path) -> None:
    def run(**settings: Any) -> list[float]:
        panels = reproduce_figure(
            "figure2", "digits-lt", tmp_path, steps=2, progress=False, **{**TINY, **settings}
        )
        return [panel.item.spectrum.lambda_max for panel in panels]

    first = run()
    weights = {path: path.stat().st_size for path in tmp_path.rglob("*.pt")}
    for path in weights:
        checkpoint = Checkpoint.load(path)
        replace(checkpoint, config=replace(checkpoint.config, device="cuda")).save(path)
    for path in tmp_path.rglob("result.json"):
        result = Result.load(path)
        path.write_text(replace(result, config={**result.config, "device": "cuda"}).to_json())
    written = {path: path.stat().st_mtime_ns for path in weights}
    for path in tmp_path.rglob("class-*.json"):
        path.unlink()
    assert run(threads=1) == first
    assert {path: path.stat().st_mtime_ns for path in weights} == written
    with pytest.raises(CheckpointError, match=r"other settings: lr was "):
        run(lr=0.01)


def test_a_figure_needs_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    tiny = ["--epochs", "1", "--batch-size", "138", "--steps", "2", "--quiet"]
    command = [
        "reproduce",
        "figure2",
        "--data",
        "digits-lt",
        *tiny,
        "--out",
        str(tmp_path / "runs"),
    ]
    assert main(command) != 0
    assert "figure2 requires a single process, but torchrun started 2" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_all_classes_together_have_the_weighted_mean_of_the_hessians(tmp_path: Path) -> None:
    items = [
        panel.item
        for panel in reproduce_figure(
            "figure2", "digits-lt", tmp_path, steps=2, progress=False, **TINY
        )
    ]
    assert [item.subject.label for item in items[:3]] == [None, 0, 8]
    assert items[0].subject.images == 276
    assert "all classes (276 train images)" in items[0].subject.title


def test_compared_settings_cannot_be_overridden(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot override kind"):
        next(reproduce_table("table2", "digits-lt", tmp_path, kind="exp"))
    with pytest.raises(UsageError, match="rho requires optimizer asam, looksam, sam"):
        next(reproduce_table("table1", "digits-lt", tmp_path, rho=(0.1,)))
    for wrong in ({"steps": 0}, {"probes": 0}, {"augment": "some"}, {"augment": "99999"}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            next(reproduce_figure("figure2", "digits-lt", tmp_path, **wrong))
    with pytest.raises(UsageError, match="seeds"):
        next(reproduce_table("table1", "digits-lt", tmp_path, seeds=10**9))
    for started in (
        reproduce_table("table1", "digits-lt", tmp_path, seed=3),
        reproduce_figure("figure2", "digits-lt", tmp_path, seed=3),
    ):
        with pytest.raises(UsageError, match=r"sets seed itself; .*pass the number of seeds"):
            next(started)
    with pytest.raises(UsageError, match="unknown figure"):
        next(reproduce_figure("table1", "digits-lt", tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["figure3c", "figure7"])
@pytest.mark.slow
def test_figures_are_drawn(name: str, tmp_path: Path) -> None:
    tiny = ["--epochs", "1", "--batch-size", "138", "--steps", "2", "--quiet"]
    command = ["reproduce", name, "--data", "digits-lt", *tiny, "--out", str(tmp_path)]
    assert main(command) == 0
    assert (tmp_path / f"{name}.svg").read_text().startswith("<svg")
