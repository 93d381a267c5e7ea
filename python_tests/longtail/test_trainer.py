"""Training runs: differentiated loss, reproducibility, resuming and failures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastsam.longtail import Checkpoint, Result, Trainer, recipe
from fastsam.longtail.build import build_network
from fastsam.longtail.data import Batch, Images, LongTailData, TensorImages, load_digits_lt
from fastsam.longtail.errors import CheckpointError, TrainingError, UsageError
from fastsam.longtail.landscape import landscape
from fastsam.longtail.losses import adjust_logits
from fastsam.longtail.methods import RULES, Method
from fastsam.longtail.optimizers import OPTIMIZERS
from fastsam.longtail.predictions import Predictions
from fastsam.longtail.results import Epoch, best_epoch
from fastsam.longtail.scores import Scorer
from fastsam.longtail.seeds import Stream, torch_generator
from fastsam.longtail.training import RunFolder, Step
from fastsam.longtail.training.evaluation import Judge
from python_tests.longtail.formulas import Numpy, balanced, ce, focal, influence, ldam, nll, vs

DIGITS = load_digits_lt()


def few_images() -> LongTailData:
    """A tenth of digits-lt with every class, for fast runs."""
    train, test = DIGITS.train, DIGITS.test
    assert isinstance(train, TensorImages)
    assert isinstance(test, TensorImages)
    chosen = np.concatenate(
        [
            np.flatnonzero(train.targets == c)[: max(2, int(n) // 5)]
            for c, n in enumerate(DIGITS.counts)
        ]
    )
    return replace(
        DIGITS,
        train=train.select(chosen, augmentation=train.augmentation),
        validation=None,
        test=test.select(np.arange(0, len(test), 20)),
    )


FEW = few_images()
FORMULAS: dict[str, Numpy] = {
    "ce": ce,
    "focal": focal,
    "ldam": ldam,
    "vs": vs,
    "cdt": partial(vs, tau=0.0),
    "la": partial(vs, gamma=0.0),
    "bs": partial(vs, gamma=0.0, tau=1.0),
    "ib": influence,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "focal": {"focal_gamma": 1.7},
    "vs": {"gamma": 0.3, "tau": 1.25},
    "cdt": {"gamma": 0.3},
    "la": {"tau": 1.25},
    "eql": {"eql_threshold": 0.05, "eql_drop": 0.6},
}
SOME_FIRST = [
    name if name in ("sgd", "sam") else pytest.param(name, marks=pytest.mark.slow)
    for name in OPTIMIZERS
]
METHODS = [
    Method(loss, rule).name
    for loss in (*FORMULAS, "eql")  # each loss has its own tests too
    for rule in RULES
    if not (loss == "ib" and rule in ("rw", "drw"))
]


def short(method: str, optimizer: str, **settings: Any) -> Any:
    options = {"epochs": 2, "batch_size": 100, "lr": 0.05, **settings}
    return recipe("digits-lt", method, optimizer, **options).config()


def expected_loss(method: Method, step: Step, *, deferred: bool) -> float:
    """Compute the loss of a step from its logits, features and labels in NumPy."""
    n = FEW.counts.astype(np.float64)
    z, h = step.logits.double().numpy(), step.features.double().numpy()
    targets = FEW.train.targets[step.indices.numpy()]
    assert targets.tolist() == step.targets.tolist()
    name = "ce" if method.loss == "ib" and not deferred else method.loss
    if name == "eql":
        generator = torch_generator(0, Stream.LOSS, step.epoch, step.batch)
        dropped = torch.rand(z.shape, generator=generator).numpy() < 0.6
        rare = n / n.sum() < 0.05
        left = [
            [k for k in range(10) if k == y or not (rare[k] and dropped[i, k])]
            for i, y in enumerate(targets)
        ]
        losses = [nll(z[i][left[i]], left[i].index(y)) for i, y in enumerate(targets)]
    else:
        losses = [FORMULAS[name](z[i], y, n, h[i]) for i, y in enumerate(targets)]
    if name == "ib":
        weights = (1 / n) / (1 / n).sum() * len(n)
        return float(weights[targets] @ losses / len(losses))
    active = method.rule == "rw" or (method.rule == "drw" and deferred)
    weights = balanced(n)[targets] if active else np.ones(len(targets))
    # Recipes of the focal loss divide as in the code of Cao et al. (2019), all others as in torch.
    divisor = len(targets) if name == "focal" else weights.sum()
    return float(weights @ losses / divisor)


@pytest.mark.filterwarnings("ignore:classes are balanced")
@pytest.mark.parametrize("optimizer", SOME_FIRST)
@pytest.mark.parametrize("method", METHODS)
def test_logged_loss_is_the_formula_before_and_after_deferral(method: str, optimizer: str) -> None:
    parsed = Method.parse(method)
    settings = SETTINGS.get(parsed.loss, {})
    if parsed.deferred:
        settings = {**settings, "defer_epoch": 1}
    steps: list[Step] = []
    config = short(method, optimizer, **settings)
    Trainer(config, data=FEW, on_step=steps.append, progress=False).fit()
    for epoch in (1, 2):
        step = next(step for step in steps if step.epoch == epoch)
        deferred = epoch == 2
        assert float(step.loss) == pytest.approx(
            expected_loss(parsed, step, deferred=deferred), rel=2e-5
        )
        resampled = parsed.rule == "rs" or (parsed.rule == "drs" and deferred)
        drawn = np.concatenate([s.indices.numpy() for s in steps if s.epoch == epoch])
        assert len(drawn) == len(FEW.train)
        assert (len(set(drawn)) < len(drawn)) == resampled


def weights_after(config: Any) -> list[torch.Tensor]:
    run = Trainer(config, data=DIGITS, progress=False)
    run.fit()
    return [value.clone() for value in run.model.state_dict().values()]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_same_seed_same_bits_and_no_global_randomness(optimizer: str) -> None:
    numpy_before = np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
    torch_before = torch.random.get_rng_state()
    first = weights_after(short("ce-drw", optimizer))
    assert torch.equal(torch_before, torch.random.get_rng_state())
    assert (numpy_before == np.random.get_state()[1]).all()  # type: ignore[index]
    torch.rand(5)
    second = weights_after(short("ce-drw", optimizer))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    other = weights_after(short("ce-drw", optimizer, seed=1))
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


class StoppedError(Exception):
    """An exception that simulates a killed process."""


def stop_in(epoch: int) -> Callable[[Step], None]:
    def stop(step: Step) -> None:
        if step.epoch == epoch:
            raise StoppedError

    return stop


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_ends_with_the_same_bits(
    optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastsam.longtail.training.saving.EPOCH_SECONDS", 0.0)
    config = short("ldam-drw", optimizer, epochs=4)
    whole = Trainer(config, data=DIGITS, out=tmp_path / "whole", progress=False).fit()
    cut = Trainer(config, data=DIGITS, out=tmp_path / "cut", on_step=stop_in(3), progress=False)
    with pytest.raises(StoppedError):
        cut.fit()
    assert Checkpoint.load(tmp_path / "cut" / "checkpoint.pt").epoch == 2
    again = Trainer(config, data=DIGITS, out=tmp_path / "cut", resume=True, progress=False).fit()
    assert again.test == whole.test
    assert [e.loss for e in again.history] == [e.loss for e in whole.history]
    states = [Checkpoint.load(tmp_path / name).model for name in ("whole", "cut")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_resuming_needs_the_same_settings(tmp_path: Path) -> None:
    Trainer(short("ce", "sgd", epochs=1), data=DIGITS, out=tmp_path, progress=False).fit()
    with pytest.raises(CheckpointError, match=r"lr was 0.05, is now 0.1"):
        Trainer(short("ce", "sgd", epochs=1, lr=0.1), data=DIGITS, out=tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        Trainer(short("ce", "sgd"), data=DIGITS, out=tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()


def test_a_run_knows_its_training_set(tmp_path: Path) -> None:
    config = short("ce", "sgd", epochs=1)
    Trainer(config, data=FEW, out=tmp_path, progress=False).fit()
    checkpoint = Checkpoint.load(tmp_path)
    checkpoint.check_data(FEW)
    older = replace(checkpoint, contents={})
    older.check_data(FEW)
    with pytest.raises(
        CheckpointError, match=r"has changed since this run: SHA-256 was \w+, is fff"
    ):
        older.check_data(replace(FEW, subset_hash="f" * 64))
    other = replace(FEW, test=FEW.train)
    with pytest.raises(CheckpointError, match=r"the test images of digits-lt have changed"):
        Trainer(config, data=other, out=tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="have changed since this run"):
        landscape(checkpoint.build_model(), other, checkpoint, [0], steps=1, progress=False)


def test_results_on_disk_and_folders_in_the_way(tmp_path: Path) -> None:
    config = short("ce-drw", "sam", epochs=1)
    result = Trainer(config, data=DIGITS, out=tmp_path, progress=False).fit()
    folder = RunFolder(tmp_path)
    assert Result.from_json(folder.result.read_text()) == result
    assert len(folder.history.read_text().splitlines()) == 2
    lines = folder.per_class.read_text().splitlines()
    assert lines[0] == "class,name,group,training_images,test_accuracy"
    assert lines[10].startswith("9,9,tail,2,")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UsageError, match="not empty"):
        Trainer(config, data=DIGITS, out=tmp_path)
    with pytest.raises(UsageError, match="one of"):
        Trainer(config, data=DIGITS, out=tmp_path, resume=True, overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(UsageError, match="is a file"):
        Trainer(config, data=DIGITS, out=folder.result)
    assert result.seconds == sum(record.seconds for record in result.history)
    (tmp_path / "notes.txt").write_text("mine")
    # Spectra of the replaced weights are deleted too; those of runs in subfolders are not.
    spectra = [tmp_path / "class-0-a.json", tmp_path / "spectra" / "class-0-a.json"]
    others = tmp_path / "another-run" / "class-0-a.json"
    for file in (*spectra, others):
        file.parent.mkdir(exist_ok=True)
        file.write_text("old")
    Trainer(config, data=DIGITS, out=tmp_path, overwrite=True, progress=False).fit()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not any(file.exists() for file in spectra)
    assert others.exists()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_loss_that_is_not_finite_stops_the_run(optimizer: str, tmp_path: Path) -> None:
    config = short("ce", optimizer, lr=1e30, warmup_epochs=0)
    with pytest.raises(
        TrainingError,
        match=r"((loss|gradients) .* epoch [12]|outputs are infinite).* lower learning rate",
    ):
        Trainer(config, data=DIGITS, out=tmp_path, progress=False).fit()
    assert list(tmp_path.iterdir()) == []


def test_best_epoch_is_chosen_on_validation_and_labeled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = short("ce", "sgd", epochs=4, select="best-validation")
    wrong = iter([90, 40, 40, 80])
    judge = Judge.predictions

    def made(self: Judge, images: Images) -> Predictions:
        share = next(wrong, None)
        if share is None:
            return judge(self, images)
        classes = (torch.arange(100) < share).long()
        return Predictions.of(torch.eye(2)[classes], torch.zeros(100, dtype=torch.int64))

    monkeypatch.setattr(Judge, "predictions", made)
    run = Trainer(config, data=DIGITS, out=tmp_path, progress=False)
    result = run.fit()
    assert result.rule == "best epoch on validation (2)"
    last = Checkpoint.load(tmp_path)
    assert last.best is not None
    final = run.model.state_dict()
    assert all(torch.equal(final[name], value) for name, value in last.best.items())
    assert any(not torch.equal(last.model[name], value) for name, value in last.best.items())
    resumed = Trainer(config, data=DIGITS, out=tmp_path, resume=True, progress=False).fit()
    assert resumed.test == result.test
    assert (
        Trainer(short("ce", "sgd", epochs=1), data=FEW, progress=False).fit().rule == "last epoch"
    )
    with pytest.raises(UsageError, match="requires a validation set"):
        Trainer(config, data=FEW)


def test_the_best_epoch_has_the_highest_balanced_accuracy() -> None:
    targets = torch.tensor([0] * 8 + [1] * 2 + [3] * 2)
    guesses = {  # 8 of 12 right in one class of three; 6 of 12, with two whole classes and a quarter
        1: torch.tensor([0] * 12),
        2: torch.tensor([0] * 2 + [1] * 6 + [1] * 2 + [3] * 2),
    }
    history = []
    for epoch, classes in guesses.items():
        found = Predictions.of(torch.eye(5)[classes], targets)
        scores = Scorer(found, 5).scores()
        assert found.accuracy == pytest.approx(scores["accuracy"])
        assert found.balanced_accuracy == pytest.approx(scores["balanced"])
        history.append(
            Epoch(
                epoch=epoch,
                lr=0.1,
                rho=None,
                loss=1.0,
                train_accuracy=50.0,
                validation_accuracy=found.accuracy,
                validation_balanced=found.balanced_accuracy,
                seconds=1.0,
            )
        )
    unseen = replace(history[0], epoch=3, validation_accuracy=None, validation_balanced=None)
    assert best_epoch([*history, unseen]) == 2
    assert best_epoch([replace(unseen, epoch=1), replace(unseen, epoch=2)]) == 1
    older = replace(history[1], validation_balanced=None)  # of a version that did not record it
    assert best_epoch([history[0], older, unseen]) == 1


def test_post_hoc_adjustment_reaches_the_metrics_only() -> None:
    plain, adjusted = (
        Trainer(short("ce", "sgd", epochs=6, posthoc_tau=tau), data=DIGITS, progress=False)
        for tau in (0.0, 1.0)
    )
    first, second = plain.fit(), adjusted.fit()
    states = (plain.model.state_dict(), adjusted.model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    logits, targets = logits_of(plain, DIGITS.test)
    guess = adjust_logits(logits, DIGITS.counts, 1.0).argmax(dim=1)
    assert second.test.accuracy == pytest.approx(100 * float((guess == targets).double().mean()))
    assert second.test.confusion != first.test.confusion
    # Epoch selection and evaluation use the same predictions.
    assert second.validation is not None
    assert second.history[-1].validation_accuracy == second.validation.accuracy
    assert second.history[-1].validation_accuracy != first.history[-1].validation_accuracy


def logits_of(run: Trainer, images: Images) -> tuple[torch.Tensor, torch.Tensor]:
    """Return predictions of the network of ``run`` for all ``images``, and the true classes."""
    order = [np.arange(len(images))]
    (batch,) = images.batches(order, None, torch.device("cpu"))
    with torch.no_grad():
        return run.model.eval()(batch.inputs), batch.targets


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_cosine_logits_are_scaled_as_in_the_loss(tau: float) -> None:
    run = Trainer(short("ldam", "sgd", posthoc_tau=tau, scale=20.0), data=DIGITS, progress=False)
    result = run.fit()
    cosines, targets = logits_of(run, DIGITS.test)
    assert cosines.abs().max() <= 1.0001
    log_prior = np.log(DIGITS.counts / DIGITS.counts.sum())
    logits = 20 * cosines.double().numpy() - tau * log_prior
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    confidence = (shares / shares.sum(axis=1, keepdims=True)).max(axis=1)
    right = logits.argmax(axis=1) == targets.numpy()
    assert result.test.accuracy == pytest.approx(100 * right.mean())
    bins = np.minimum((confidence * 15).astype(int), 14)
    error = sum(abs((right - confidence)[bins == b].sum()) for b in range(15)) / len(right)
    assert result.test.ece == pytest.approx(100 * error, abs=0.3)


@pytest.mark.parametrize("optimizer", ["sam", "looksam"])
def test_skipped_updates_are_counted(optimizer: str) -> None:
    extra = {"look_every": 1} if optimizer == "looksam" else {}
    config = short("ce", optimizer, batch_size=40, **extra)
    run = Trainer(config, data=DIGITS, progress=False)
    passes = 0

    def spoil(grad: torch.Tensor) -> torch.Tensor:
        nonlocal passes
        passes += 1
        return grad * float("inf") if passes in (2, 4) else grad

    run.model.head.weight.register_hook(spoil)
    history = run.fit().history
    assert [record.skipped for record in history] == [2, 0]
    run = Trainer(short("ce", "sam", rho=1e38), data=DIGITS, progress=False)
    with pytest.raises(TrainingError, match=r"infinite or NaN in (\d+) of \1 steps in epoch 1"):
        run.fit()


@pytest.mark.parametrize("optimizer", ["sam", "asam", "looksam"])
def test_a_skipped_step_says_nothing_of_the_loss(optimizer: str) -> None:
    """The second batch has NaN, in a plain step of LookSAM."""
    run = Trainer(short("ce", optimizer, epochs=1), data=DIGITS, progress=False)
    losses: list[float] = []

    def spoil(step: Step) -> None:
        losses.append(float(step.loss))
        with torch.no_grad():
            bad = float("nan") if step.batch == 0 else 0.0
            run.model.head.bias.fill_(bad)

    run.on_step = spoil
    (record,) = run.fit().history
    assert sum(not np.isfinite(loss) for loss in losses) == 1
    sizes = [min(100, len(DIGITS.train) - 100 * batch) for batch in range(len(losses))]
    known = [(loss, size) for loss, size in zip(losses, sizes, strict=True) if np.isfinite(loss)]
    expected = sum(loss * size for loss, size in known) / sum(size for _, size in known)
    assert record.loss == pytest.approx(expected)
    assert record.skipped == 1


@pytest.mark.parametrize("optimizer", ["sgd", "pgd", "lpf-sgd", "entropy-sgd"])
def test_a_loss_that_is_not_finite_stops_a_run_that_skips_nothing(optimizer: str) -> None:
    run = Trainer(short("ce", optimizer, epochs=2), data=DIGITS, progress=False)

    def spoil(step: Step) -> None:
        with torch.no_grad():
            run.model.head.bias.fill_(float("nan"))

    run.on_step = spoil
    # Entropy-SGD reports the loss of its first pass, so the weights become NaN before the loss.
    with pytest.raises(
        TrainingError, match=r"the loss is nan in epoch [12]|infinite or NaN after epoch 1"
    ):
        run.fit()


@pytest.mark.parametrize("optimizer", ["sgd", "sam"])
@pytest.mark.parametrize("method", ["ce-drw", "ldam", "vs", "ib"])
def test_bfloat16_rounds_the_features_and_nothing_else(method: str, optimizer: str) -> None:
    steps: dict[str, list[Step]] = {"float32": [], "bfloat16": []}
    for precision, seen in steps.items():
        config = short(method, optimizer, precision=precision, epochs=1)
        run = Trainer(config, data=FEW, on_step=seen.append, progress=False)
        run.fit()
        assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    plain, rounded = (seen[0] for seen in steps.values())
    assert rounded.logits.dtype == torch.float32
    assert not torch.equal(rounded.logits, plain.logits)
    assert rounded.loss.dtype == torch.float32
    assert float(rounded.loss) != float(plain.loss)
    assert float(rounded.loss) == pytest.approx(float(plain.loss), rel=0.05)
    with pytest.raises(UsageError, match="valid: float32, bfloat16, float16, auto"):
        short("ce", "sgd", precision="float64")


@pytest.mark.parametrize("optimizer", ["sgd", "sam"])
def test_channels_last_is_another_order_of_the_same_training(
    optimizer: str, tmp_path: Path
) -> None:
    plain, ordered = (
        Trainer(
            short("ce", optimizer, channels_last=value, epochs=2),
            data=FEW,
            out=tmp_path / str(value),
            progress=False,
        )
        for value in (False, True)
    )
    plain.fit()
    ordered.fit()
    together = torch.channels_last
    for one, other in zip(plain.model.parameters(), ordered.model.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-4)
        assert other.dim() != 4 or other.is_contiguous(memory_format=together)
    filters = [p for p in ordered.model.parameters() if p.dim() == 4 and min(p.shape[1:]) > 1]
    assert filters
    assert not any(p.is_contiguous() for p in filters)
    again = Trainer(ordered.config, data=FEW, out=tmp_path / "True", resume=True, progress=False)
    for one, other in zip(ordered.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()
    with pytest.raises(CheckpointError, match="channels_last was True, is now False"):
        Trainer(plain.config, data=FEW, out=tmp_path / "True", resume=True)


def test_epochs_are_kept_beside_the_last(tmp_path: Path) -> None:
    config = short("ce", "sam", epochs=3)
    Trainer(config, data=FEW, out=tmp_path, keep=(1, 3), progress=False).fit()
    kept = {path.name: Checkpoint.load(path).epoch for path in tmp_path.glob("*.pt")}
    assert kept == {"checkpoint.pt": 3, "epoch-1.pt": 1, "epoch-3.pt": 3}
    with pytest.raises(UsageError, match=r"1 to 3, got \[4\]"):
        Trainer(config, data=FEW, out=tmp_path / "b", keep=(4,))
    with pytest.raises(CheckpointError, match="past epoch 2 but has no checkpoint"):
        Trainer(config, data=FEW, out=tmp_path, keep=(2,), resume=True)
    Trainer(config, data=FEW, out=tmp_path, overwrite=True, progress=False).fit()
    assert not (tmp_path / "epoch-1.pt").exists()


def test_unknown_device() -> None:
    with pytest.raises(UsageError, match="only on cpu and cuda"):
        Trainer(short("ce", "sgd", device="mps"), data=DIGITS)
    for name in ("gpu0", "meta"):
        with pytest.raises(UsageError, match="valid: cpu, cuda"):
            Trainer(short("ce", "sgd", device=name), data=DIGITS)
    with pytest.raises(UsageError, match=r"no usable NVIDIA GPU|cuda:99 does not exist"):
        Trainer(short("ce", "sgd", device="cuda:99"), data=DIGITS)


def test_schedule_reaches_the_optimizer() -> None:
    settings = {"lr_milestones": (1,), "lr_factors": (0.01,)}
    config = short("ce", "sam", rho=(0.1, 0.3), rho_schedule="linear", **settings)
    history = Trainer(config, data=DIGITS, progress=False).fit().history
    assert [record.rho for record in history] == [0.1, 0.3]
    assert [record.lr for record in history] == [0.05, 0.05 * 0.01]


def test_second_pass_leaves_the_running_statistics_alone() -> None:
    run = Trainer(short("ce", "sam"), data=DIGITS)
    norm = next(m for m in run.model.train().modules() if isinstance(m, torch.nn.BatchNorm2d))
    means = []

    def remember(*_: object) -> None:
        assert norm.running_mean is not None
        means.append(norm.running_mean.clone())

    norm.register_forward_hook(remember)
    batch = Batch((torch.randn(8, 1, 8, 8),), torch.arange(8), torch.arange(8))
    (seen,) = run.stepper.steps([batch], epoch=1)
    assert len(seen) == 1
    assert len(means) == 2
    assert torch.equal(means[0], means[1])
    assert norm.num_batches_tracked == 1
    assert norm.track_running_stats


def test_threads_are_as_before() -> None:
    before = torch.get_num_threads()
    weights_after(short("ce", "sgd", epochs=1, threads=1))
    assert torch.get_num_threads() == before


def test_autocast_does_not_round_the_head() -> None:
    """Cosines in bfloat16 tie, and the lowest label, the most frequent class, wins ties."""
    network = build_network(short("ldam", "sgd", precision="bfloat16"), 10, 1).eval()
    inputs = torch.rand(40, 1, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = network.features(inputs)
        logits = network(inputs)
        both = network.outputs(inputs)
    assert features.dtype == torch.bfloat16
    expected = network.head(features.float())
    assert torch.equal(logits, expected)
    assert torch.equal(both.logits, expected)
