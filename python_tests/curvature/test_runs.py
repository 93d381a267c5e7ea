"""Runs that are resumed, stopped early, stored on disk, split into passes, or planned."""

from __future__ import annotations

import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsam.curvature import (
    BatchLoss,
    CallableOperator,
    MatrixOperator,
    class_spectra,
    operator_spectrum,
    spectral_density,
)
from fastsam.curvature.lanczos import checkpoint
from fastsam.curvature.lanczos import run as runs
from fastsam.curvature.products.graph_memory import LiveStorage
from python_tests.curvature.oracles import classification, explicit_hessian, interrupted_at, mlp


def symmetric(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    matrix = torch.randn(n, n, dtype=dtype)
    return matrix + matrix.T


class KilledError(Exception):
    """Emulates a kill."""


@pytest.mark.parametrize("reorthogonalize", ["full", "none"])
@pytest.mark.parametrize("killed_at", [1, 2, 3, 7, 19, 20])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, reorthogonalize, killed_at):
    matrix = symmetric(60, torch.float32)
    options = {"steps": 20, "probes": 2, "reorthogonalize": reorthogonalize}
    whole = operator_spectrum(MatrixOperator(matrix), **options)
    calls = []

    def product(rows: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == killed_at:
            raise KilledError
        return rows @ matrix.T

    kept = {**options, "checkpoint": tmp_path / "run", "checkpoint_interval": 0}
    operator = CallableOperator(product, dimension=60, dtype=torch.float32)
    with pytest.raises(KilledError):
        operator_spectrum(operator, **kept)
    resumed = operator_spectrum(operator, **kept)
    assert np.array_equal(resumed.alpha, whole.alpha)
    assert np.array_equal(resumed.beta, whole.beta)
    verified = killed_at > 1  # the first step is repeated, to verify that the operator is the same
    assert len(calls) == 21 + verified
    again = operator_spectrum(operator, **kept)
    assert len(calls) == 22 + verified  # finished: only verified
    assert np.array_equal(again.alpha, whole.alpha)


def test_a_resumed_model_run_reuses_strategy_and_threads(tmp_path):
    model, batch = mlp((3, 4, 3)), classification(20, 3, 3)
    folder = tmp_path / "run"
    options = {"steps": 12, "checkpoint": folder, "checkpoint_interval": 0}
    loss, _ = interrupted_at(15, KilledError)
    with pytest.raises(KilledError):
        spectral_density(model, loss, batch, strategy="rebuild", **options)
    resumed = spectral_density(model, loss, batch, **options)
    assert resumed.settings["strategy"] == "rebuild"
    whole = spectral_density(model, loss, batch, steps=12, strategy="rebuild")
    assert np.array_equal(resumed.alpha, whole.alpha)
    assert np.array_equal(resumed.beta, whole.beta)


def test_a_checkpoint_of_another_run_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    matrix = symmetric(9)
    operator_spectrum(MatrixOperator(matrix), steps=5, checkpoint=folder)
    with pytest.raises(ValueError, match=r"other settings \(seed\)"):
        operator_spectrum(MatrixOperator(matrix), steps=5, checkpoint=folder, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_FORMAT", 1)
        with pytest.raises(ValueError, match=r"in the checkpoint format of another version"):
            operator_spectrum(MatrixOperator(matrix), steps=5, checkpoint=folder)
    state = folder / "state.json"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        operator_spectrum(MatrixOperator(matrix), steps=5, checkpoint=folder)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="not empty"):
        operator_spectrum(MatrixOperator(matrix), steps=5, checkpoint=other)


@pytest.mark.parametrize("where", ["host", "folder", "text"])
def test_the_basis_may_be_on_the_host_or_in_a_file(tmp_path, where):
    matrix = symmetric(30)
    basis = "host" if where == "host" else tmp_path / "basis"
    options = {"steps": 20, "probes": 2}
    given = str(basis) if where == "text" else basis
    elsewhere = operator_spectrum(MatrixOperator(matrix), basis=given, **options)
    here = operator_spectrum(MatrixOperator(matrix), **options)
    assert np.array_equal(elsewhere.alpha, here.alpha)
    if where != "host":
        assert not list(basis.iterdir())  # the file is gone with the run


def test_a_basis_that_does_not_fit_is_refused():
    operator = CallableOperator(lambda rows: rows, dimension=10**6)
    with pytest.raises(ValueError, match=r"basis needs 0\.60 GiB.*reorthogonalize='none'"):
        operator_spectrum(operator, steps=80, memory_limit=10**8)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-6])
def test_early_stop(tolerance):
    outliers = torch.tensor([-3.0, 40.0], dtype=torch.float64)
    values = torch.cat([torch.linspace(-0.1, 0.1, 398, dtype=torch.float64), outliers])
    calls = []

    def product(rows: Tensor) -> Tensor:
        calls.append(1)
        return rows * values

    operator = CallableOperator(product, dimension=400)
    spectrum = operator_spectrum(operator, steps=200, tolerance=tolerance)
    assert len(calls) < 60
    assert spectrum.order[0] == len(calls)
    assert spectrum.lambda_max == pytest.approx(40, abs=40 * tolerance)
    assert spectrum.lambda_min == pytest.approx(-3, abs=40 * tolerance)
    assert max(spectrum.lambda_min_residual, spectrum.lambda_max_residual) <= 2 * 40 * tolerance


def late_monitor(monkeypatch, lag):
    """Make the host lag behind as with a GPU."""

    class Late(runs.Monitor):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self._lag = lag

    monkeypatch.setattr(runs, "Monitor", Late)


OUTLIERS = torch.cat([torch.linspace(-0.1, 0.1, 398), torch.tensor([-3.0, 40.0])]).double()
EXHAUSTED = torch.tensor([1.0, 2.0, 5.0, -4.0]).double().repeat(100)


@pytest.mark.parametrize("reorthogonalize", ["full", "none"])
@pytest.mark.parametrize("lag", [2, 9])
@pytest.mark.parametrize("interval", [0, 60])
@pytest.mark.parametrize("values", [OUTLIERS, EXHAUSTED], ids=["tolerance", "exhausted"])
def test_where_a_run_ends_does_not_depend_on_how_late_the_host_sees_it(
    tmp_path, monkeypatch, reorthogonalize, lag, interval, values
):
    calls = []

    def product(rows: Tensor) -> Tensor:
        calls.append(1)
        return rows * values

    operator = CallableOperator(product, dimension=400)
    options = {
        "steps": 50,
        "probes": 2,
        "tolerance": 1e-8 if values is OUTLIERS else None,
        "reorthogonalize": reorthogonalize,
    }
    at_once = operator_spectrum(operator, **options)
    order = at_once.order.max()
    assert order == len(calls) == (11 if values is OUTLIERS else order) < 20
    late_monitor(monkeypatch, lag)
    folder = {"checkpoint": tmp_path / "run", "checkpoint_interval": interval}
    runs = [operator_spectrum(operator, **options)]
    assert len(calls) == 2 * order + lag
    runs += [operator_spectrum(operator, **options, **folder)]
    # Writing checks all steps at once but must not end the run early: ranks that do not write continue.
    assert len(calls) == 3 * order + 2 * lag
    runs += [operator_spectrum(operator, **options, **folder) for _ in range(2)]
    assert len(calls) == 3 * order + 2 * lag + 2  # ended: only verified, twice
    for run in runs:
        assert np.array_equal(run.alpha, at_once.alpha)
        assert np.array_equal(run.beta, at_once.beta)
        assert np.array_equal(run.order, at_once.order)


@pytest.mark.parametrize("reorthogonalize", ["full", "none"])
@pytest.mark.parametrize("killed_at", [3, 8, 11])
def test_a_killed_run_ends_where_it_would_have(tmp_path, monkeypatch, killed_at, reorthogonalize):
    late_monitor(monkeypatch, 2)
    calls = []

    def product(rows: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == killed_at:
            raise KilledError
        return rows * OUTLIERS

    operator = CallableOperator(product, dimension=400)
    options = {"steps": 50, "tolerance": 1e-8, "reorthogonalize": reorthogonalize}
    kept = {**options, "checkpoint": tmp_path / "run", "checkpoint_interval": 0}
    with pytest.raises(KilledError):
        operator_spectrum(operator, **kept)
    resumed = operator_spectrum(operator, **kept)
    assert len(calls) == 15  # the killed step, one to verify, and two steps after the end
    whole = operator_spectrum(operator, **options)
    assert whole.order.tolist() == [11]
    assert np.array_equal(resumed.alpha, whole.alpha)
    assert np.array_equal(resumed.beta, whole.beta)


def test_a_late_host_still_sees_the_last_steps(monkeypatch):
    late_monitor(monkeypatch, 9)
    calls = []

    def product(rows: Tensor) -> Tensor:
        calls.append(1)
        return rows * (float("nan") if len(calls) == 12 else OUTLIERS)

    operator = CallableOperator(product, dimension=400)
    with pytest.raises(FloatingPointError, match="step 12"):
        operator_spectrum(operator, steps=12)
    calls.clear()
    spectrum = operator_spectrum(
        operator, steps=13, tolerance=1e-8
    )  # the end is detected one lag later
    assert spectrum.order.tolist() == [11]


@pytest.mark.parametrize("strategy", ["kept-graph", "rebuild", "forward-over-reverse"])
def test_micro_batches_change_nothing(strategy):
    model, (inputs, targets) = mlp((3, 4, 3)), classification(23, 3, 3)
    criterion = nn.CrossEntropyLoss(weight=torch.rand(3, dtype=torch.float64) + 0.1)
    options = {"steps": 31, "strategy": strategy}
    whole = spectral_density(model, criterion, (inputs, targets), **options)
    cut = spectral_density(model, criterion, (inputs, targets), micro_batch=5, **options)
    assert cut.settings["micro_batch"] == 5
    assert np.allclose(cut.alpha[:, :5], whole.alpha[:, :5], atol=1e-9 * whole.lambda_max)
    assert cut.lambda_max == pytest.approx(whole.lambda_max, rel=1e-9)


def test_a_memory_limit_splits_batches_and_drops_kept_graphs():
    model, batch = mlp((30, 40, 3)), classification(2000, 30, 3)
    free = spectral_density(model, F.cross_entropy, batch, steps=5)
    assert free.settings["strategy"] == "kept-graph"
    assert free.settings["micro_batch"] is None
    limit = 5 * free.dimension * 8 + free.settings["predicted_bytes"] // 4
    tight = spectral_density(model, F.cross_entropy, batch, steps=5, memory_limit=limit)
    assert tight.settings["strategy"] == "rebuild"
    assert 1 < tight.settings["micro_batch"] < 2000
    assert np.allclose(tight.alpha, free.alpha)
    with pytest.raises(ValueError, match="needs about"):
        spectral_density(
            model, F.cross_entropy, batch, steps=5, memory_limit=limit, strategy="kept-graph"
        )
    with pytest.raises(ValueError, match="a pass over 1 samples needs"):
        spectral_density(model, F.cross_entropy, batch, steps=5, memory_limit=limit // 1000)


def test_predicted_memory_is_near_the_truth():
    from fastsam.curvature.losses import make_model_loss
    from fastsam.curvature.products.graph_memory import graph_cost
    from fastsam.curvature.products.kinds.hessian import HessianGraph
    from fastsam.curvature.products.pure import PureLoss

    model, batch = mlp((30, 40, 3)), classification(500, 30, 3)
    model_loss = make_model_loss(model, nn.CrossEntropyLoss())
    loss = PureLoss(model_loss, [n for n, _ in model.named_parameters()], dtype=torch.float64)
    predicted = graph_cost(loss, batch, HessianGraph)(500)
    with LiveStorage() as live:
        graph = HessianGraph(loss, batch)
        true = live.count()
    assert 0.7 * true <= predicted <= 1.4 * true
    del graph


def test_a_batch_loss_is_not_split():
    batch = classification(9, 3, 3)
    loss = BatchLoss(lambda m, b: (F.cross_entropy(m(b[0]), b[1], reduction="sum"), 9))
    with pytest.raises(ValueError, match="batches of a BatchLoss cannot be split"):
        spectral_density(mlp((3, 3)), loss, batch, micro_batch=2)


@pytest.mark.parametrize("kind", ["ggn", "empirical-fisher", "mc-fisher"])
@pytest.mark.parametrize("strategy", ["auto", "rebuild"])
def test_other_kinds(kind, strategy):
    model, (inputs, targets) = mlp((3, 5, 4)), classification(13, 3, 4)
    weight = torch.rand(4, dtype=torch.float64) + 0.2
    data = [(inputs[:8], targets[:8]), (inputs[8:], targets[8:])]
    criterion = nn.CrossEntropyLoss(weight=weight)
    spectrum = spectral_density(
        model, criterion, data, steps=99, probes=2, kind=kind, strategy=strategy
    )
    jacobians = per_output_jacobian(model, inputs)  # [samples, outputs, n]
    p = torch.softmax(model(inputs), dim=1).detach()
    n = jacobians.shape[-1]
    expected = torch.zeros(n, n, dtype=torch.float64)
    for j, row, target in zip(jacobians, p, targets, strict=True):
        middle = torch.diag(row) - torch.outer(row, row)
        if kind == "empirical-fisher":
            residual = row - F.one_hot(target, 4)
            middle = torch.outer(residual, residual)
        expected += weight[target] * j.T @ middle @ j
    expected /= weight[targets].sum()
    eigenvalues = torch.linalg.eigvalsh(expected)
    assert spectrum.lambda_min >= -1e-10
    if kind == "mc-fisher":  # one draw per sample: correct only in expectation
        assert 0 < spectrum.trace < 10 * float(expected.trace())
    else:
        assert spectrum.lambda_max == pytest.approx(float(eigenvalues[-1]), rel=1e-8)
        assert spectrum.settings["kind"] == kind


def test_sampled_fisher_is_unbiased():
    model, (inputs, targets) = mlp((2, 2)), classification(4, 2, 2)
    gauss_newton = spectral_density(model, F.cross_entropy, (inputs, targets), steps=6, kind="ggn")
    first = [  # u'Fu for one fixed u, over independent draws of the targets
        spectral_density(
            model,
            F.cross_entropy,
            (inputs.repeat(1500, 1), targets.repeat(1500)),
            steps=1,
            kind="mc-fisher",
        ).alpha[0, 0]
    ]
    assert np.mean(first) == pytest.approx(gauss_newton.alpha[0, 0], rel=0.1)


def per_output_jacobian(model, inputs):
    rows = []
    for x in inputs:
        outputs = model(x)
        rows.append(
            torch.stack(
                [
                    torch.cat(
                        [
                            g.reshape(-1)
                            for g in torch.autograd.grad(o, model.parameters(), retain_graph=True)
                        ]
                    )
                    for o in outputs
                ]
            )
        )
    return torch.stack(rows)


def test_gauss_newton_equals_the_hessian_of_a_linear_model():
    model, batch = nn.Linear(3, 4).double(), classification(9, 3, 4)
    hessian = explicit_hessian(model, lambda m: F.cross_entropy(m(batch[0]), batch[1]))
    spectrum = spectral_density(model, F.cross_entropy, batch, steps=16, kind="ggn")
    assert spectrum.lambda_max == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]))


def test_errors_of_other_kinds_name_their_limits():
    batch = classification(9, 3, 3)
    model = mlp((3, 3))
    loss = BatchLoss(lambda m, b: (F.cross_entropy(m(b[0]), b[1], reduction="sum"), 9))
    with pytest.raises(ValueError, match="got a BatchLoss"):
        spectral_density(model, loss, batch, kind="ggn")
    with pytest.raises(ValueError, match="kind must be one of"):
        spectral_density(model, F.cross_entropy, batch, kind="laplacian")
    with pytest.raises(ValueError, match="requires kind='hessian'"):
        spectral_density(
            model, F.cross_entropy, batch, kind="empirical-fisher", strategy="forward-over-reverse"
        )
    with pytest.raises(ValueError, match="softmax"):
        spectral_density(model, nn.MSELoss(), (batch[0], batch[0]), kind="mc-fisher")


def test_classes_share_measurements(monkeypatch):
    """Memory and the choice between two strategies are measured only for the first class."""
    from fastsam.curvature.products import graph_memory, planning, trials

    measured = []
    for module, name in ((graph_memory, "graph_bytes"), (trials, "_time")):
        original = getattr(module, name)

        def counted(*arguments, original=original, name=name):
            measured.append(name)
            return original(*arguments)

        monkeypatch.setattr(module, name, counted)
    monkeypatch.setattr(
        planning, "_candidates", lambda *_, **__: ["kept-graph", "kept-graph-batched"]
    )
    model, inputs = mlp((3, 4, 3)), torch.randn(30, 3).double()
    targets = torch.tensor([0] * 15 + [1] * 14 + [2])
    spectra = class_spectra(model, nn.CrossEntropyLoss(), (inputs, targets), steps=31)
    assert measured == ["graph_bytes", "graph_bytes", "_time", "_time"]
    for label, spectrum in spectra.items():
        mask = targets == label
        alone = spectral_density(model, F.cross_entropy, (inputs[mask], targets[mask]), steps=31)
        scale = max(-alone.lambda_min, alone.lambda_max)
        assert spectrum.lambda_max == pytest.approx(alone.lambda_max, abs=1e-8 * scale)
        assert spectrum.lambda_min == pytest.approx(alone.lambda_min, abs=1e-8 * scale)
        assert spectrum.settings["predicted_seconds"] > 0


KILLED_RUN = """
import os, signal, sys
import torch
from fastsam import files
from fastsam.curvature import CallableOperator, operator_spectrum
from fastsam.curvature.lanczos import checkpoint

torch.set_num_threads(1)
folder, when, where = sys.argv[1], int(sys.argv[2]), sys.argv[3]
matrix = torch.load(f"{folder}/matrix.pt", weights_only=True)
calls = []


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def half_and_die(path, text):
    files.write_atomically(path, lambda file: (file.write(text.encode()[:100]), die()))


def product(rows):
    calls.append(1)
    if len(calls) == when:
        if where == "product":
            die()
        checkpoint.write_text = half_and_die
    return rows @ matrix


operator_spectrum(
    CallableOperator(product, dimension=60, dtype=torch.float32),
    steps=20, probes=2, checkpoint=f"{folder}/run", checkpoint_interval=0,
)
"""


@pytest.mark.parametrize(
    ("when", "where"),
    [
        (7, "write"),
        pytest.param(1, "write", marks=pytest.mark.slow),
        pytest.param(12, "product", marks=pytest.mark.slow),
        pytest.param(20, "write", marks=pytest.mark.slow),
    ],
)
def test_a_process_killed_by_the_system_resumes_to_the_same_bits(tmp_path, when, where):
    matrix = symmetric(60, torch.float32)
    torch.save(matrix, tmp_path / "matrix.pt")
    program = [sys.executable, "-c", KILLED_RUN, str(tmp_path), str(when), where]
    outcome = subprocess.run(program, capture_output=True, text=True, check=False, timeout=120)
    assert outcome.returncode == -signal.SIGKILL, outcome.stderr
    calls = []

    def product(rows: Tensor) -> Tensor:
        calls.append(1)
        return rows @ matrix

    options = {"steps": 20, "probes": 2}
    operator = CallableOperator(product, dimension=60, dtype=torch.float32)
    resumed = operator_spectrum(
        operator, checkpoint=tmp_path / "run", checkpoint_interval=0, **options
    )
    # The killed step is the first to be repeated, after one to verify the operator.
    assert len(calls) == 20 - (when - 1) + (when > 1)
    whole = operator_spectrum(operator, **options)
    assert np.array_equal(resumed.alpha, whole.alpha)
    assert np.array_equal(resumed.beta, whole.beta)


def test_small_batches_are_joined_where_their_graphs_are_held():
    model, (inputs, targets) = mlp((3, 4, 3)), classification(100, 3, 3)
    calls = []
    model.register_forward_hook(lambda module, given, result: calls.append(len(result)))
    data = [(inputs[i : i + 7], targets[i : i + 7]) for i in range(0, 100, 7)]
    options = {"steps": 31, "probes": 2}
    held = spectral_density(model, F.cross_entropy, data, **options)
    assert calls[-1] == 37
    assert 63 in calls  # nine batches of seven, and the rest
    cut = spectral_density(model, F.cross_entropy, data, micro_batch=7, **options)
    assert calls[-1] == 2
    assert held.settings["strategy"] == cut.settings["strategy"] == "kept-graph"
    again = spectral_density(model, F.cross_entropy, data, strategy="rebuild", **options)
    for other in (cut, again):
        assert np.allclose(held.alpha[:, :5], other.alpha[:, :5], atol=1e-9 * held.lambda_max)
        assert held.lambda_max == pytest.approx(other.lambda_max, rel=1e-9)


def test_batches_that_differ_are_not_joined():
    from fastsam.curvature.data import read_batches
    from fastsam.curvature.products.passes import joined

    def sizes(*batches):
        return [len(batch[0]) for batch in joined(read_batches(list(batches)), 10)]

    def batch(count, width=3, dtype=torch.float32):
        return torch.zeros(count, width, dtype=dtype), torch.zeros(count)

    assert sizes(batch(4), batch(4), batch(4), batch(11), batch(2)) == [8, 4, 11, 2]
    assert sizes(batch(4), batch(4, width=2), batch(4, dtype=torch.float64)) == [4, 4, 4]
    assert sizes((torch.zeros(3, 2), torch.zeros(())), batch(3, 2)) == [3, 3]


@pytest.mark.parametrize("probes", [1, 2])
def test_graphs_that_fit_are_kept_also_after_a_resume(tmp_path, probes):
    model, (inputs, targets) = mlp((30, 40, 3)), classification(300, 30, 3)
    data = [(inputs[i : i + 50], targets[i : i + 50]) for i in range(0, 300, 50)]
    options = {"steps": 8, "probes": probes}
    free = spectral_density(model, F.cross_entropy, data, **options)
    basis = probes * 8 * (free.dimension + 15) * 8
    graphs = free.settings["predicted_bytes"] - basis
    limit = basis + 3 * graphs // 4
    kept = {**options, "checkpoint": tmp_path / "run", "checkpoint_interval": 0}
    forward_passes = []
    hook = model.register_forward_hook(lambda *_: forward_passes.append(1))
    tight = spectral_density(model, F.cross_entropy, data, memory_limit=limit, **kept)
    hook.remove()
    assert tight.settings["strategy"] == "mixed"
    rebuilt = (len(forward_passes) - 20) / 8  # set-up and kept graphs: about 20 passes
    assert 1 <= rebuilt <= 4
    scale = free.lambda_max
    assert np.allclose(tight.alpha[:, :5], free.alpha[:, :5], atol=1e-9 * scale)
    # The same call with other limits reads the finished run and reuses its number of kept graphs.
    again = spectral_density(model, F.cross_entropy, data, **kept)
    assert np.array_equal(again.alpha, tight.alpha)
    assert again.settings["strategy"] == "mixed"
