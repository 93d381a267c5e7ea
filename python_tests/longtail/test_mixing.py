"""Mixed batches, their loss, and runs with mixers, compared with the formulas written out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastsam.distributed import World
from fastsam.longtail import TrainConfig, Trainer, recipe
from fastsam.longtail.build import build_objective
from fastsam.longtail.data import Batch, Draw, load_digits_lt
from fastsam.longtail.data.files import FileImages, Preparation
from fastsam.longtail.data.lists import ImageList
from fastsam.longtail.errors import DataError, UsageError
from fastsam.longtail.losses import LOSSES, CrossEntropyLoss, Loss, inverse_frequency_weights
from fastsam.longtail.mixers import PastedBox, random_box
from fastsam.longtail.models import Outputs
from fastsam.longtail.objective import Term
from fastsam.longtail.samplers import FixedSharesSampler
from fastsam.longtail.seeds import Stream, derived_seed, numpy_generator
from fastsam.longtail.training.batches import EpochBatches
from python_tests.longtail.formulas import balanced, nll
from python_tests.longtail.test_trainer import FEW, short

CPU = torch.device("cpu")
DIGITS = load_digits_lt()
EVERY_EPOCH = {"cmo_skip_first": 0, "cmo_skip_last": 0, "cmo_probability": 1.0}
OPTIONS: dict[str, dict[str, Any]] = {
    "mixup": {},
    "cutmix": {"cutmix_probability": 1.0},
    "cmo": EVERY_EPOCH,
}


def config_of(mixer: str, **options: Any) -> TrainConfig:
    given = {"epochs": 3, "batch_size": 64, **OPTIONS.get(mixer, {}), **options}
    return recipe("digits-lt", "ce", "sgd", mixer=mixer, **given).config()


def batches_of(config: TrainConfig, world: World = World()) -> EpochBatches:  # noqa: B008
    return EpochBatches.of_run(config, DIGITS, 1, CPU, world)


def clean(indices: NDArray[np.int64]) -> Tensor:
    """Return images of the training set, in order."""
    return next(iter(DIGITS.train.batches([indices], None, CPU))).inputs


def official_box(random: np.random.Generator, lam: float, side: int) -> tuple[int, int, int, int]:
    """Return rows and columns of a box, by the steps of the codes of CutMix and CMO."""
    cut = int(side * np.sqrt(1.0 - lam))
    row, column = random.integers(side), random.integers(side)
    return tuple(  # type: ignore[return-value]
        int(np.clip(place, 0, side))
        for center in (row, column)
        for place in (center - cut // 2, center + cut // 2)
    )


@pytest.mark.parametrize("mixer", OPTIONS)
def test_a_mixed_batch_is_the_mixture_written_out(mixer: str) -> None:
    config = config_of(mixer, augment=False)
    found = list(batches_of(config).read(2))
    order = np.split(batches_of(config_of("none")).sampler.order(2), range(64, 276, 64))
    other = FixedSharesSampler(
        DIGITS.train.targets,
        DIGITS.counts,
        shares=np.full(10, 0.1),
        seed=derived_seed(0, Stream.MIX),
    ).order(2)
    areas = set()
    for number, (batch, rows) in enumerate(zip(found, order, strict=True)):
        random = numpy_generator(0, Stream.MIX, 2, number)
        if mixer != "mixup":
            assert random.random() < 1
        if mixer == "cmo":
            partners = other[64 * number : 64 * number + len(rows)]
        else:
            partners = rows[random.permutation(len(rows))]
        share = random.beta(1.0, 1.0)
        first, second = clean(rows), clean(partners)
        if mixer == "mixup":
            expected = share * first + (1 - share) * second
        else:
            top, bottom, left, right = official_box(random, share, 8)
            expected = first.clone()
            expected[:, :, top:bottom, left:right] = second[:, :, top:bottom, left:right]
            share = 1 - (bottom - top) * (right - left) / 64
            areas.add(share)
        assert torch.allclose(batch.inputs, expected, atol=1e-6)
        assert batch.targets.tolist() == DIGITS.train.targets[rows].tolist()
        assert batch.second is not None
        assert batch.second.tolist() == DIGITS.train.targets[partners].tolist()
        assert batch.share is not None
        assert batch.share.tolist() == pytest.approx([share] * len(rows), abs=1e-7)
    assert mixer == "mixup" or len(areas) > 1


def test_boxes_are_clipped_and_their_share_is_the_exact_area(seed: int) -> None:
    for number in range(200):
        random = np.random.default_rng([seed, number])
        outside = float(random.random())
        box = random_box(outside, (12, 7), random)
        inside = torch.zeros(12, 7)
        inside[box.rows, box.columns] = 1
        assert box.area(12, 7) == pytest.approx(float(inside.mean()), abs=1e-7)
        assert box.area(12, 7) <= 1 - outside + 1e-9
    assert random_box(1.0, (8, 8), np.random.default_rng(0)).area(8, 8) == 0
    assert PastedBox(slice(0, 3), slice(2, 9)).area(4, 7) == pytest.approx(15 / 28)


def test_foregrounds_of_cmo_are_class_balanced_and_some_batches_stay_as_they_are() -> None:
    config = config_of("cmo", epochs=12, batch_size=8, cmo_skip_first=4, cmo_skip_last=3)
    batches = batches_of(config.replace(cmo_probability=0.5))
    mixed = {epoch: [b.second for b in batches.read(epoch)] for epoch in range(1, 13)}
    for epoch, seconds in mixed.items():
        share = np.mean([second is not None for second in seconds])
        assert share == 0 if epoch in (1, 2, 3, 4, 10, 11, 12) else 0.2 < share < 0.8, epoch
    labels = torch.cat([s for seconds in mixed.values() for s in seconds if s is not None])
    assert len(labels) > 500
    assert labels.bincount(minlength=10).min() > 0.05 * len(labels)  # the rarest class has 2 %
    assert DIGITS.counts.min() < 0.05 * DIGITS.counts.sum()


@pytest.mark.parametrize(
    ("mixer", "power", "expected"), [("cmo", 1.0, 1 / 3), ("cmo", 0.0, 10 / 15)]
)
def test_shares_of_the_second_stream(mixer: str, power: float, expected: float) -> None:
    config = config_of(mixer, cmo_power=power)
    from fastsam.longtail.build import build_mixer

    built = build_mixer(config, np.array([10, 4, 1, 0]))
    assert built is not None
    assert built.class_shares is not None
    assert built.class_shares[0] == pytest.approx(expected)
    assert built.class_shares[3] == 0
    assert built.class_shares.sum() == pytest.approx(1)


def mixed_batch(size: int, shares: Tensor, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    targets, second = torch.randint(10, (2, size), generator=generator)
    return Batch((torch.zeros(size, 1),), targets, torch.arange(size), None, second, shares)


@pytest.mark.parametrize("method", ["ce", "ce-drw", "focal-rw", "ldam-drw", "vs", "ib", "las"])
@pytest.mark.parametrize("several", [False, True], ids=["one share", "a share of each image"])
def test_the_loss_is_the_mixture_of_both_losses(method: str, several: bool, seed: int) -> None:
    config = short(method, "sgd", **({"defer_epoch": 1} if method.endswith(("drw", "ib")) else {}))
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(12 if several else 1, generator=generator, dtype=torch.float64).expand(12)
    batch = mixed_batch(12, shares, seed)
    logits = torch.randn(12, 10, generator=generator, dtype=torch.float64, requires_grad=True)
    features = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    objective = build_objective(config, DIGITS.counts)
    none: Any = None
    total = objective.loss(
        Outputs(features, logits), batch, none, epoch=2, prepared=[None] * len(objective.at(2))
    )
    ((term, _),) = objective.at(2)
    expected = torch.zeros((), dtype=torch.float64)
    for targets, part in ((batch.targets, shares), (batch.second, 1 - shares)):
        losses = term.per_sample(logits, targets, features)  # type: ignore[operator]
        weights = torch.ones(12, dtype=torch.float64)
        if "-" in method:
            weights = torch.from_numpy(balanced(DIGITS.counts.astype(np.float64)))[targets]
        if method == "ib":
            weights = inverse_frequency_weights(DIGITS.counts)[targets]
        mean_over_samples = method in ("focal-rw", "ib")
        divisor = 12 if mean_over_samples else weights.sum()
        expected = expected + (part * weights * losses).sum() / divisor
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-10)
    (one,) = torch.autograd.grad(total, logits)
    (other,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_cross_entropy_of_a_mixed_batch_in_numpy(seed: int) -> None:
    batch = mixed_batch(6, torch.full((6,), 0.3, dtype=torch.float64), seed)
    z = torch.randn(6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert batch.second is not None
    expected = np.mean(
        [
            0.3 * nll(row, int(a)) + 0.7 * nll(row, int(b))
            for row, a, b in zip(z.numpy(), batch.targets, batch.second, strict=True)
        ]
    )
    none: Any = None
    objective = build_objective(config_of("none"), DIGITS.counts)
    found = objective.loss(Outputs(z, z), batch, none, epoch=1, prepared=[None])
    assert float(found) == pytest.approx(float(expected), rel=1e-10)


def test_parts_and_rows_of_a_batch_keep_classes_and_shares() -> None:
    batch = mixed_batch(7, torch.arange(7) / 10, 0)._replace(fewest=6)
    taken = batch.take(torch.tensor([4, 0, 4]))
    assert taken.share is not None
    assert taken.second is not None
    assert taken.share.tolist() == pytest.approx([0.4, 0.0, 0.4])
    assert taken.second.tolist() == [int(batch.second[row]) for row in (4, 0, 4)]  # type: ignore[index]
    parts = [batch.part(number, 3) for number in range(3)]
    assert torch.equal(torch.cat([part.share for part in parts]), batch.share)  # type: ignore[misc]
    assert torch.equal(torch.cat([part.second for part in parts]), batch.second)  # type: ignore[misc]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("mixer", OPTIONS)
def test_ranks_and_resumed_epochs_mix_alike(mixer: str, ranks: int) -> None:
    config = config_of(mixer, batch_size=50)
    alone = list(batches_of(config).read(2))
    read = [list(batches_of(config, World(rank, ranks)).read(2)) for rank in range(ranks)]
    for number, batch in enumerate(alone):
        for rank, parts in enumerate(read):
            part = parts[number]
            for whole, own in zip(batch[1:], part[1:], strict=True):
                if isinstance(whole, Tensor):
                    assert torch.equal(whole[rank::ranks], own)
            assert torch.equal(batch.inputs[rank::ranks], part.inputs)
    later = list(batches_of(config).read(2, start=2))
    for one, other in zip(alone[2:], later, strict=True):
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.share, other.share)  # type: ignore[arg-type]


class Lossy:
    """Training images some of which cannot be read any more."""

    def __init__(self, images: Any, lost: Sequence[int]) -> None:
        self.images = images
        self.lost = lost
        self.targets = images.targets

    def batches(
        self,
        order: Sequence[NDArray[np.int64]],
        draw: Draw | None,
        device: torch.device,
        *,
        may_be_empty: bool = False,
    ) -> Iterator[Batch]:
        for asked, batch in zip(order, self.images.batches(order, draw, device), strict=True):
            left = np.flatnonzero(~np.isin(asked, self.lost))
            if not len(left) and not may_be_empty:
                raise DataError("no image of a batch can be read")  # like images in files
            yield batch.take(torch.from_numpy(left))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("mixer", ["mixup", "cmo"])
def test_an_image_whose_partner_is_lost_is_its_own_partner(mixer: str, ranks: int) -> None:
    lost = np.arange(0, 276, 9)
    config = config_of(mixer, augment=False)
    for rank in range(ranks):
        whole = batches_of(config, World(rank, ranks))
        images: Any = Lossy(DIGITS.train, lost)
        expected = list(whole.read(1))
        found = list(replace(whole, images=images).read(1))
        alone = 0
        for before, after in zip(expected, found, strict=True):
            kept = torch.from_numpy(~np.isin(before.indices.numpy(), lost))
            assert after.indices.tolist() == before.indices[kept].tolist()
            assert torch.equal(after.share, before.share[kept])  # type: ignore[index,arg-type]
            same = (after.inputs == before.inputs[kept]).flatten(1).all(dim=1)
            unmixed = clean(after.indices.numpy())
            for row in (~same).nonzero().flatten().tolist():
                assert torch.allclose(after.inputs[row], unmixed[row], atol=1e-5)
                assert after.second[row] == after.targets[row]  # type: ignore[index]
                alone += 1
        assert alone > 0


def write_images(folder: Path, count: int) -> FileImages:
    random = np.random.default_rng(0)
    for number in range(count):
        pixels = random.integers(0, 256, (24, 24, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    names = [f"{number}.png" for number in range(count)]
    return FileImages(folder, ImageList(names, np.arange(count) % 3), Preparation(17))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("mixer", ["mixup", "cmo"])
def test_any_number_of_workers_mixes_alike_and_they_are_kept(mixer: str, tmp_path: Path) -> None:
    images = write_images(tmp_path, 21)
    data: Any = replace(DIGITS, train=images)
    config = config_of(mixer, batch_size=6)
    expected: list[Batch] = []
    for workers in (0, 2, 4):
        run = replace(data, train=replace(images, workers=workers))
        batches = EpochBatches.of_run(config, run, 1, CPU, World())
        found = [batch for epoch in (1, 2) for batch in batches.read(epoch)]
        expected = expected or found
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one.inputs, other.inputs)
            assert torch.equal(one.second, other.second)  # type: ignore[arg-type]
        idle = run.train._workers._idle[False]
        assert len(idle) == (2 if mixer == "cmo" else 1)  # one for each stream
        run.train.close()


@pytest.mark.parametrize("mixer", OPTIONS)
def test_both_passes_of_sam_see_the_same_mixed_batch(mixer: str) -> None:
    config = short("ce", "sam", epochs=1, mixer=mixer, **OPTIONS[mixer])
    run = Trainer(config, data=FEW, progress=False)
    seen: list[Tensor] = []
    run.model.features.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    expected = [batch.inputs for batch in run.batches.read(1)]
    run.model.train()
    for _ in run.stepper.steps(run.batches.read(1), epoch=1):
        pass
    assert len(seen) == 2 * len(expected)
    for number, inputs in enumerate(expected):
        assert torch.equal(seen[2 * number], inputs)
        assert torch.equal(seen[2 * number + 1], inputs)


def test_micro_batches_and_ascent_samples_of_mixed_batches() -> None:
    losses = []
    for options in ({}, {"accumulate": 3}, {"ascent_share": 0.5}):
        config = short("ce-drw", "sam", defer_epoch=1, mixer="mixup", **options)
        config = config.replace(model="resnet8")
        run = Trainer(config, data=FEW, progress=False)
        run.model.eval()  # micro-batches have other batch statistics
        (step, *_) = next(run.stepper.steps(run.batches.read(2), epoch=2))
        assert step.second is not None
        losses.append(float(step.loss))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] != losses[0]  # at the perturbed weights
    assert losses[2] == pytest.approx(losses[0], rel=0.5)


def test_training_accuracy_counts_the_shares_of_the_predicted_class() -> None:
    right = images = 0.0

    def on_step(step: Any) -> None:
        nonlocal right, images
        rows = zip(step.logits.argmax(1), step.targets, step.second, step.share, strict=True)
        right += sum(float(c * (p == a) + (1 - c) * (p == b)) for p, a, b, c in rows)
        images += len(step.targets)

    config = short("ce", "sgd", epochs=1, mixer="mixup")
    result = Trainer(config, data=FEW, progress=False, on_step=on_step).fit()
    assert result.history[0].train_accuracy == pytest.approx(100 * right / images, rel=1e-6)


class Alone(Term):
    """A term that knows nothing of mixed images."""


@pytest.mark.parametrize(
    ("method", "optimizer", "options", "message"),
    [
        ("lade", "sgd", {}, "compares the images of a batch with each other; choose another"),
        ("paco", "sgd", {}, "compares 2 views of each image"),
        (
            "ce-rw",
            "sam",
            {"ascent_share": 0.5, "ascent_sample": "weighted"},
            "ascent_sample 'weighted' samples images by the weight of their class",
        ),
        ("alone", "sgd", {}, "does not multiply the loss of each image by Given.shares"),
        ("ce", "sgd", {"mixer": "mixupp"}, "did you mean 'mixup'"),
        (
            "ce",
            "sgd",
            {"cmo_alpha": 1.0},
            "cmo_alpha requires mixer cmo, but the run has mixer mix",
        ),
        (
            "ce",
            "sgd",
            {"mixer": "cmo", "cmo_skip_last": 2},
            r"less than epochs \(2\), got .* and 2",
        ),
    ],
)
def test_a_mixer_that_does_not_fit_is_refused(
    method: str, optimizer: str, options: dict[str, Any], message: str
) -> None:
    LOSSES.add(Loss(name="alone", build=lambda settings, classes: Alone(), summary="a test"))
    try:
        with pytest.raises(UsageError, match=message):
            short(method, optimizer, **{"mixer": "mixup", **options})
    finally:
        del LOSSES._parts["alone"]


def test_settings_stored_before_there_were_mixers() -> None:
    config = short("ce", "sgd")
    stored = config.as_dict()
    assert stored.pop("mixer") == "none"
    assert stored.pop("label_smoothing") == 0
    assert TrainConfig.from_dict(stored) == config


def test_published_values_of_mixers() -> None:
    assert recipe("imagenet-lt", "ce", "sgd", mixer="mixup").config().mixup_alpha == 0.2
    assert recipe("cifar100-lt", "ce", "sgd", mixer="mixup").config().mixup_alpha == 1.0
    cmo = recipe("cifar100-lt", "ce-drw", "sgd", mixer="cmo").config()
    assert (cmo.cmo_probability, cmo.cmo_skip_first, cmo.cmo_skip_last) == (0.5, 4, 3)


# Stage two of the configurations in dvlab-research/MiSLAS.
SMOOTHING = {
    ("cifar10-lt", 100): (0.3, 0.0),
    ("cifar10-lt", 50): (0.2, 0.0),
    ("cifar10-lt", 10): (0.1, 0.0),
    ("cifar100-lt", 100): (0.4, 0.1),
    ("cifar100-lt", 50): (0.3, 0.0),
    ("cifar100-lt", 10): (0.2, 0.0),
    ("imagenet-lt", None): (0.3, 0.0),
    ("inaturalist18", None): (0.3, 0.0),
    ("places-lt", None): (0.4, 0.1),
}


def test_published_smoothing_belongs_to_an_imbalance_factor() -> None:
    found, sources = {}, {}
    for data, imbalance in [*SMOOTHING, ("cifar100-lt", 20), ("digits-lt", 100)]:
        given = {} if imbalance is None else {"imbalance": float(imbalance)}
        las = recipe(data, "las-rs", "sgd", **given)
        config = las.config()
        assert config.las_shape == "concave"
        found[data, imbalance] = (config.las_head, config.las_tail)
        sources[data, imbalance] = las.sources["las_head"]
    others = {("cifar100-lt", 20), ("digits-lt", 100)}
    assert found == {**SMOOTHING, **dict.fromkeys(others, (0.3, 0.0))}
    assert {key for key in sources if "not a published value" in sources[key]} == others
    assert recipe("cifar100-lt", "las", "sgd", recipe="long").config().las_tail == 0.1


def test_label_smoothing_is_a_setting_of_cross_entropy() -> None:
    config = short("ce", "sgd", label_smoothing=0.1)
    ((term, _),) = build_objective(config, DIGITS.counts).at(1)
    assert isinstance(term, CrossEntropyLoss)
    assert term.smoothing == 0.1
    with pytest.raises(UsageError, match="label_smoothing requires loss ce"):
        short("focal", "sgd", label_smoothing=0.1)


def test_a_mixer_that_does_not_fit_the_early_loss_is_refused() -> None:
    LOSSES.add(Loss(name="alone", build=lambda settings, classes: Alone(), summary="a test"))
    late = replace(LOSSES["ib"], name="late", early="alone")
    LOSSES.add(late)
    try:
        with pytest.raises(UsageError, match=r"does not multiply the loss of each image"):
            short("late", "sgd", mixer="mixup", defer_epoch=1)
    finally:
        del LOSSES._parts["alone"], LOSSES._parts["late"]


def test_a_lost_partner_that_is_read_alone_does_not_stop_the_run(tmp_path: Path) -> None:
    images = replace(write_images(tmp_path, 21), corrupt="skip")
    data: Any = replace(DIGITS, train=images)
    config = config_of("mixup", batch_size=6, augment=False)
    batches = EpochBatches.of_run(config, data, 1, CPU, World(0, 2))
    expected = list(batches.read(1))
    (plan, *_) = batches._plans(1, batches.sampler.order(1), 0)
    assert plan is not None
    partners = plan.partners[plan.missing]
    assert len(partners) > 0
    for place in partners.tolist():
        (tmp_path / f"{place}.png").unlink()
    found = next(iter(batches.read(1)))
    rows = [list(plan._own).index(place) for place in plan.missing.tolist()]
    assert torch.equal(found.second[rows], found.targets[rows])  # type: ignore[index]
    (clean_batch,) = images.batches([found.indices.numpy()], None, CPU)
    assert torch.allclose(found.inputs[rows], clean_batch.inputs[rows], atol=1e-6)
    others = [row for row in range(len(found.targets)) if row not in rows]
    assert torch.equal(found.inputs[others], expected[0].inputs[others])
    with pytest.raises(DataError, match="no image of a batch can be read"):
        list(images.batches([partners], None, CPU))


def test_shares_that_are_nearly_probabilities_are_accepted() -> None:
    targets = np.repeat(np.arange(3), [5, 3, 2])
    shares = np.array([0.5, 0.3, 0.2]) * 1.000002
    sampler = FixedSharesSampler(targets, np.array([5, 3, 2]), shares=shares, seed=0)
    assert len(sampler.order(1)) == 10
    assert sampler.class_shares(1).sum() == pytest.approx(1, abs=1e-12)
