"""Runs that a signal stops save their state at once and continue to the bits of the uninterrupted run."""

from __future__ import annotations

import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from fastsam.curvature import CallableOperator, operator_spectrum, spectral_density
from fastsam.curvature.lanczos import run as runs
from fastsam.curvature.lanczos.checkpoint import LanczosCheckpoint
from fastsam.curvature.operators.model import ModelOperator
from fastsam.stopping import Stopped, StopRequest, stop_signals
from python_tests.curvature.oracles import classification, mlp

MATRIX = torch.randn(60, 60, generator=torch.Generator().manual_seed(3))
OUTLIERS = torch.cat([torch.linspace(-0.1, 0.1, 398), torch.tensor([-3.0, 40.0])]).double()


@pytest.mark.parametrize("reorthogonalize", ["full", "none"])
@pytest.mark.parametrize("stopped_at", [1, 2, 7, 19, 20])
def test_the_state_is_saved_within_the_first_interval(tmp_path, reorthogonalize, stopped_at):
    request = StopRequest()
    calls = []

    def product(rows: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == stopped_at:
            request.signal = "SIGTERM"
        return rows @ (MATRIX + MATRIX.T)

    operator = CallableOperator(product, dimension=60, dtype=torch.float32)
    options = {"steps": 20, "probes": 2, "reorthogonalize": reorthogonalize, "progress": False}
    kept = {**options, "checkpoint": tmp_path / "run", "checkpoint_interval": 1e9}
    if stopped_at < 20:
        with pytest.raises(Stopped, match=rf"SIGTERM after step {stopped_at} of 20.*same call"):
            operator_spectrum(operator, **kept, stop=request)
    else:  # the signal came during the last step
        operator_spectrum(operator, **kept, stop=request)
    resumed = operator_spectrum(operator, **kept, stop=StopRequest())
    assert len(calls) == 21  # no step was repeated but the first, to verify the operator
    whole = operator_spectrum(operator, **options)
    assert np.array_equal(resumed.alpha, whole.alpha)
    assert np.array_equal(resumed.beta, whole.beta)


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("stopped_at", [3, 10, 11, 12])
def test_a_stopped_run_ends_where_it_would_have(tmp_path, monkeypatch, lag, stopped_at):
    class Late(runs.Monitor):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self._lag = lag

    monkeypatch.setattr(runs, "Monitor", Late)
    request = StopRequest()
    calls = []

    def product(rows: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == stopped_at:
            request.signal = "SIGTERM"
        return rows * OUTLIERS

    operator = CallableOperator(product, dimension=400)
    options = {"steps": 50, "tolerance": 1e-8, "progress": False}
    kept = {**options, "checkpoint": tmp_path / "run"}
    if stopped_at < 11 + lag:
        with pytest.raises(Stopped):
            operator_spectrum(operator, **kept, stop=request)
    resumed = operator_spectrum(operator, **kept)
    whole = operator_spectrum(operator, **options)
    assert whole.order.tolist() == [11]
    assert np.array_equal(resumed.alpha, whole.alpha)
    assert np.array_equal(resumed.beta, whole.beta)


def test_a_real_signal_waits_for_the_end_of_the_step(tmp_path):
    finished = []

    def product(rows: Tensor) -> Tensor:
        if len(finished) == 4:
            signal.raise_signal(signal.SIGUSR1)
        finished.append(1)
        return rows * OUTLIERS

    operator = CallableOperator(product, dimension=400)
    options = {"steps": 8, "progress": False, "checkpoint": tmp_path / "run"}
    before = signal.getsignal(signal.SIGUSR1)
    with stop_signals() as stop, pytest.raises(Stopped, match="SIGUSR1 after step 5 of 8"):
        operator_spectrum(operator, **options, stop=stop)
    assert signal.getsignal(signal.SIGUSR1) is before
    assert len(finished) == 5
    operator_spectrum(operator, **options)
    assert len(finished) == 9  # one to verify the operator


def test_without_a_checkpoint_it_says_that_nothing_was_saved():
    request = StopRequest()
    request.signal = "SIGINT"
    operator = CallableOperator(lambda rows: rows * OUTLIERS, dimension=400)
    with pytest.raises(Stopped, match=r"step 1 of 8; nothing was saved without checkpoint=DIR"):
        operator_spectrum(operator, steps=8, stop=request, progress=False)


def test_a_stop_of_one_rank_is_refused():
    with pytest.raises(ValueError, match="stop cannot be combined with shard='samples'"):
        spectral_density(
            mlp((3, 3)),
            F.cross_entropy,
            classification(9, 3, 3),
            shard="samples",
            stop=StopRequest(),
        )


class Noisy(TensorDataset):
    """Images with new noise at every read."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image + torch.randn_like(image), label


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [None, 3])
@pytest.mark.parametrize("stopped_at", [1, 6])
def test_samples_that_change_continue_with_their_next_change(
    tmp_path, monkeypatch, stopped_at, micro_batch
):
    model = mlp((3, 4, 3))
    request = StopRequest()
    calls = []
    product = ModelOperator.matmat

    def counted(self, vectors):
        calls.append(1)
        if len(calls) == stopped_at:
            request.signal = "SIGTERM"
        return product(self, vectors)

    def loader() -> DataLoader:
        torch.manual_seed(5)  # the loader's seed
        return DataLoader(Noisy(*classification(12, 3, 3)), batch_size=4)

    options = {
        "steps": 9,
        "strategy": "rebuild",
        "micro_batch": micro_batch,
        "verify_data": False,
        "progress": False,
    }
    whole = spectral_density(model, F.cross_entropy, loader(), **options)
    monkeypatch.setattr(ModelOperator, "matmat", counted)
    kept = {**options, "checkpoint": tmp_path / "run"}
    with pytest.raises(Stopped):
        spectral_density(model, F.cross_entropy, loader(), **kept, stop=request)
    resumed = spectral_density(model, F.cross_entropy, loader(), **kept)
    assert len(calls) == 10  # one to verify the operator
    assert np.array_equal(resumed.alpha, whole.alpha)
    assert resumed.loss == whole.loss


@pytest.mark.parametrize("reorthogonalize", ["full", "none"])
def test_a_finished_run_keeps_no_vectors(tmp_path, reorthogonalize):
    operator = CallableOperator(lambda rows: rows * OUTLIERS, dimension=400)
    options = {"steps": 9, "reorthogonalize": reorthogonalize, "progress": False}
    kept = {"checkpoint": tmp_path / "run", "checkpoint_interval": 0}
    operator_spectrum(operator, **options, **kept)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["state.json"]


def test_a_removed_run_is_gone(tmp_path):
    operator = CallableOperator(lambda rows: rows * OUTLIERS, dimension=400)
    operator_spectrum(operator, steps=3, checkpoint=tmp_path / "run", progress=False)
    LanczosCheckpoint.remove(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    LanczosCheckpoint.remove(tmp_path / "run")
