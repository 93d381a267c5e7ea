"""Results of a Spectrum: estimates with errors, densities, files, merges, comparisons."""

from __future__ import annotations

import io
import json
import math
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from fastsam.curvature import (
    CallableOperator,
    Spectrum,
    compare,
    merge,
    operator_spectrum,
)
from fastsam.curvature.plots import plot_density, plot_spectra


def diagonal(eigenvalues: Tensor) -> CallableOperator:
    """Return a diagonal operator, which is general because probes are rotation invariant."""
    return CallableOperator(lambda rows: rows * eigenvalues, dimension=len(eigenvalues))


def random_eigenvalues(generator: torch.Generator) -> Tensor:
    """Return random eigenvalues with a bulk and outliers, heavy tails, gaps, and both signs."""
    n = int(torch.randint(50, 400, (), generator=generator))
    bulk = torch.randn(n, generator=generator, dtype=torch.float64)
    kind = int(torch.randint(4, (), generator=generator))
    if kind == 0:
        return bulk
    if kind == 1:
        return bulk.abs().pow(2)
    if kind == 2:
        return torch.where(torch.arange(n) < n // 2, 1.0, 10.0).double() + 0.1 * bulk
    outliers = torch.zeros(n, dtype=torch.float64)
    outliers[: n // 10] = 5 * torch.rand(n // 10, generator=generator, dtype=torch.float64)
    return 0.5 * bulk + outliers


@pytest.mark.slow
@pytest.mark.parametrize("probes", [1, 8])
def test_error_bars_have_their_stated_coverage(probes):
    """200 random operators, 10 seeds each: nominal 95 % intervals."""
    generator = torch.Generator().manual_seed(0)
    covered = {"trace": 0, "frobenius": 0}
    widths: dict[str, list[float]] = {"trace": [], "frobenius": []}
    for number in range(200):
        values = random_eigenvalues(generator)
        n = len(values)
        powers = {"trace": values, "frobenius": values.square()}
        for seed in range(10):
            spectrum = operator_spectrum(
                diagonal(values), steps=8, probes=probes, seed=1000 * number + seed, progress=False
            )
            estimates = {
                "trace": (spectrum.trace, spectrum.trace_stderr),
                "frobenius": (
                    spectrum.frobenius_norm_squared,
                    spectrum.frobenius_norm_squared_stderr,
                ),
            }
            for name, (value, stderr) in estimates.items():
                moments = powers[name]
                variance = 2 * n**2 / (n + 2) * float(moments.var(correction=0)) / probes
                covered[name] += abs(value - float(moments.sum())) <= 1.96 * stderr
                widths[name].append(stderr / math.sqrt(variance))
    for name in covered:
        assert 0.90 <= covered[name] / 2000 <= 0.99, (name, covered[name] / 2000)
        assert np.median(widths[name]) <= 1.5, (name, np.median(widths[name]))


def test_density_integrates_to_one_and_keeps_everything():
    values = torch.cat([torch.linspace(-1, 1, 90), torch.tensor([30.0])]).double()
    spectrum = operator_spectrum(diagonal(values), steps=40, probes=3)
    for rule in ("scale-free", "pyhessian", "papyan", 0.37):
        grid = spectrum.grid(20001, sigma=rule)
        area = np.trapezoid(spectrum.density(grid, rule), grid)
        assert area == pytest.approx(1, abs=1e-4)
    found = spectrum.histogram([-0.5, 0.0, 2.0])
    assert found.shares.shape == (4,)
    assert found.shares.sum() == pytest.approx(1)
    assert found.shares[-1] == pytest.approx(1 / 91, abs=0.04)
    assert found.lower[-1] <= 1 / 91 <= found.upper[-1]


def test_width_rules():
    spectrum = operator_spectrum(diagonal(torch.tensor([1.0, 2.0, 5.0]).double()), steps=3)
    scaled = operator_spectrum(diagonal(100 * torch.tensor([1.0, 2.0, 5.0]).double()), steps=3)
    assert spectrum.width() == pytest.approx(4 / 200)
    assert scaled.width() == pytest.approx(100 * spectrum.width())
    assert spectrum.width("pyhessian") == pytest.approx(math.sqrt(1e-5 * 4))
    assert spectrum.width("papyan") == pytest.approx(4 / 2 / math.sqrt(8 * math.log(1.25)))
    with pytest.raises(ValueError, match="width rule"):
        spectrum.width("wide")
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="sigma"):
            spectrum.density([0.0], bad)


def test_functions_of_the_operator():
    values = torch.rand(80, dtype=torch.float64) + 0.5
    spectrum = operator_spectrum(diagonal(values), steps=25, probes=16)
    estimate = spectrum.log_determinant()
    assert abs(estimate.value - float(values.log().sum())) <= 4 * estimate.stderr
    estimate = spectrum.function(np.exp)
    assert abs(estimate.value - float(values.exp().sum())) <= 4 * estimate.stderr
    exact = spectrum.function(np.ones_like)
    assert exact.value == pytest.approx(80)
    assert exact.stderr == pytest.approx(0, abs=1e-5)
    low, high = estimate.interval(0.95)
    quantile = stats.t.ppf(0.975, estimate.degrees)
    assert 1.96 < quantile < 2.1
    assert high - low == pytest.approx(2 * quantile * estimate.stderr, rel=1e-4)
    with pytest.raises(ValueError, match="not positive definite"):
        spectrum.log_determinant(shift=-1.0)
    with pytest.raises(ValueError, match="not finite at the eigenvalue"):
        spectrum.function(lambda nodes: nodes * np.nan)


def test_mass_below_counts_eigenvalues_in_a_gap():
    values = torch.cat([-torch.rand(30) - 0.5, torch.rand(70) + 0.5]).double()
    spectrum = operator_spectrum(diagonal(values), steps=60, probes=32)
    found = spectrum.mass_below(0.0, confidence=0.999)
    assert found.lower <= 0.3 <= found.upper
    assert found.upper - found.lower < 0.1


@pytest.mark.parametrize("suffix", ["json", "npz"])
def test_saving_and_loading(tmp_path, suffix):
    spectrum = operator_spectrum(diagonal(torch.randn(20).double()), steps=6, probes=2)
    path = tmp_path / f"spectrum.{suffix}"
    spectrum.save(path)
    loaded = Spectrum.load(path)
    assert np.array_equal(loaded.alpha, spectrum.alpha)
    assert np.array_equal(loaded.order, spectrum.order)
    assert loaded.summary() == spectrum.summary()
    assert loaded.settings == spectrum.settings
    if suffix == "json":
        assert json.loads(path.read_text())["summary"]["lambda_max"] == spectrum.lambda_max


def test_bad_files(tmp_path):
    spectrum = operator_spectrum(diagonal(torch.randn(5).double()), steps=2)
    with pytest.raises(ValueError, match=r"\.json or \.npz"):
        spectrum.save(tmp_path / "spectrum.txt")
    for name, content in (("a.json", b"{}"), ("b.json", b"[1"), ("c.npz", b"PK"), ("d.npz", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="is not a spectrum"):
            Spectrum.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        Spectrum.load(tmp_path / "missing.json")


def test_merging_runs_with_other_probes_and_lengths():
    operator = diagonal(torch.randn(40).double())
    together = operator_spectrum(operator, steps=12, probes=4)
    parts = [
        operator_spectrum(operator, steps=12, probe_indices=range(2)),
        operator_spectrum(operator, steps=12, probe_indices=range(2, 4)),
    ]
    merged = merge(parts)
    assert np.allclose(merged.alpha, together.alpha)
    assert merged.trace_stderr == pytest.approx(together.trace_stderr)
    longer = operator_spectrum(operator, steps=20, seed=1)
    assert merge([*parts, longer]).probes == 5
    with pytest.raises(ValueError, match="occurs twice"):
        merge([parts[0], parts[0]])
    with pytest.raises(ValueError, match="occurs twice"):
        merge([merged, parts[0]])
    with pytest.raises(ValueError, match="dimensions"):
        merge([parts[0], operator_spectrum(diagonal(torch.ones(3).double()), steps=2)])
    with pytest.raises(ValueError, match="at least one"):
        merge([])


def test_comparison():
    values = torch.rand(100, dtype=torch.float64)
    first = operator_spectrum(diagonal(values), steps=30, probes=8)
    shifted = operator_spectrum(diagonal(values + 0.5), steps=30, probes=8, seed=1)
    same = operator_spectrum(diagonal(values), steps=30, probes=8, seed=2)
    difference = compare(first, shifted)
    assert difference.wasserstein == pytest.approx(0.5, abs=0.05)
    assert difference.lambda_max == pytest.approx(0.5, abs=1e-3)
    assert abs(difference.trace.value - 50) <= 4 * difference.trace.stderr
    assert abs(difference.trace_z) > 4
    nothing = compare(first, same)
    assert nothing.wasserstein < 0.05
    assert abs(nothing.trace_z) < 4
    exact = [operator_spectrum(diagonal(torch.full((5,), x).double()), steps=2) for x in (1, 1, 0)]
    assert compare(*exact[:2]).trace_z == 0
    assert compare(*exact[1:]).trace_z == -math.inf


def test_differences_have_the_degrees_of_freedom_of_their_errors():
    """If two eigenvalues dominate, their random weights determine the error, which is then uncertain."""
    values = torch.zeros(200, dtype=torch.float64)
    values[:2] = torch.tensor([1.0, 0.7])
    one, other = (
        operator_spectrum(diagonal(values), steps=10, probes=probes, seed=probes)
        for probes in (4, 9)
    )
    for name, function in (("trace", lambda x: x), ("frobenius_norm_squared", np.square)):
        estimates = [getattr(each, f"{name}_estimate") for each in (one, other)]
        for each, estimate in zip((one, other), estimates, strict=True):
            assert estimate.degrees == each.function(function).degrees < 100
        difference = getattr(compare(one, other), name)
        first, second = (estimate.stderr**2 for estimate in estimates)
        welch = (first + second) ** 2 / (
            first**2 / estimates[0].degrees + second**2 / estimates[1].degrees
        )
        assert difference.degrees == math.floor(welch)
        assert difference.stderr == pytest.approx(math.sqrt(first + second))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_wasserstein_distance_is_the_area_between_the_distributions(scale):
    spectra = [
        operator_spectrum(diagonal(torch.randn(size).double() * scale), steps=steps, probes=probes)
        for size, steps, probes in ((40, 12, 2), (7, 9, 3))
    ]
    nodes = [np.concatenate(spectrum.nodes) for spectrum in spectra]
    weights = [np.concatenate(spectrum.weights) / spectrum.probes for spectrum in spectra]
    places = np.sort(np.concatenate(nodes))

    def below(which, place):
        return weights[which][nodes[which] <= place].sum()

    gaps = [abs(below(0, place) - below(1, place)) for place in places[:-1]]
    expected = float(np.array(gaps) @ np.diff(places))
    assert compare(*spectra).wasserstein == pytest.approx(expected, rel=1e-12)


def test_plots():
    import matplotlib as mpl

    mpl.use("Agg")
    spectra = {
        name: operator_spectrum(diagonal(torch.randn(30).double()), steps=9)
        for name in ("head", "tail")
    }
    axes = spectra["head"].plot(label="head")
    assert axes.get_yscale() == "log"
    assert len(axes.lines) == 1
    both = plot_density(list(spectra.values()), labels=list(spectra))
    assert [text.get_text() for text in both.get_legend().get_texts()] == ["head", "tail"]
    figure = plot_spectra(spectra)
    assert [panel.get_title().split("\n")[0] for panel in figure.axes] == ["head", "tail"]
    classes = plot_spectra({0: spectra["head"], np.int64(1): spectra["tail"]}, columns=2)
    assert [panel.get_title().split("\n")[0] for panel in classes.axes] == ["class 0", "class 1"]
    classes.canvas.draw()
    for panel in classes.axes:
        low, high = panel.get_xlim()
        boxes = [
            label.get_window_extent()
            for label, at in zip(panel.get_xticklabels(), panel.get_xticks(), strict=True)
            if low <= at <= high
        ]
        assert len(boxes) >= 2
        assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    with pytest.raises(ValueError, match="at least one"):
        plot_spectra({})
    mpl.pyplot.close("all")


def test_stems_stand_at_the_ritz_values_and_sum_to_the_density():
    import matplotlib as mpl

    mpl.use("Agg")
    spectrum = operator_spectrum(diagonal(torch.randn(30).double()), steps=6, probes=2)
    sigma = 0.3  # wide: no Ritz value is below the floor of the figure
    axes = spectrum.plot(sigma=sigma, stems=True)
    (stems,) = axes.collections
    ends = np.array([segment[1] for segment in stems.get_segments()])
    assert np.array_equal(np.sort(ends[:, 0]), np.sort(np.concatenate(spectrum.nodes)))
    bumps = np.exp(-((0.25 - ends[:, 0]) ** 2) / (2 * sigma**2)) * ends[:, 1]
    assert bumps.sum() == pytest.approx(float(spectrum.density(np.array([0.25]), sigma)[0]))
    figure = plot_spectra({"a": spectrum, "b": spectrum}, stems=True)
    assert all(len(panel.collections) == 1 for panel in figure.axes)
    mpl.pyplot.close("all")


def test_the_scale_of_eigenvalues_has_no_kink():
    """The slope of the scale is continuous everywhere; that of matplotlib's symlog jumps."""
    import matplotlib as mpl

    mpl.use("Agg")
    spectrum = operator_spectrum(diagonal(torch.linspace(-3, 40, 30).double()), steps=6)
    axes = spectrum.plot()
    points = np.linspace(-40, 40, 400_001)
    slopes = np.diff(axes.xaxis.get_transform().transform(points))
    assert np.all(slopes > 0)
    assert np.abs(np.diff(slopes) / slopes[:-1]).max() < 1e-2
    mpl.pyplot.close("all")


@pytest.mark.parametrize("name", [r"$\frac$", "$x$", "a$b", r"\$y$", "$"])
def test_names_in_plots_are_not_parsed_as_mathematics(name: str) -> None:
    """Matplotlib parses text between dollar signs as formulas, and fails on invalid ones."""
    import matplotlib as mpl

    mpl.use("Agg")
    spectrum = operator_spectrum(diagonal(torch.randn(30).double()), steps=9)
    axes = [plot_density([spectrum], labels=[name]), spectrum.plot(label=name)]
    figures = [*(each.figure for each in axes), plot_spectra({name: spectrum, "b": spectrum})]
    for figure in figures:
        picture = io.StringIO()
        with mpl.rc_context({"svg.fonttype": "none"}):  # text as text
            figure.savefig(picture, format="svg")
        texts = [
            "".join(node.itertext()) for node in ElementTree.fromstring(picture.getvalue()).iter()
        ]
        assert any(line.strip() == name for text in texts for line in text.splitlines())
    mpl.pyplot.close("all")
