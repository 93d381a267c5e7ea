"""Fractions of eigenvalues and traces of functions, with bounds on the errors of the quadrature."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastsam.curvature import (
    CallableOperator,
    MatrixOperator,
    Spectrum,
    compare,
    curvature_operator,
    eigenpairs,
    operator_spectrum,
    spectral_density,
    table,
)
from fastsam.curvature.lanczos.probes import sphere_probes
from fastsam.curvature.lanczos.quadrature import share_limits
from python_tests.curvature.oracles import classification, explicit_hessian, mlp


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spectrum_of(values: Tensor, dtype: torch.dtype = torch.float64, **options) -> Spectrum:
    """Return a spectrum of a diagonal matrix, which is general because probes are rotation invariant."""
    diagonal = values.to(dtype)
    operator = CallableOperator(lambda rows: rows * diagonal, dimension=len(values), dtype=dtype)
    return operator_spectrum(operator, **{"progress": False, **options})


def normal(n: int, seed: int) -> Tensor:
    return torch.randn(n, generator=generator_of(seed), dtype=torch.float64)


def heap(n: int, seed: int, width: float) -> Tensor:
    """Return eigenvalues: nine in ten within ``width`` of zero, some negative, a few outliers."""
    generator = generator_of(seed)
    values = width * torch.randn(n, generator=generator, dtype=torch.float64)
    values[: n // 20] = -torch.rand(n // 20, generator=generator, dtype=torch.float64)
    values[n // 20 : 2 * (n // 20)] = 2 * torch.rand(
        n // 20, generator=generator, dtype=torch.float64
    )
    values[:5] = torch.tensor([30.0, 20.0, 9.0, -4.0, 12.0], dtype=torch.float64)
    return values


def share(values: Tensor, threshold: float) -> float:
    return float((values < threshold).double().mean())


def exact_masses(values: Tensor, spectrum: Spectrum, point: float) -> list[float]:
    """Return the mass below ``point`` of the spectral measure of each probe."""
    starts = sphere_probes(
        len(values),
        range(spectrum.probes),
        seed=spectrum.settings["seed"],
        dtype=torch.float64,
        device=torch.device("cpu"),
    )
    return (starts.square() * (values < point)).sum(dim=1).tolist()


# The mass of one probe.


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("kind", ["normal", "heap", "two", "gap"])
def test_the_mass_of_a_probe_lies_within_its_bounds(kind, steps):
    values = {
        "normal": normal(301, 0),
        "heap": heap(300, 1, 1e-9),
        "two": torch.tensor([-1.0, 2.0]).double().repeat(50),
        "gap": torch.cat([normal(100, 2) - 9, normal(101, 3) + 9]),
    }[kind]
    spectrum = spectrum_of(values, steps=steps, probes=3, seed=steps)
    nodes = np.concatenate(spectrum.nodes)[::11]
    points = [
        -1e300,
        1e300,
        *np.linspace(-13, 13, 13),
        *nodes,
        *np.nextafter(nodes, 99),
        *np.nextafter(nodes, -99),
    ]
    for point in points:
        low, high = np.transpose([rule.mass_below(point) for rule in spectrum._quadrature])
        truth = exact_masses(values, spectrum, point)
        before = exact_masses(values, spectrum, point - 2 * spectrum.resolution)
        after = exact_masses(values, spectrum, point + 2 * spectrum.resolution)
        assert np.all(low <= np.array(after) + 1e-12)
        assert np.all(high >= np.array(before) - 1e-12)
        assert np.all(low <= high + 1e-12)
        if point not in nodes:
            assert np.all(low <= np.array(truth) + 1e-12)
            assert np.all(high >= np.array(truth) - 1e-12)


def test_the_bounds_of_a_probe_are_sharp():
    """Their distance is the Christoffel function ``1 / sum p_j(x)^2`` of degree ``steps``."""
    spectrum = spectrum_of(normal(400, 4), steps=12)
    alpha, beta = spectrum.alpha[0], spectrum.beta[0]
    for point in np.linspace(-2, 2, 9):
        polynomials = [1.0, (point - alpha[0]) / beta[0]]
        for j in range(1, 12):
            following = (point - alpha[j]) * polynomials[-1] - beta[j - 1] * polynomials[-2]
            polynomials.append(following / beta[j])
        low, high = spectrum._quadrature[0].mass_below(point)
        assert high - low == pytest.approx(1 / np.sum(np.square(polynomials)), rel=1e-6)


# Confidence limits over the probes.


@pytest.mark.parametrize("probes", [1, 3])
@pytest.mark.parametrize(
    ("rank", "dimension"),
    [(1, 2), (3, 10), (1, 1000), (20, 1000), (500, 1000), (999, 1000)],
)
def test_limits_cover_shares_with_their_confidence(rank, dimension, probes):
    generator = np.random.default_rng(rank)
    masses = generator.beta(rank / 2, (dimension - rank) / 2, size=(100, probes)).mean(axis=1)
    for confidence in (0.8, 0.95):
        limits = np.array(
            [
                share_limits(mass, mass, dimension=dimension, probes=probes, confidence=confidence)
                for mass in masses
            ]
        )
        truth = rank / dimension
        covered = np.mean((limits[:, 0] <= truth + 1e-12) & (truth <= limits[:, 1] + 1e-12))
        assert covered >= confidence - 3 * math.sqrt(confidence * (1 - confidence) / 100)
        # At most 1.1 times as wide as those of a normal variable, and a few eigenvalues.
        deviation = math.sqrt(2 * truth * (1 - truth) / (probes * (dimension + 2)))
        quantile = {0.8: 1.2816, 0.95: 1.96}[confidence]
        width = np.mean(limits[:, 1] - limits[:, 0])
        assert width <= 1.1 * 2 * quantile * deviation + 5 / dimension


def test_limits_of_nothing_and_everything():
    options = {"dimension": 64, "probes": 2, "confidence": 0.95}
    assert share_limits(0.0, 1.0, **options) == (0, 1)
    for probes in (1, 2, 7):
        options["probes"] = probes
        assert share_limits(0.0, 0.0, **options) == pytest.approx((0, 0), abs=2.1 / 64)
        assert share_limits(1.0, 1.0, **options) == pytest.approx((1, 1), abs=2.1 / 64)
    lower, upper = share_limits(0.3, 0.3, dimension=10**9, probes=1, confidence=0.95)
    assert 0 < upper - lower < 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("reorthogonalize", ["full", "none"])
def test_limits_are_wide_at_a_cluster_at_zero(dtype, reorthogonalize):
    """The sign of the cluster's node is arbitrary, so the bounds must contain both cases."""
    for seed in range(6):
        values = heap(1000, seed, 10.0 ** (-3 - seed)).to(dtype).double()
        spectrum = spectrum_of(
            values, dtype, steps=40, probes=2, seed=seed, reorthogonalize=reorthogonalize
        )
        for threshold in (None, -1e-3, -0.1, 0.0, 1e-3, 1.0):
            found = spectrum.mass_below(threshold, confidence=0.999)
            assert found.lower <= share(values, found.threshold) <= found.upper
            assert 0 <= found.lower <= found.value <= found.upper <= 1
        assert spectrum.mass_below().threshold == spectrum.default_threshold < 0
        clear = spectrum.mass_below(-0.5)  # far from the cluster
        assert clear.upper - clear.lower < 0.12


def no_heap(n: int, seed: int) -> dict[str, Tensor]:
    generator = generator_of(seed)
    matrix = torch.randn(n, n, generator=generator, dtype=torch.float64)
    uniform = torch.rand(n, generator=generator, dtype=torch.float64)
    sample = normal(n, seed + 100)
    return {
        "normal": sample,
        "uniform": uniform - 0.5,
        "exponential": -torch.log(uniform) - 0.7,
        "two lumps": torch.where(uniform < 0.4, -1 + 0.1 * sample, 1 + 0.1 * sample),
        "random matrix": torch.linalg.eigvalsh(matrix + matrix.T),
        "outliers": torch.cat([sample[:-6], torch.tensor([90.0, 50.0, 30.0, 20.0, 9.0, -8.0])]),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_bounds_are_narrow_away_from_clusters(dtype):
    for name, values in no_heap(1000, 0).items():
        spectrum = spectrum_of(values, dtype, steps=80, probes=4)
        for quantile in (0.3, 0.5):
            threshold = float(values.quantile(quantile))
            found = spectrum.mass_below(threshold)
            assert found.upper - found.lower < 0.1, (name, quantile)
        found = spectrum.mass_below()
        assert found.upper - found.lower < 0.1, name


def test_more_steps_and_probes_narrow_the_bounds():
    values = normal(3000, 5)

    def width(**options):
        found = spectrum_of(values, **options).mass_below(0.2)
        return found.upper - found.lower

    assert width(steps=20, probes=1) > 1.5 * width(steps=80, probes=1)
    assert width(steps=80, probes=1) > 1.3 * width(steps=80, probes=16)


def test_an_exhausted_run_knows_its_masses():
    values = torch.tensor([-2.0, 1.0, 4.0]).double().repeat_interleave(100)
    spectrum = spectrum_of(values, steps=20, probes=4)
    assert spectrum.order.tolist() == [3, 3, 3, 3]
    found = spectrum.mass_below(0.0)
    assert found.value == pytest.approx(np.mean(exact_masses(values, spectrum, 0.0)), abs=1e-10)
    assert found.lower <= 1 / 3 <= found.upper
    assert found.upper - found.lower < 0.12
    assert spectrum.mass_below(-3.0).upper == 0
    assert spectrum.mass_below(5.0).lower == 1


def test_bad_thresholds_and_edges():
    spectrum = spectrum_of(normal(20, 0), steps=5)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="threshold must be finite"):
            spectrum.mass_below(bad)
    for bad in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="confidence"):
            spectrum.mass_below(0.0, confidence=bad)
        with pytest.raises(ValueError, match="confidence"):
            spectrum.histogram([0.0], confidence=bad)
    for edges in ([1.0, 0.0], [math.nan], [[0.0]], [math.inf]):
        with pytest.raises(ValueError, match="edges"):
            spectrum.histogram(edges)


def test_tables_and_comparisons_have_the_bounds():
    first, second = heap(500, 0, 1e-6), heap(500, 1, 1e-6) - 0.01
    spectra = {
        "a": spectrum_of(first, steps=60, probes=4),
        "b": spectrum_of(second, steps=60, probes=4, seed=1),
    }
    for row, spectrum, values in zip(
        table(spectra), spectra.values(), (first, second), strict=True
    ):
        found = spectrum.mass_below()
        assert row["threshold"] == found.threshold
        assert (row["mass_below_lower"], row["mass_below_upper"]) == (found.lower, found.upper)
        assert row["mass_below"] == found.value
        assert found.lower <= share(values, found.threshold) <= found.upper
        assert not any("negative" in name for name in row)
    difference = compare(spectra["a"], spectra["b"]).mass_below
    truth = share(second, difference.threshold) - share(first, difference.threshold)
    assert difference.lower <= truth <= difference.upper
    assert not hasattr(spectra["a"], "negative_mass")


@pytest.mark.parametrize("edges", [[], [0.0], [-0.5, 0.0, 0.5], list(np.linspace(-2, 2, 12))])
def test_histograms_bound_every_bin(edges):
    for number, values in enumerate((normal(1000, 6), heap(1000, 7, 1e-8))):
        spectrum = spectrum_of(values, steps=50, probes=3, seed=number)
        found = spectrum.histogram(edges, confidence=0.999)
        truth = np.diff([0.0, *[share(values, edge) for edge in edges], 1.0])
        assert found.shares.sum() == pytest.approx(1)
        assert len(found.shares) == len(found.lower) == len(found.upper) == len(edges) + 1
        assert np.all((found.lower <= truth + 1e-12) & (truth <= found.upper + 1e-12))
        one = 1 / len(values)
        assert np.all((found.lower < found.shares + one) & (found.shares < found.upper + one))
    if edges == [-0.5, 0.0, 0.5]:  # the cluster is on an edge, so its bin is undetermined
        assert found.upper[1] - found.lower[1] > 0.5
        assert found.upper[0] - found.lower[0] < 0.12


# Functions of the operator.

FUNCTIONS = {
    "exp": np.exp,
    "polynomial": lambda x: x**5 - 3 * x**2 + 1,
    "constant": np.ones_like,
    "relu": lambda x: np.maximum(x, 0),
    "absolute": np.abs,
    "step": lambda x: (x < -1e-7).astype(float),
    "window": lambda x: ((x > -0.3) & (x < 0.4)).astype(float),
    "steep": lambda x: np.tanh(1e4 * x),
    "wave": lambda x: np.sin(20 * x),
    "peak": lambda x: 1 / (x**2 + 1e-4),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kind", ["normal", "heap", "two"])
def test_the_quadrature_error_of_a_function_is_bounded(kind, name):
    values = {
        "normal": normal(300, 8),
        "heap": heap(300, 9, 1e-7),
        "two": torch.tensor([-1.0, 2.0]).double().repeat(100),
    }[kind]
    function = FUNCTIONS[name]
    exact = torch.from_numpy(function(values.numpy()))
    for steps in (12, 40):
        spectrum = spectrum_of(values, steps=steps, probes=4, seed=steps)
        starts = sphere_probes(
            len(values), range(4), seed=steps, dtype=torch.float64, device=torch.device("cpu")
        )
        by_probes = len(values) * float((starts.square() @ exact).mean())
        found = spectrum.function(function)
        scale = len(values) * float(exact.abs().max())
        assert abs(found.value - by_probes) <= found.quadrature_error + 1e-9 * scale
        assert abs(found.value - float(exact.sum())) <= 4 * found.stderr + 1e-9 * scale
        if name in ("exp", "polynomial", "constant") and steps == 40:
            assert found.quadrature_error <= 1e-9 * scale


def test_the_error_of_a_step_next_to_a_cluster_is_its_mass():
    values = heap(1000, 10, 1e-7)
    found = spectrum_of(values, steps=60, probes=4).function(lambda x: (x < 0).astype(float))
    assert found.stderr >= found.quadrature_error > 300


def test_functions_that_are_not_finite_between_the_nodes_have_no_error_bar():
    spectrum = spectrum_of(normal(200, 11), steps=30, probes=2)
    shift = 1e-3 - spectrum.lambda_min
    assert math.isinf(spectrum.log_determinant(shift).stderr)
    assert math.isinf(spectrum_of(normal(200, 11), steps=3).function(np.exp).stderr)
    assert spectrum.log_determinant(shift + 3).stderr < 30


# Moments of short runs.


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_runs_state_the_errors_of_their_traces(steps):
    values = normal(400, 12) ** 3
    moments = {"trace": values, "frobenius_norm_squared": values.square()}
    errors: dict[str, list[float]] = {name: [] for name in moments}
    stated: dict[str, list[float]] = {name: [] for name in moments}
    for seed in range(300):
        spectrum = spectrum_of(values, steps=steps, seed=seed)
        for name, exact in moments.items():
            errors[name].append(getattr(spectrum, name) - float(exact.sum()))
            stated[name].append(getattr(spectrum, f"{name}_stderr"))
    for name, found in errors.items():
        if name == "frobenius_norm_squared" and steps == 1:
            assert all(map(math.isinf, stated[name]))
            continue
        true = math.sqrt(np.mean(np.square(found)))
        assert math.sqrt(np.mean(np.square(stated[name]))) == pytest.approx(true, rel=0.25)
        deviation = 2 * 400**2 / 402 * float(moments[name].var(correction=0))
        assert true == pytest.approx(math.sqrt(deviation), rel=0.2)


def test_one_step_that_exhausts_the_space_is_exact():
    spectrum = spectrum_of(torch.full((30,), -2.0).double(), steps=1)
    assert (spectrum.trace, spectrum.frobenius_norm_squared) == pytest.approx((-60, 120))
    assert spectrum.trace_stderr == pytest.approx(0, abs=1e-6)
    assert spectrum.frobenius_norm_squared_stderr == pytest.approx(0, abs=1e-6)


# Many spectra.


def trained_network(seed: int, dtype: torch.dtype) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A small network after some steps of training: most eigenvalues are near zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inputs, targets = classification(60, 6, 4, dtype=dtype)
        model: nn.Module = mlp((6, 12, 8, 4), dtype=dtype)
        if seed % 2:
            layers = [nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 8, 3, padding=1), nn.ReLU()]
            model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(48, 4)).to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
        for _ in range(10 * (seed % 9)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    return model, (inputs, targets)


@pytest.mark.slow
def test_the_truth_is_within_bounds_on_200_spectra_with_a_cluster():
    missed, count = [], 0
    for number in range(200):
        dtype = (torch.float32, torch.float64)[number % 2]
        probes, steps = (1, 2, 4)[number % 3], (20, 40, 80)[number // 2 % 3]
        options = {"steps": steps, "probes": probes, "seed": number, "progress": False}
        if number % 4 < 2:
            model, batch = trained_network(number // 2, dtype)
            spectrum = spectral_density(model, nn.CrossEntropyLoss(), batch, **options)
            exact = model.double(), batch[0].double(), batch[1]
            hessian = explicit_hessian(
                exact[0], lambda m, e=exact: nn.functional.cross_entropy(m(e[1]), e[2])
            )
            values = torch.linalg.eigvalsh(hessian)
        else:
            values = heap(600 + number, number, (0.0, 1e-8, 1e-6, 1e-4, 1e-2)[number % 5])
            values = values.to(dtype).double()
            spectrum = spectrum_of(values, dtype, **options)
        norm = float(values.abs().max())
        for threshold in (None, -1e-4 * norm, -1e-2 * norm, 1e-3 * norm):
            found = spectrum.mass_below(threshold)
            count += 1
            if not found.lower <= share(values, found.threshold) <= found.upper:
                missed.append((number, threshold))
    assert count == 800
    assert len(missed) <= 0.05 * count, missed


@pytest.mark.slow
def test_explicit_matrices_of_every_size_have_narrow_bounds_without_a_cluster():
    for n in (1000, 1500, 2500):
        for name, values in no_heap(n, n).items():
            basis, _ = torch.linalg.qr(
                torch.randn(n, n, generator=generator_of(n), dtype=torch.float64)
            )
            matrix = (basis * values) @ basis.T
            operator = MatrixOperator((matrix + matrix.T) / 2)
            spectrum = operator_spectrum(operator, steps=80, probes=4, progress=False)
            for threshold in (
                None,
                *values.quantile(torch.tensor([0.1, 0.5, 0.8]).double()).tolist(),
            ):
                found = spectrum.mass_below(threshold)
                assert found.upper - found.lower < 0.1, (n, name, threshold)
                assert found.lower <= share(values, found.threshold) <= found.upper


def test_the_bounds_hold_in_a_network_that_fits_its_data() -> None:
    """In float32, rounding then moves eigenvalues by far more than 64 eps of the norm."""
    torch.manual_seed(0)
    model = mlp((10, 16, 5), dtype=torch.float32)
    images, targets = classification(60, 10, 5, dtype=torch.float32)
    optimizer, criterion = torch.optim.Adam(model.parameters(), lr=0.02), nn.CrossEntropyLoss()
    for _ in range(3000):
        optimizer.zero_grad()
        loss = criterion(model(images), targets)
        loss.backward()
        optimizer.step()
    hessian = explicit_hessian(
        model.double(), lambda network: criterion(network(images.double()), targets)
    )
    exact, model = torch.linalg.eigvalsh(hessian).numpy(), model.float()
    beyond_eps = held = 0
    for seed in range(8):
        found = spectral_density(model, criterion, (images, targets), seed=seed, progress=False)
        error = np.abs(exact - found.lambda_max).min()
        held += error <= found.lambda_max_residual
        beyond_eps += error > 64 * found.eps * exact[-1]
        assert np.abs(exact - found.lambda_min).min() <= found.lambda_min_residual
    assert beyond_eps >= 4  # otherwise the network is not the case of this test
    assert held == 8
    operator = curvature_operator(model, criterion, (images, targets))
    pairs = eigenpairs(operator, 2, which="ends", progress=False)
    for value, residual in zip(pairs.values.numpy(), pairs.residuals.numpy(), strict=True):
        assert np.abs(exact - value).min() <= residual + pairs.resolution


def test_the_asymmetry_of_products_widens_the_bounds(seed: int) -> None:
    """Rounding is emulated by a matrix with a symmetric and an antisymmetric part of one size."""
    generator = generator_of(seed)
    matrix = torch.diag(torch.linspace(-1, 3, 200, dtype=torch.float64))
    noise = 1e-7 * torch.randn(200, 200, generator=generator, dtype=torch.float64)
    rounded = matrix + (noise - noise.T) / 2
    operator = CallableOperator(lambda rows: rows @ rounded.T, dimension=200, dtype=matrix.dtype)
    exact = operator_spectrum(MatrixOperator(matrix), steps=60, seed=seed, progress=False)
    found = operator_spectrum(operator, steps=60, seed=seed, progress=False)
    assert exact.asymmetry < 1e-12
    assert 1e-9 < found.asymmetry < 1e-6
    assert found.resolution > 1e4 * exact.resolution
    norm = found.resolution / (16 * found.asymmetry)
    assert 3 < norm < 9
    unchecked = operator_spectrum(
        operator, steps=60, seed=seed, verify_symmetry=False, progress=False
    )
    assert unchecked.asymmetry == 0
    assert np.array_equal(unchecked.alpha, found.alpha)
