"""Tables, figures and the page, from made results."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastsam.curvature import MatrixOperator, operator_spectrum
from fastsam.longtail import Result, recipe
from fastsam.longtail.errors import DataError
from fastsam.longtail.landscape import ClassSpectrum, Subject
from fastsam.longtail.metrics import Metrics
from fastsam.longtail.results import Epoch
from fastsam.report import (
    Arm,
    PairedComparison,
    PairedPanel,
    Runs,
    render,
    spectrum_table,
    write_report,
)
from fastsam.report.figures import (
    accuracy_bars,
    comparison_svg,
    curves,
    spectra_panels,
    training_curves,
)
from fastsam.report.tables import TextTable, accuracy_table, settings_table
from fastsam.report.timing import StepTiming, time_sam_step


def result(optimizer: str, accuracy: float) -> Result:
    chosen = recipe("digits-lt", "ce", optimizer)
    groups = {"head": accuracy, "tail": accuracy / 2}
    metrics = Metrics(accuracy, accuracy, groups, groups, [accuracy] * 2, [[1, 0], [0, 1]], 3.25)
    return Result(
        config=chosen.config().as_dict(),
        sources=chosen.sources,
        counts=[100, 2],
        class_names=["<zero>", "one"],
        groups={"head": [0], "tail": [1]},
        subset_hash="abc",
        rule="last epoch",
        test=metrics,
        validation=None,
        history=[Epoch(1, 0.1, None, 2.0, 50.0, None, 0.1)],
        seconds=1.5,
        unreadable={},
        environment={"torch": "x & y"},
    )


def spectrum(augment: str = "none") -> ClassSpectrum:
    matrix = torch.diag(torch.tensor([-2.0, 0.0, 1.0, 8.0], dtype=torch.float64))
    found = operator_spectrum(MatrixOperator(matrix), steps=4, progress=False)
    found = replace(found, loss=0.5, gradient_norm=0.25, weight_norm=7.0)
    return ClassSpectrum(Subject("ce sam", 4, 1, "<one>", "tail", 2, "train", "ce", augment), found)


def named_comparison(name: str) -> PairedComparison:
    """Two arms over two seeds, the first of them called ``name``, on data of that name."""
    scores = {score: [70.0, 72.0] for score in ("accuracy", "balanced", "head", "mid", "tail")}
    arms = [Arm(name, 10.0, scores, scores), Arm("other", 12.0, scores, scores)]
    return PairedComparison(2, [PairedPanel(name, arms, [])])


def test_table_is_aligned() -> None:
    assert str(TextTable(("a", "bb"), (("ccc", "d"),))) == "a    bb\nccc   d"


def test_tables_hold_the_numbers() -> None:
    results = [result("sgd", 80.0), result("sam", 90.0)]
    table = accuracy_table(results)
    assert table.header == (
        "test accuracy, %",
        "all",
        "head",
        "tail",
        "ECE",
        "gradients",
        "seconds",
    )
    assert table.rows[1] == ("ce sam", "90.0", "90.0", "45.0", "3.2", "", "1.5")
    counted = [replace(r, history=[replace(e, gradients=4.0) for e in r.history]) for r in results]
    assert accuracy_table(counted).rows[1][5] == f"{4 * len(results[1].history)}"
    assert accuracy_table([counted[0], results[1]]).rows[1][5] == ""
    rows = {row[0]: row[1:] for row in settings_table(results).rows}
    assert rows["rho"][:2] == ("", "0.05")
    assert rows["lr_milestones"][0] == "80 90"
    assert "tau" not in rows
    (row,) = spectrum_table([spectrum()]).rows
    assert row[1].startswith("8 +-")
    assert row[2].startswith("-2 +-")
    assert row[3].startswith("0.2500 [0.2500")
    assert row[4:] == ("0.5", "0.25", "7")


def test_seeds_share_a_row_and_other_settings_are_named() -> None:
    def run(accuracy: float, **settings: object) -> Result:
        made = result("sam", accuracy)
        return replace(made, config={**made.config, **settings})

    runs = [
        run(80.0, seed=0, subset_seed=0),
        run(84.0, seed=1, subset_seed=1),
        run(84.0, seed=1, subset_seed=1),  # the same run, found twice
        run(70.0, rho=[0.5]),
        result("sgd", 60.0),
    ]
    rows = accuracy_table(runs).rows
    assert [row[0] for row in rows] == ["ce sam, rho 0.05, 2 seeds", "ce sam, rho 0.5", "ce sgd"]
    assert [row[1] for row in rows] == ["82.0 +- 2.8", "70.0", "60.0"]
    ElementTree.fromstring(accuracy_bars(runs))


def test_another_place_or_an_older_record_is_not_another_setting() -> None:
    here = result("sam", 80.0)
    there = replace(here, config={**here.config, "device": "cuda", "seed": 1, "workers": 8})
    assert [row[0] for row in accuracy_table([here, there]).rows] == ["ce sam, 2 seeds"]
    older = replace(here, config={k: v for k, v in here.config.items() if k != "channels_last"})
    assert [row[0] for row in accuracy_table([older, here]).rows] == ["ce sam"]
    ordered = replace(here, config={**here.config, "channels_last": True})
    names = [row[0] for row in accuracy_table([older, here, ordered]).rows]
    assert names == ["ce sam", "ce sam, channels_last True"]


def test_page_names_every_data_set() -> None:
    one, other = result("sgd", 80.0), result("sam", 70.0)
    other = replace(other, config={**other.config, "imbalance": 7.5}, counts=[30, 4])
    shaped = replace(one, config={**one.config, "kind": "step"}, counts=[100, 20])
    page = render(Runs([one, one, other, shaped]))
    assert "<h1>fastsam: digits-lt, imbalance 50; digits-lt, imbalance 7.5</h1>" in page
    assert page.count("imbalance 50: 102 training images in 2 classes") == 1
    assert page.count("imbalance 50: 120 training images in 2 classes") == 1
    assert "imbalance 7.5: 34 training images in 2 classes, 30 in the largest and 4" in page


def test_seeds_with_other_counts_share_a_line() -> None:
    one = result("sgd", 80.0)
    other = replace(one, config={**one.config, "seed": 1}, counts=[90, 12])
    noisy = replace(one, config={**one.config, "label_noise": 0.4})
    page = render(Runs([one, other, noisy]))
    assert "102 training images in 2 classes, 90 to 100 in the largest and 2 to 12 in the" in page
    assert "imbalance 50, 40 % wrong labels: 102 training images" in page


def test_ratio_bounds_follow_the_residuals() -> None:
    item = spectrum()
    low, high = item.ratio_bounds
    assert low <= 0.25 <= high
    assert high - low < 1e-9
    loose = operator_spectrum(
        MatrixOperator(torch.diag(torch.linspace(-2, 8, 40, dtype=torch.float64))),
        steps=5,
        progress=False,
    )
    wide = ClassSpectrum(item.subject, loose)
    low, high = wide.ratio_bounds
    exact = (2 - loose.lambda_min_residual, 2 + loose.lambda_min_residual)
    assert loose.lambda_min_residual > 1e-3
    assert low < abs(loose.lambda_min) / loose.lambda_max < high
    assert exact[0] / 9 < high
    assert math.isfinite(high)


@pytest.mark.parametrize("draw", [accuracy_bars, training_curves])
def test_a_long_legend_leaves_the_axes_their_size(draw: Callable[[list[Result]], str]) -> None:
    def axes_height(results: list[Result]) -> float:
        """Height in points of the background of the first axes."""
        svg = draw(results)
        (path,) = re.findall(r'<g id="patch_2">\s*<path d="([^"]+)"', svg)
        heights = [float(y) for y in re.findall(r"[ML] [-\d.]+ ([-\d.]+)", path)]
        return max(heights) - min(heights)

    plain = result("sam", 80.0)
    many = [
        replace(
            plain, config={**plain.config, "lr": lr, "lr_milestones": [9 * n for n in range(9)]}
        )
        for lr in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    ]
    assert axes_height([plain, *many]) > 0.95 * axes_height([plain])


def test_figures_are_well_formed_and_repeatable() -> None:
    results = [result("sgd", 80.0), result("sam", 90.0)]
    for draw in (
        lambda: accuracy_bars(results),
        lambda: spectra_panels([spectrum(), spectrum("redrawn"), spectrum("3")]),
    ):
        svg = draw()
        ElementTree.fromstring(svg)
        assert svg == draw()


Draw = Callable[[list[Result], ClassSpectrum, str], str | bytes]
FIGURES: dict[str, Draw] = {
    "accuracy bars": lambda runs, item, name: accuracy_bars(runs),
    "training curves": lambda runs, item, name: training_curves(runs),
    "spectra": lambda runs, item, name: spectra_panels([item]),
    "curves": lambda runs, item, name: curves({name: [(0, 1), (1, 2)]}, x="x", y="y", title="a"),
    "titles": lambda runs, item, name: curves({"a": [(0, 1)]}, x=name, y=name, title=name),
    "comparison": lambda runs, item, name: comparison_svg(named_comparison(name)),
}


@pytest.mark.parametrize("name", [r"$\frac$", "$x$", "a$b", r"\$y$", "$"])
@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_names_in_figures_are_no_mathematics(draw: Draw, name: str) -> None:
    """Matplotlib takes text between dollar signs for formulas, and fails on one that it cannot parse."""
    import matplotlib as mpl

    run = result("sam", 90.0)
    run = replace(run, test=replace(run.test, groups={name: 50.0}))
    named = replace(run, config={**run.config, "data": name})
    item = spectrum()
    item = ClassSpectrum(replace(item.subject, run=name, name=name, group=name), item.spectrum)
    with mpl.rc_context({"svg.fonttype": "none"}):  # text as text
        figure = draw([named, run], item, name)
    if isinstance(figure, str):
        assert name in "".join(ElementTree.fromstring(figure).itertext())


def test_page_is_self_contained_and_escapes() -> None:
    timing = StepTiming([10.0, 11.0], [40.0, 55.0], 3, 100, 1e-8, 1, "cpu")
    page = render(Runs([result("sgd", 80.0)], [spectrum(), spectrum("redrawn")], timing=timing))
    assert "<one>" not in page
    assert "x &amp; y" in page
    assert "A mistake, on purpose" in page
    assert "4.5 times faster (rounds: 4.0 to 5.0)" in page
    assert "src=" not in page
    assert "<link" not in page
    plain = render(Runs([result("sgd", 80.0)]))
    assert "mistake, on purpose" not in plain
    assert "times faster" not in plain


def test_every_text_of_a_page_is_escaped() -> None:
    evil = "<evil>&'\""
    made = result("sgd", 80.0)
    made = replace(
        made,
        config={**made.config, "data": evil, "model": evil},
        sources={"lr": evil},
        rule=evil,
        environment={evil: evil},
        subset_hash=evil,
    )
    shown = spectrum()
    shown = replace(shown, subject=replace(shown.subject, run=evil))
    timing = StepTiming([10.0], [40.0], 3, 100, 1e-8, 1, evil)
    page = render(Runs([made], [shown], named_comparison(evil), timing))
    assert "<evil" not in page
    # First sentence, rule, data, model, source, spectrum, timing, environment twice, hash; of the
    # comparison its title twice, the arm twice in the table and in two verdicts.
    assert page.count("&lt;evil&gt;&amp;&#39;&#34;") == 10 + 2 + 2 + 2


def test_report_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=r"no result\.json"):
        write_report(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "result.json").write_text(result("sam", 70.0).to_json())
    spectrum().save(tmp_path / "a" / "spectra")
    page = write_report(tmp_path)
    assert "ce sam" in page.read_text()
    assert capsys.readouterr().err == ""
    before = page.read_bytes()
    foreign = {
        "b/result.json": b"[1]",
        "c/result.json": b"\xff\xfe",
        "d/result.json": result("sgd", 70.0).to_json().replace("70.0", "71.0").encode(),
        "e/result.json": b"[" * 100_000,
        "a/spectra/class-9-x.json": b"{}",
        "class-1.json": b'{"fastsam_spectrum": 1, "settings": {"subject": 3}}',
        "timing.json": b'{"fused": "fast"}',
    }
    for name, content in foreign.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert write_report(tmp_path).read_bytes() == before
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(foreign)
    for name in foreign:
        assert sum(str(tmp_path / name) in line for line in lines) == 1, name


def test_class_spectrum_round_trip(tmp_path: Path) -> None:
    saved = spectrum()
    loaded = ClassSpectrum.load(saved.save(tmp_path))
    assert loaded.subject == saved.subject
    assert loaded.spectrum.lambda_max == saved.spectrum.lambda_max


def test_timing_measures_equal_optimizers_and_leaves_the_model(tmp_path: Path) -> None:
    model = torch.nn.Linear(5, 3)
    before = [p.detach().clone() for p in model.parameters()]
    inputs, targets = torch.randn(9, 5), torch.arange(9) % 3
    timing = time_sam_step(
        model,
        lambda m: torch.nn.functional.cross_entropy(m(inputs), targets),
        rounds=2,
        steps=2,
    )
    assert timing.difference < 1e-5
    assert len(timing.fused) == len(timing.plain) == 2
    assert min(timing.fused + timing.plain) > 0
    assert (timing.tensors, timing.parameters) == (2, 18)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    timing.save(tmp_path)
    assert StepTiming.load(tmp_path / StepTiming.FILE) == timing
    (tmp_path / StepTiming.FILE).write_text("[]")
    with pytest.raises(DataError):
        StepTiming.load(tmp_path / StepTiming.FILE)
