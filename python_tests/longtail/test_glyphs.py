"""Generated sets of glyphs: the same bits everywhere, the cache, the data sets, the commands."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from fastsam.cli import main
from fastsam.longtail import Result, Trainer, recipe
from fastsam.longtail.data import TensorImages, load_dataset, longtail_indices, subset_hash
from fastsam.longtail.data.augment import Compose, RandomCrop, RandomHorizontalFlip
from fastsam.longtail.data.glyphs import (
    SPECS,
    GlyphSpec,
    Part,
    cache,
    cached_images,
    check_glyphs,
    generate,
    images_hash,
    load_glyphs_lt,
)
from fastsam.longtail.data.glyphs.cache import PUBLISHED
from fastsam.longtail.data.glyphs.generate import draw_images, read_drawings
from fastsam.longtail.data.glyphs.textures import texture_bank
from fastsam.longtail.data.sheet import tiled, write_sheets
from fastsam.longtail.errors import DataError, UsageError
from fastsam.longtail.predictions import predict

SMALL = GlyphSpec(num_classes=10, train=12, validation=2, test=6, seed=3)
SMALL_HASH = "147904ccc4ffab2efcd5c9c7c7559f6ac532083209b749004f8f1ee544be073d"
"""Of the pixels of SMALL; made with Python 3.10, NumPy 1.26, matplotlib 3.8 and with newer ones."""


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the images of SMALL."""
    folder: Path = tmp_path_factory.mktemp("kept")
    cached_images(SMALL, folder=folder)
    return folder


@pytest.fixture(scope="module")
def small(kept: Path) -> NDArray[np.uint8]:
    return cached_images(SMALL, folder=kept)


def parts(spec: GlyphSpec, images: NDArray[np.uint8]) -> dict[Part, NDArray[np.uint8]]:
    edges = np.cumsum([0, *spec.sizes().values()])
    return {part: images[edges[i] : edges[i + 1]] for i, part in enumerate(spec.sizes())}


def test_bits_are_those_of_other_versions_and_machines(small: NDArray[np.uint8]) -> None:
    assert small.shape == (10 * (12 + 2 + 6 + 6), 3, 32, 32)
    assert images_hash(small) == SMALL_HASH


def test_images_depend_on_their_class_and_number_alone(small: NDArray[np.uint8]) -> None:
    fewer = GlyphSpec(num_classes=10, train=5, validation=0, test=1, seed=3)
    one_thread = parts(fewer, generate(fewer, progress=False, threads=1))
    more = parts(SMALL, small)
    for part, count in fewer.per_class.items():
        expected = more[part].reshape(10, -1, 3, 32, 32)[:, :count]
        assert np.array_equal(one_thread[part].reshape(10, count, 3, 32, 32), expected)


def test_other_seeds_classes_and_parts_are_other_images(small: NDArray[np.uint8]) -> None:
    other = generate(GlyphSpec(num_classes=10, train=12, validation=2, test=6, seed=4))
    everything = [image.tobytes() for image in np.concatenate([small, other])]
    assert len(set(everything)) == len(everything)
    means = small.reshape(len(small), -1).std(axis=1)
    assert means.min() > 5  # no image is blank


def test_test_images_are_not_training_images_on_other_textures() -> None:
    labels, numbers = np.arange(10), np.zeros(10, dtype=np.int64)
    bank = texture_bank(0, 0)
    drawn = [
        draw_images(read_drawings(10), bank, part, labels, numbers, seed=0)
        for part in (Part.TRAIN, Part.VALIDATION, Part.TEST)
    ]
    everything = [image.tobytes() for image in np.concatenate(drawn)]
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize("bad", [{"num_classes": 11}, {"train": -1}, {"seed": -1}])
def test_impossible_sets_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=r"10 or 100|at least 0"):
        GlyphSpec(**({"num_classes": 10, "train": 1, "validation": 0, "test": 1} | bad))


def test_unseen_faces_are_in_no_other_part(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import import_module

    module = import_module("fastsam.longtail.data.glyphs.generate")
    drawn: dict[str, set[int]] = {}
    pieces: set[int] = set()

    def watched(draws: Any, shapes: Any, chosen: NDArray[Any], others: NDArray[Any]) -> Any:
        drawn.setdefault(part.name, set()).update((chosen // 10).tolist())
        pieces.update((others // 10).tolist())
        assert np.array_equal(chosen % 10, labels)
        return original(draws, shapes, chosen, others)

    original = module.draw_masks
    monkeypatch.setattr(module, "draw_masks", watched)
    drawings = module.read_drawings(10)
    bank = module.texture_bank(0, 0)
    labels = np.repeat(np.arange(10), 15)
    for part in Part:
        module.draw_images(drawings, bank, part, labels, np.tile(np.arange(15), 10), seed=0)
    seen = len(drawings.alphabet.faces)
    for name in ("TRAIN", "VALIDATION", "TEST"):
        assert drawn[name] <= set(range(seen))
    assert drawn["UNSEEN"] == set(range(seen, seen + len(drawings.alphabet.unseen)))
    assert pieces == set(range(seen))


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("drawn again")


def test_images_are_drawn_once_and_read_ever_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: NDArray[np.uint8]
) -> None:
    folder = tmp_path / "new"
    assert np.array_equal(cached_images(SMALL, folder=folder), small)
    assert len(list(folder.iterdir())) == 1
    monkeypatch.setattr(cache, "generate", refuse)
    assert np.array_equal(cached_images(SMALL, folder=folder), small)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    for damaged, message in (
        (whole[:-1] + bytes([whole[-1] ^ 1]), "is damaged"),
        (whole[:-3072], "is damaged"),
        (whole.replace(b'"seed": 3', b'"seed": 4'), "other glyphs than its name says"),
        (b"something else", "not a file of glyphs"),
        (b"", "not a file of glyphs"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=message):
            cached_images(SMALL, folder=folder)


def test_the_named_sets_have_one_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: Path
) -> None:
    monkeypatch.setitem(PUBLISHED, SMALL, "0" * 64)
    with pytest.raises(DataError, match="0000 everywhere"):
        cached_images(SMALL, folder=kept)
    with pytest.raises(DataError, match="0000 everywhere"):
        cached_images(SMALL, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "generate", refuse)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="FASTSAM_CACHE"):
        cached_images(SMALL, folder=tmp_path / "file" / "below")


@pytest.mark.parametrize("kind", ["exp", "step"])
def test_the_long_tail_is_cut_as_that_of_cifar(
    kept: Path, kind: Any, small: NDArray[np.uint8]
) -> None:
    data = load_glyphs_lt(SMALL, imbalance=6, kind=kind, subset_seed=1, folder=kept)
    assert (data.counts[0], data.counts[-1]) == (12, 2)
    assert data.class_names == tuple("EOCPURVFQG")
    tail = {"exp": (7, 8, 9), "step": (5, 6, 7, 8, 9)}[kind]
    assert data.groups["tail"] == tail
    assert {name: len(images) for name, images in data.splits.items()} == {
        "train": data.counts.sum(),
        "validation": 20,
        "test": 60,
        "unseen": 60,
    }
    chosen = longtail_indices(np.repeat(np.arange(10), 12), data.counts, 1)
    assert data.subset_hash == subset_hash(chosen)
    assert isinstance(data.train, TensorImages)
    assert np.array_equal(data.train.images.numpy(), small[: 10 * 12][chosen])
    assert data.train.augmentation == Compose((RandomCrop(4), RandomHorizontalFlip()))
    for split, part in (("validation", Part.VALIDATION), ("test", Part.TEST)):
        images = data.split(split)
        assert isinstance(images, TensorImages)
        assert images.augmentation is None
        assert np.array_equal(images.images.numpy(), parts(SMALL, small)[part])


def test_pixels_are_normalised(kept: Path) -> None:
    data = load_glyphs_lt(SMALL, imbalance=1, folder=kept)
    everything = [np.arange(len(data.train))]
    (batch,) = data.train.batches(
        everything, augment=False, seed=0, epoch=0, device=torch.device("cpu")
    )
    assert batch.inputs.mean(dim=(0, 2, 3)).abs().max() < 0.15
    assert (batch.inputs.std(dim=(0, 2, 3)) - 1).abs().max() < 0.1


def test_training_judges_both_test_sets(kept: Path) -> None:
    data = load_glyphs_lt(SMALL, imbalance=6, folder=kept)
    config = recipe("glyphs10-lt", "ce", "sgd", epochs=1, model="resnet8", threads=1).config()
    trainer = Trainer(config, data=data, progress=False)
    result = trainer.fit()
    for images, metrics in ((data.test, result.test), (data.unseen, result.unseen)):
        assert images is not None
        assert metrics is not None
        found = predict(trainer.model, images, torch.device("cpu"), batch_size=7)
        assert metrics.accuracy == found.accuracy
    assert Result.from_json(result.to_json()) == result
    before = json.loads(result.to_json())
    del before["unseen"], before["sha256"]  # as results were written when there was no such set
    assert Result.from_json(json.dumps(before)).unseen is None


@pytest.mark.parametrize("num_classes", [10, 100])
@pytest.mark.parametrize(("method", "optimizer"), [("ce", "sgd"), ("ldam-drw", "sam")])
def test_recipes_are_those_of_cifar_and_say_so(
    num_classes: int, method: str, optimizer: str
) -> None:
    ours = recipe(f"glyphs{num_classes}-lt", method, optimizer)
    theirs = recipe(f"cifar{num_classes}-lt", method, optimizer)
    values, expected = ours.config().as_dict(), theirs.config().as_dict()
    different = {n for n in {**values, **expected} if values.get(n) != expected.get(n)}
    assert different == {"data", "data_root", "download"}
    assert "not a published value" in ours.sources["lr"]
    assert re.search("recipe of CIFAR", ours.sources["epochs"])


def test_sheets_show_what_is_there(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "sheets"
    command = ["data", "show", "digits-lt", "--imbalance", "50", "--out", str(out)]
    assert main([*command, "--columns", "5", "--rows", "3"]) == 0
    names = sorted(path.name for path in out.iterdir())
    assert names[:2] == ["0-0-100.png", "1-1-64.png"]
    assert names[-2:] == ["9-9-2.png", "overview.png"]
    assert len(capsys.readouterr().out.splitlines()) == 11
    with Image.open(out / "0-0-100.png") as sheet:
        assert sheet.size == (5 * 66 - 2, 3 * 66 - 2)
        shown = np.asarray(sheet)
    data = load_dataset("digits-lt")
    assert isinstance(data.train, TensorImages)
    # The second image of the second row, enlarged eight times, is the seventh of class 0.
    cell = shown[66:130, 66:130, 0][4::8, 4::8]
    expected = (data.train.images[6, 0].float() * 255 / 16).round()
    assert np.abs(cell.astype(int) - expected.numpy()).max() <= 1
    assert main(command) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--split", "unseen"]) == 2
    assert "valid: train, validation, test" in capsys.readouterr().err


def test_sheets_of_glyphs(tmp_path: Path, kept: Path) -> None:
    data = load_glyphs_lt(SMALL, imbalance=6, folder=kept)
    paths = list(write_sheets(data, tmp_path / "sheets", split="unseen", columns=3, rows=1))
    assert paths[0].name == "0-E-6.png"
    with pytest.raises(UsageError, match="rows and columns"):
        list(write_sheets(data, tmp_path, columns=0))
    assert tiled(np.zeros((4, 100, 90, 3), dtype=np.uint8), 3).shape == (2 * 102 - 2, 3 * 92 - 2, 3)


@pytest.fixture(scope="module")
def full_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("FASTSAM_CACHE", str(folder))
        yield folder


@pytest.mark.slow
@pytest.mark.usefixtures("full_cache")
@pytest.mark.parametrize(("num_classes", "total"), [(10, 12406), (100, 10847)])
def test_the_named_sets(num_classes: int, total: int, capsys: Any) -> None:
    assert main(["data", "check", f"glyphs{num_classes}-lt"]) == 0
    output = capsys.readouterr().out
    assert f"train: {total} images" in output
    assert "test: 10000 images" in output
    assert "unseen: 10000 images" in output
    assert PUBLISHED[SPECS[num_classes]] in output
    assert "drawn again: the same bits" in output


def test_a_machine_that_draws_otherwise_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastsam.longtail.data.glyphs import check

    monkeypatch.setenv("FASTSAM_CACHE", str(tmp_path))
    assert list(check_glyphs(SMALL))[-1] == "260 images drawn again: the same bits"

    def otherwise(*arguments: Any, **options: Any) -> NDArray[np.uint8]:
        images = original(*arguments, **options)
        images[-1, 0, 0, 0] ^= 1
        return images

    original = check.draw_images
    monkeypatch.setattr(check, "draw_images", otherwise)
    with pytest.raises(DataError, match="draws other train images"):
        list(check_glyphs(SMALL))
