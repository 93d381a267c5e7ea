"""Packed copies: the pixels and hashes of the files, runs on them, and damaged or outdated copies."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastsam.cli import main
from fastsam.longtail import Trainer, recipe
from fastsam.longtail.data import Draw, load_dataset
from fastsam.longtail.data import pack as pack_file
from fastsam.longtail.data.files import FileImages
from fastsam.longtail.data.pack import FOLDER, MANIFEST, PIXELS, Pack, write_pack
from fastsam.longtail.data.pixels import Reading
from fastsam.longtail.data.workers import Request, Sample
from fastsam.longtail.errors import CheckpointError, DataError, LongTailError

CPU = torch.device("cpu")
SIZE, SHORT = 28, 32
"""Evaluation resizes the shorter side to 256 / 224 of the size, which is the shorter side of the copy."""
BROKEN = "train/2.img"


def write_files(root: Path) -> None:
    """Write lists and images of odd sizes in several formats, smaller and larger than the copy's."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 9), ("test", 4)):
        (root / split).mkdir(parents=True)
        lines = []
        for number in range(count):
            shape = rng.integers(21, 71, 2)
            image = Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
            kind = ("JPEG", "PNG", "GIF")[number % 3]
            image.save(root / split / f"{number}.img", format=kind)
            lines.append(f"{split}/{number}.img {number % 2}\n")
        (root / f"{split}.txt").write_text("".join(lines))


def pack(root: Path, *options: str) -> int:
    line = ["data", "pack", "list", "--root", str(root), "--short-side", str(SHORT), *options]
    return main([*line, "--workers", "0"])


def images_of(root: Path, split: str = "train", **options: Any) -> FileImages:
    chosen = {"image_size": SIZE, "workers": 0, **options}
    found = load_dataset("list", data_root=root, progress=False, **chosen).split(split)
    assert isinstance(found, FileImages)
    return found


@pytest.fixture(scope="module")
def packed_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("packed")
    write_files(root)
    assert pack(root) == 0
    return root


@pytest.fixture
def packed(packed_once: Path, tmp_path: Path) -> Path:
    """A copy of the folder that a test may change."""
    root = tmp_path / "data"
    shutil.copytree(packed_once, root)
    return root


def test_the_copy_holds_the_reduced_pixels_in_order(packed_once: Path) -> None:
    copy = Pack.load(packed_once / FOLDER, Reading("transpose"))
    assert len(copy.rows) == 13
    assert [path.name for path in sorted((packed_once / FOLDER).iterdir())] == [MANIFEST, PIXELS]
    reduced = 0
    for path in copy.rows:
        with Image.open(packed_once / path) as opened:
            image = opened.convert("RGB")
        short, long = sorted(image.size)
        if short > SHORT:
            reduced += 1
            size = (SHORT, int(SHORT * long / short))
            size = size if image.width < image.height else size[::-1]
            image = image.resize(size, Image.Resampling.BILINEAR)
        assert np.array_equal(copy.array(path), np.asarray(image))
    assert 0 < reduced < 13


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_reads_the_same_bits_as_from_files(workers: int, packed_once: Path) -> None:
    for split in ("train", "test"):
        sets = [
            images_of(packed_once, split, packed=kind, workers=workers) for kind in (False, True)
        ]
        order = [np.arange(len(sets[0]))[::-1]]
        files, copy = (next(iter(images.batches(order, None, CPU))) for images in sets)
        assert torch.equal(files.inputs, copy.inputs)
        for images in sets:
            images.close()


def test_a_network_of_larger_images_reads_the_files(packed_once: Path) -> None:
    images = images_of(packed_once, "test", packed=True)
    larger = replace(images.preprocessing, size=(40, 40), resize=46)
    files, copy = (
        next(iter(kind.prepared_as(larger).batches([np.arange(4)], None, CPU))).inputs
        for kind in (images_of(packed_once, "test", packed=False), images)
    )
    assert torch.equal(files, copy)


def test_training_augments_the_copy(packed_once: Path) -> None:
    order = [np.arange(9)]
    images = [images_of(packed_once, packed=True, workers=workers) for workers in (0, 2)]
    here, there = (next(iter(part.batches(order, Draw(0, 1), CPU))) for part in images)
    assert torch.equal(here.inputs, there.inputs)
    images[1].close()
    crop = images[0].preparation.per_image()
    (seeds,) = Draw(0, 1).seeds(order)
    reader = images[0]._workers.reader
    found = reader[Request(order[0], seeds)].images
    for row, path in enumerate(images[0].images.paths):
        sample, copy = found[row], images[0].pack
        assert isinstance(sample, Sample)
        assert copy is not None
        assert torch.equal(sample.pixels, crop(copy.picture(path), seeds.take(row)))


def test_a_run_on_the_copy_is_one_on_the_same_data(packed: Path, tmp_path: Path) -> None:
    settings = {"model": "resnet8", "batch_size": 4, "lr": 0.01, "image_size": SIZE, "workers": 0}
    made = recipe("list", "ce", "sgd", data_root=str(packed), epochs=1, **settings)
    files = Trainer(made.config(), out=tmp_path / "files", progress=False).fit()
    config = made.override(packed=True).config()
    for path in (*packed.glob("train/*"), *packed.glob("test/*")):
        path.unlink()  # the lists and the copy suffice
    copy = Trainer(config, out=tmp_path / "copy", progress=False).fit()
    assert (copy.contents, copy.subset_hash) == (files.contents, files.subset_hash)
    assert copy.config["packed"] is True
    with pytest.raises(CheckpointError, match="packed was False, is now True"):
        Trainer(config, out=tmp_path / "files", resume=True, progress=False)


def test_an_open_copy_can_be_sent_to_a_process(packed_once: Path) -> None:
    copy = Pack.load(packed_once / FOLDER, Reading("transpose"))
    first = copy.array("train/0.img").copy()
    state = pickle.dumps(copy)
    assert len(state) < 5000
    assert np.array_equal(pickle.loads(state).array("train/0.img"), first)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("version", 2, "version 2 is not 1"),
        ("format", None, "damaged"),
        ("shapes", [[1, 1]], "do not agree"),
        ("shapes", "abc", "damaged"),
        ("digests", ["xy"] * 13, "damaged"),
        ("paths", 3, "damaged"),
        ("reading", ["ignore", None], r"packed with the settings"),
        ("short_side", 16, "requires 32; .*--short-side 32"),
    ],
)
def test_manifests_that_are_damaged_or_do_not_fit(
    name: str, value: object, message: str, packed: Path
) -> None:
    path = packed / FOLDER / MANIFEST
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, name: value}))
    with pytest.raises(DataError, match=message):
        images_of(packed, packed=True)


def test_copies_that_are_missing_incomplete_or_outdated(packed: Path, capsys: Any) -> None:
    assert pack(packed) == 2
    assert "pass --overwrite to replace it" in capsys.readouterr().err
    with (packed / "train.txt").open("a") as file:
        file.write("train/new.img 1\n")
    with pytest.raises(DataError, match=r"1 of 10 images of the train list are not in .*new\.img"):
        images_of(packed, packed=True)
    pixels = packed / FOLDER / PIXELS
    pixels.write_bytes(pixels.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"must have \d+ bytes, got"):
        images_of(packed, packed=True)
    (packed / FOLDER / MANIFEST).write_text("{")
    with pytest.raises(DataError, match=r"cannot read .*manifest"):
        images_of(packed, packed=True)
    (packed / FOLDER / MANIFEST).unlink()
    with pytest.raises(DataError, match=r"no packed copy in .*fastsam data pack"):
        images_of(packed, packed=True)
    assert main(["data", "pack", "digits-lt"]) == 2
    assert "are not files in a folder" in capsys.readouterr().err
    assert pack(packed, "--packed") == 2
    assert main(["data", "pack", "list", "--root", str(packed), "--short-side", "0"]) == 2


def test_unreadable_files_stop_the_packing_or_are_noted(packed: Path, capsys: Any) -> None:
    (packed / BROKEN).write_bytes(b"no image")
    assert pack(packed, "--overwrite") == 1
    assert f"{BROKEN}" in capsys.readouterr().err
    assert sorted(path.name for path in (packed / FOLDER).iterdir()) == [MANIFEST, PIXELS]
    assert len(images_of(packed, packed=True)) == 9  # the copy of before
    assert pack(packed, "--corrupt", "skip", "--overwrite") == 0
    images = images_of(packed, packed=True, corrupt="skip")
    assert images.left_out == (BROKEN,)
    assert len(images) == 8
    assert images.content() == images_of(packed, corrupt="skip").content()
    with pytest.raises(DataError, match=rf"cannot read .*{BROKEN} .*when it was packed"):
        list(images_of(packed, packed=True).batches([np.arange(9)], None, CPU))


@pytest.mark.parametrize("replaced", [0, 1])
def test_a_kill_between_the_files_of_a_copy_leaves_no_copy(
    replaced: int, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.replace
    calls = iter(range(2))

    def killed(path: Path, target: Path) -> Path:
        if next(calls) == replaced:
            raise KeyboardInterrupt
        return real(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_pack(packed, ["train/0.img", BROKEN], Reading("transpose"))
    with pytest.raises(DataError, match=r"no packed copy in .*fastsam data pack"):
        Pack.load(packed / FOLDER, Reading("transpose"))
    assert pack(packed) == 0


def test_a_full_disk_leaves_the_copy_of_before(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Pack.load(packed / FOLDER, Reading("transpose")).array(BROKEN).copy()

    def full(*arguments: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(pack_file, "write_text", full)
        with pytest.raises(OSError, match="no space left"):
            write_pack(packed, [BROKEN], Reading("transpose"))
    copy = Pack.load(packed / FOLDER, Reading("transpose"))
    assert len(copy.rows) == 13
    assert np.array_equal(copy.array(BROKEN), before)


def test_pixels_that_were_replaced_after_the_copy_was_opened_are_not_read(packed: Path) -> None:
    paths = [f"train/{number}.img" for number in range(9)]
    opened, used = (Pack.load(packed / FOLDER, Reading("transpose")) for _ in range(2))
    before = used.array(paths[0]).copy()
    write_pack(packed, paths[::-1], Reading("transpose"))
    with pytest.raises(LongTailError, match=r"pixels\.bin was replaced .*start the command again"):
        pickle.loads(pickle.dumps(opened)).array(paths[0])
    assert np.array_equal(used.array(paths[0]), before)  # the system keeps the old file


def test_wide_images_are_not_packed(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 5), 70, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png has more than 8 bits per channel"):
        write_pack(tmp_path, ["a.png"], Reading())
    assert not list((tmp_path / FOLDER).iterdir())


def test_channels_of_a_copy_are_those_of_the_files_that_were_packed(packed: Path) -> None:
    assert images_of(packed, channels=0, packed=True).channels == 3
    for path in packed.glob("*/*.img"):
        path.unlink()
    assert images_of(packed, channels=0, packed=True).channels == 3
    manifest = packed / FOLDER / MANIFEST
    content = json.loads(manifest.read_text())
    content["gray"] = [True] * len(content["gray"])
    manifest.write_text(json.dumps(content))
    assert images_of(packed, channels=0, packed=True).channels == 1
    del content["gray"]
    manifest.write_text(json.dumps(content))
    assert images_of(packed, packed=True).channels == 3
    with pytest.raises(DataError, match=r"pass --channels 1 or 3, or write the packed copy again"):
        images_of(packed, channels=0, packed=True)


def test_a_packed_copy_notes_which_files_are_gray(tmp_path: Path) -> None:
    for number, mode in enumerate(("RGB", "L", "LA", "P", "1")):
        Image.new(mode, (40, 40)).save(tmp_path / f"{number}.png")
    (tmp_path / "5.png").write_bytes(b"x")
    names = [f"{number}.png" for number in range(6)]
    copy = write_pack(tmp_path, names, Reading(), skip=True)
    assert copy.stores_gray(names) == [False, True, True, False, True]
