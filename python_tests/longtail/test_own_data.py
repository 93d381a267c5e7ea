"""The user's own data: formats, bit depths, orientation, repeated images, damage, moved folders."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from fastsam.cli import main
from fastsam.distributed import World
from fastsam.longtail import Trainer, recipe
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.data import Draw, LongTailData, load_dataset
from fastsam.longtail.data.files import FileImages
from fastsam.longtail.data.image_source import FileSource
from fastsam.longtail.data.lists import list_folder, read_list
from fastsam.longtail.data.pixels import Reading, decode
from fastsam.longtail.data.resized_crop import RandomResizedCrop
from fastsam.longtail.data.workers import Reader, Request, Workers, expect_lost_connections
from fastsam.longtail.differences import differences
from fastsam.longtail.errors import CheckpointError, DataError, LongTailError, UsageError

CPU = torch.device("cpu")
ALL_16 = [Reading(), Reading("transpose")]


def noise(number: int, size: int = 24) -> NDArray[np.uint8]:
    return np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)


def write_folders(root: Path, *, train: tuple[int, ...] = (5, 3), suffix: str = ".png") -> None:
    """Write class folders with distinct images."""
    numbers = itertools.count()
    for part, counts in (("train", train), ("test", (2,) * len(train))):
        for label, count in enumerate(counts):
            for place in range(count):
                path = root / part / f"class {label}" / f"{place}{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(noise(next(numbers))).save(path)


def own_config(root: Path, name: str = "folder", **settings: Any) -> TrainConfig:
    options: dict[str, Any] = {
        "model": "resnet8",
        "epochs": 2,
        "batch_size": 4,
        "image_size": 16,
        "workers": 0,
        "data_root": str(root),
        **settings,
    }
    return recipe(name, "ce", "sgd", **options).config()


def check(root: Path, *options: str, name: str = "folder") -> int:
    return main(["data", "check", name, "--root", str(root), *options])


GREY = np.array([[0, 300, 9000], [40000, 65535, 1]])


def save_pgm(path: Path, values: NDArray[Any]) -> None:
    header = f"P5\n{values.shape[1]} {values.shape[0]}\n65535\n".encode()
    path.write_bytes(header + values.astype(">u2").tobytes())


@pytest.mark.parametrize("kind", ["png", "tiff", "tiff big endian", "pgm"])
@pytest.mark.parametrize("reading", ALL_16)
def test_grey_of_16_bits_is_divided_by_its_white(
    kind: str, reading: Reading, tmp_path: Path
) -> None:
    path = tmp_path / f"image.{kind.split()[0]}"
    if kind == "pgm":
        save_pgm(path, GREY)
    else:
        Image.fromarray(GREY.astype(">u2" if "big" in kind else "<u2")).save(path)
    decoded = decode(path, reading)
    assert isinstance(decoded.pixels, torch.Tensor)
    expected = (GREY / 65535).astype(np.float32)
    assert np.array_equal(decoded.pixels.numpy(), np.stack([expected] * 3))
    assert decoded.largest == 65535
    ranged = decode(path, Reading(value_range=(-100, 99900))).pixels
    assert isinstance(ranged, torch.Tensor)
    assert np.allclose(ranged[0].numpy(), (GREY + 100) / 100000, rtol=1e-6)
    with pytest.raises(ValueError, match=r"from 0 to 65535 are outside --value-range 0 4095"):
        decode(path, Reading(value_range=(0, 4095)))


def test_a_damaged_second_page_is_an_unreadable_file(tmp_path: Path) -> None:
    """Pillow raises TypeError for it, but only if the pages are counted."""
    page, path = Image.new("L", (6, 5)), tmp_path / "pages.tif"
    page.save(path, save_all=True, append_images=[page])
    content = bytearray(path.read_bytes())
    width = content.rfind(b"\x00\x01\x04\x00\x01\x00")  # the entry of the second page: one long
    content[width : width + 2] = b"\xff\x7f"
    path.write_bytes(content)
    assert decode(path, Reading()).frames == 1
    with pytest.raises(OSError, match="Missing dimensions"):
        decode(path, Reading(), count_frames=True)


def test_integers_of_32_bits_and_floats_need_a_range(tmp_path: Path) -> None:
    integers, floats, units = (tmp_path / f"{name}.tiff" for name in ("i", "f", "u"))
    Image.fromarray(GREY.astype(np.int32)).save(integers)
    Image.fromarray(GREY.astype(np.float32)).save(floats)
    Image.fromarray((GREY / 65535).astype(np.float32)).save(units)
    with pytest.raises(
        ValueError, match=r"range of 32-bit integer images is unknown.*--value-range"
    ):
        decode(integers, Reading())
    with pytest.raises(ValueError, match=r"outside \[0, 1\].*--value-range"):
        decode(floats, Reading())
    plain = decode(units, Reading()).pixels
    for path in (integers, floats):
        pixels = decode(path, Reading(value_range=(0, 65535))).pixels
        assert isinstance(pixels, torch.Tensor)
        assert isinstance(plain, torch.Tensor)
        assert torch.allclose(pixels, plain)
    broken = GREY.astype(np.float32)
    broken[0, 0] = np.nan
    Image.fromarray(broken).save(floats)
    with pytest.raises(ValueError, match="nan"):
        decode(floats, Reading(value_range=(0, 65535)))


def test_a_range_does_not_touch_8_bits_and_colour_of_16_bits_has_none(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(noise(0)).save(path)
    pixels = decode(path, Reading(value_range=(0, 10))).pixels
    assert np.array_equal(np.asarray(pixels), noise(0))
    colour = tmp_path / "a.ppm"
    colour.write_bytes(b"P6\n1 1\n65535\n" + np.array([1, 2, 3], ">u2").tobytes())
    with pytest.raises(ValueError, match="16-bit color images"):
        decode(colour, Reading(value_range=(0, 10)))


def test_training_and_check_on_16_bits(tmp_path: Path, capsys: Any) -> None:
    write_folders(tmp_path)
    for path in tmp_path.rglob("*.png"):
        values = np.random.default_rng(len(str(path))).integers(0, 4096, (24, 24))
        values[0, 0] = 4095
        values[1, 1:4] = [
            hash(path.name) % 4000,
            len(path.parts),
            list(tmp_path.rglob("*.png")).index(path),
        ]
        Image.fromarray(values.astype(np.uint16)).save(path)
    data = load_dataset("folder", data_root=tmp_path, image_size=16, workers=0)
    (batch,) = data.train.batches([np.arange(8)], None, CPU)
    raw = batch.inputs * torch.tensor(data.train.std)[:, None, None]
    raw += torch.tensor(data.train.mean)[:, None, None]
    assert 0.02 < float(raw.mean()) < 0.04  # half of 4,095 / 65,535; white before
    assert check(tmp_path) == 0
    assert "--value-range 0 4095" in capsys.readouterr().out
    assert check(tmp_path, "--value-range", "0", "4095") == 0
    assert "warning" not in capsys.readouterr().out
    ranged = Trainer(own_config(tmp_path, value_range=(0.0, 4095.0)), progress=False)
    (batch,) = ranged.data.train.batches([np.arange(8)], Draw(0, 1), CPU)
    assert batch.inputs.isfinite().all()
    assert ranged.fit().config["value_range"] == [0.0, 4095.0]
    with pytest.raises(UsageError, match="two values in ascending order"):
        own_config(tmp_path, value_range=(1.0, 1.0))


def test_class_folders_accept_every_format_and_skip_other_files(
    tmp_path: Path, capsys: Any
) -> None:
    write_folders(tmp_path)
    folder = tmp_path / "train" / "class 0"
    for number, suffix in enumerate(
        (".tif", ".TIFF", ".gif", ".ppm", ".webp", ".bmp", ".jpg", ".pgm")
    ):
        image = Image.fromarray(noise(100 + number))
        image = image.convert("L") if suffix == ".pgm" else image
        image.save(folder / f"extra{number}{suffix}")
    for name in ("notes.txt", "more.TXT", "scan.heic", "README"):
        (folder / name).write_text("x")
    images, names, left_out = list_folder(tmp_path / "train")
    assert names == ["class 0", "class 1"]
    assert np.bincount(images.targets).tolist() == [5 + 8, 3]
    assert left_out == {".txt": 2, ".heic": 1, "no suffix": 1}
    assert check(tmp_path, "--decode", "--workers", "0") == 0
    output = capsys.readouterr().out
    assert "train: ignored 4 other files: 2 .txt, 1 .heic, 1 no suffix" in output


def test_only_formats_that_are_decoded_here(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.fromarray(noise(0)).save(path, format="EPS")
    with pytest.raises(OSError, match="cannot identify"):
        decode(path, Reading())


def test_files_of_several_frames_are_named(tmp_path: Path, capsys: Any) -> None:
    write_folders(tmp_path)
    frames = [Image.fromarray(noise(number)) for number in (50, 51, 52)]
    path = tmp_path / "train" / "class 1" / "moving.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert decode(path, Reading(), count_frames=True).frames == 3
    assert check(tmp_path, "--decode", "--workers", "0") == 0
    assert "train: 1 files have several frames" in (output := capsys.readouterr().out)
    assert "train/class 1/moving.gif" in output


def test_links_inside_a_class_are_followed_and_loops_are_refused(tmp_path: Path) -> None:
    write_folders(tmp_path / "data")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Image.fromarray(noise(60)).save(elsewhere / "far.png")
    folder = tmp_path / "data" / "train" / "class 0"
    (folder / "linked").symlink_to(elsewhere, target_is_directory=True)
    images, _, _ = list_folder(tmp_path / "data" / "train")
    assert "class 0/linked/far.png" in images.paths
    for target in (folder, tmp_path / "data" / "train", folder / "deep"):
        (folder / "deep").mkdir(exist_ok=True)
        (folder / "deep" / "loop").symlink_to(target, target_is_directory=True)
        with pytest.raises(DataError, match=r"is a link to a folder that contains it"):
            list_folder(tmp_path / "data" / "train")
        (folder / "deep" / "loop").unlink()


def write_lists(root: Path, train: str, test: str) -> None:
    (root / "train.txt").write_text(train)
    (root / "test.txt").write_text(test)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (
            "a 0\nb 1\n",
            "a 0\nb 1\n",
            "train and test share 2 images with the same path; the first is a",
        ),
        ("a 0\nb 1\n./b 1\n", "c 0\n", "train: 1 image repeats the path of another"),
        ("a 0\nb 1\nx/../a 1\n", "c 0\n", r"with the same path in several classes.*classes 0, 1"),
    ],
)
def test_own_lists_that_name_an_image_twice_are_refused(
    train: str, test: str, message: str, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "x").mkdir()
    for number, name in enumerate("abc"):
        Image.fromarray(noise(number)).save(tmp_path / name, format="PNG")
    write_lists(tmp_path, train, test)
    with pytest.raises(DataError, match=message):
        load_dataset("list", data_root=tmp_path)
    assert check(tmp_path, name="list") == 1
    assert "the same path" in (error := capsys.readouterr().err) or "the path" in error


def test_equal_content_under_other_names_is_found(tmp_path: Path, capsys: Any) -> None:
    write_folders(tmp_path)
    assert check(tmp_path) == 0
    train, test = tmp_path / "train", tmp_path / "test"
    shutil.copy(train / "class 0" / "0.png", train / "class 0" / "copy.png")
    shutil.copy(train / "class 0" / "1.png", train / "class 1" / "other label.png")
    shutil.copy(train / "class 0" / "2.png", test / "class 0" / "leak.png")
    capsys.readouterr()
    assert check(tmp_path) == 1
    output = capsys.readouterr()
    assert "train: 2 images repeat the content of another" in output.out
    assert "train: 1 image with the same content in several classes" in output.out
    assert "train and test share 1 image with the same content" in output.out
    assert "3 problem(s) with repeated images" in output.err


def test_equal_samples_are_not_taken_for_equal_content(tmp_path: Path) -> None:
    write_folders(tmp_path, suffix=".bmp")
    folder = tmp_path / "train" / "class 0"
    pixels = noise(5, size=128)
    Image.fromarray(pixels).save(folder / "one.bmp")
    pixels[100, 3] ^= 1  # not at the beginning, in the middle or at the end
    Image.fromarray(pixels).save(folder / "two.bmp")
    images = load_dataset("folder", data_root=tmp_path).train
    places = [images.name_of(i).endswith(("one.bmp", "two.bmp")) for i in range(len(images))]
    pair = np.flatnonzero(places).tolist()
    assert len(set(images.digests(pair))) == 1
    assert len(set(images.digests(pair, whole=True))) == 2
    assert check(tmp_path) == 0


def test_a_lone_last_image_joins_the_batch_before(tmp_path: Path) -> None:
    write_folders(tmp_path, train=(5, 4))
    sizes: list[int] = []
    config = own_config(tmp_path, model="resnet18", image_size=32, batch_size=8, epochs=1)
    run = Trainer(config, on_step=lambda step: sizes.append(len(step.targets)), progress=False)
    assert run.fit().steps_per_epoch == 1
    assert sizes == [9]
    sizes.clear()
    config = own_config(tmp_path, batch_size=4, epochs=1)
    Trainer(config, on_step=lambda step: sizes.append(len(step.targets)), progress=False).fit()
    assert sizes == [4, 5]
    with pytest.raises(UsageError, match="would have 1 image"):
        Trainer(own_config(tmp_path, batch_size=1), progress=False)
    with pytest.raises(UsageError, match=r"at least 4 for 2 process\(es\) and accumulate=1, got 2"):
        Trainer(own_config(tmp_path, batch_size=2), world=World(0, 2), progress=False)
    run = Trainer(own_config(tmp_path, batch_size=4), progress=False)
    parts = [replace(run.batches, world=World(rank, 2)).indices(1) for rank in range(2)]
    assert [[len(batch) for batch in part] for part in parts] == [[2, 3], [2, 2]]
    (whole,) = replace(run.batches, batch_size=8).indices(1)
    seen = [image for part in parts for batch in part for image in batch]
    assert sorted(seen) == sorted(whole)  # every image once


def test_parts_of_a_batch_hold_two_images_or_more(tmp_path: Path) -> None:
    """LPF-SGD splits a batch of nine into four parts, not into the requested eight."""
    write_folders(tmp_path, train=(5, 4))
    sizes: list[int] = []
    config = recipe(
        "folder",
        "ce",
        "lpf-sgd",
        data_root=str(tmp_path),
        model="resnet18",
        image_size=32,
        epochs=1,
        lr=0.01,  # at the recipe's, one step of nine images may overflow
    ).override(batch_size=9, lpf_parts=8, workers=0)
    Trainer(
        config.config(), on_step=lambda step: sizes.append(len(step.targets)), progress=False
    ).fit()
    assert sizes == [3, 2, 2, 2]


def test_exif_orientation_turns_own_images(tmp_path: Path) -> None:
    write_folders(tmp_path)
    upright = noise(7)
    upright[:12] = 0
    for orientation, turn in (
        (3, Image.Transpose.ROTATE_180),
        (6, Image.Transpose.ROTATE_90),
        (8, Image.Transpose.ROTATE_270),
    ):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for suffix in ("jpg", "png", "webp", "tif"):
            path = tmp_path / "train" / "class 0" / f"turned.{suffix}"
            options = {} if suffix == "tif" else {"quality": 95, "lossless": True}
            Image.fromarray(upright).transpose(turn).save(path, exif=exif, **options)
            seen = np.asarray(decode(path, Reading("transpose")).pixels).astype(int)
            assert seen[:10].mean() < 30 < seen[14:].mean()
            if suffix != "tif":  # which Pillow transposes itself
                plain = np.asarray(decode(path, Reading("ignore")).pixels).astype(int)
                assert plain[:10].mean() > 30
            path.unlink()
    assert own_config(tmp_path).exif == "transpose"
    stored = own_config(tmp_path).as_dict()
    del stored["exif"]
    assert TrainConfig.from_dict(stored).exif == "ignore"
    assert differences(stored, own_config(tmp_path).as_dict()) == ["exif"]
    assert differences(stored, own_config(tmp_path, exif="ignore").as_dict()) == []
    assert recipe("imagenet-lt", "ce", "sgd").config().exif is None


def test_exif_in_training_and_evaluation(tmp_path: Path) -> None:
    write_folders(tmp_path, suffix=".jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    for path in list(tmp_path.rglob("*.jpg")):
        pixels = np.asarray(Image.open(path))
        Image.fromarray(pixels).save(path, exif=exif, quality=95)
    sets = [
        load_dataset("folder", data_root=tmp_path, image_size=14, workers=0, exif=exif_setting)
        for exif_setting in ("transpose", "ignore")
    ]
    for part in ("train", "test"):
        turned, plain = (
            next(iter(data.split(part).batches([np.arange(3)], None, CPU))).inputs for data in sets
        )
        assert torch.allclose(turned, plain.rot90(-1, (2, 3)), atol=0.05)


def test_own_images_are_upright_without_an_option(tmp_path: Path) -> None:
    write_folders(tmp_path / "upright")
    exif = Image.Exif()
    exif[0x0112] = 6
    for path in (tmp_path / "upright").rglob("*.png"):
        turned = tmp_path / "turned" / path.relative_to(tmp_path / "upright")
        turned.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).transpose(Image.Transpose.ROTATE_90).save(turned, exif=exif)
    upright, turned_back = (
        load_dataset("folder", data_root=tmp_path / name, image_size=16, workers=0)
        for name in ("upright", "turned")
    )
    for part in ("train", "test"):
        expected, found = (
            next(data.split(part).batches([np.arange(3)], None, CPU)).inputs
            for data in (upright, turned_back)
        )
        assert torch.equal(found, expected)


def test_list_files_of_other_editors_and_hostile_ones(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbfa.jpg 0\nb.jpg 1\n")
    assert list(read_list(path).paths) == ["a.jpg", "b.jpg"]
    path.write_text("a.jpg 0\nb.jpg 12345678901234567890\n")
    with pytest.raises(DataError, match="line 2: label 12345678901234567890 is too large"):
        read_list(path)
    path.write_text("a.jpg 0\nb.jpg 999999999\n")
    write_lists(tmp_path, path.read_text(), "c.jpg 0\n")
    with pytest.raises(
        DataError, match="labels up to 999999999, but 999999998 labels do not occur"
    ):
        load_dataset("list", data_root=tmp_path)
    path.write_text("a.jpg 0\n" + "x" * (1 << 20) + " 1\n")
    with pytest.raises(DataError, match="line 2: longer than"):
        read_list(path)


def test_a_flipped_bit_in_a_compressed_list_is_damage(tmp_path: Path) -> None:
    lines = "".join(f"folder/{number}.jpg {number % 7}\n" for number in range(300)).encode()
    whole = gzip.compress(lines, mtime=0)
    path = tmp_path / "list.gz"
    for place in range(10, len(whole), 3):  # after the header, some of whose fields are unused
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(DataError):
            read_list(path)


def test_paths_outside_the_root_are_counted(tmp_path: Path, capsys: Any) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for number, path in enumerate(
        (tmp_path / "far.png", root / "b.png", root / "c.png", tmp_path / "up.png")
    ):
        Image.fromarray(noise(number)).save(path)
    write_lists(root, f"{tmp_path}/far.png 0\nb.png 1\n../up.png 1\n", "c.png 0\n")
    assert check(root, name="list") == 0
    assert "train: 2 of 3 listed paths are outside" in capsys.readouterr().out


def test_unreadable_images_leave_counts_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTSAM_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "data"
    write_folders(root, train=(6, 4))
    for place in (0, 3, 5):
        (root / "train" / "class 0" / f"{place}.png").write_bytes(b"no image" * (place + 1))
    (root / "test" / "class 1" / "0.png").write_bytes(b"none")
    run = Trainer(own_config(root, corrupt="skip"), progress=False)
    result = run.fit()
    assert result.counts == [3, 4]  # by class, in the order of the counts
    assert set(result.unreadable.values()) == {1}
    assert len(result.unreadable) == 4
    assert result.test.images == 3
    assert len(list((tmp_path / "cache" / "scans").iterdir())) == 2

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the scan is in the cache")

    monkeypatch.setattr("fastsam.longtail.data.files.scan_files", refuse)
    moved = tmp_path / "moved"
    root.rename(moved)
    data = load_dataset("folder", data_root=moved, corrupt="skip", workers=0)
    assert data.counts.tolist() == [3, 4]
    assert any("removed 3 unreadable images" in note for note in data.notes)
    monkeypatch.undo()
    monkeypatch.setenv("FASTSAM_CACHE", str(tmp_path / "cache"))
    for path in (moved / "train" / "class 1").iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"1 classes have no readable training image.*'class 1'"):
        load_dataset("folder", data_root=moved, corrupt="skip", workers=0)


def test_damaged_scans_are_recreated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSAM_CACHE", str(tmp_path / "cache"))
    write_folders(tmp_path / "data")
    options = {"data_root": tmp_path / "data", "corrupt": "skip", "workers": 0}
    load_dataset("folder", **options)
    kept = list((tmp_path / "cache" / "scans").iterdir())
    for content in ("", "{}", '{"key": 1, "scan": []}', "null"):
        for path in kept:
            path.write_text(content)
        assert load_dataset("folder", **options).counts.tolist() == [5, 3]


def interrupted(config: TrainConfig, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsam.longtail.training.saving.EPOCH_SECONDS", 0.0)

    def stop(step: Any) -> None:
        if step.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trainer(config, out=out, on_step=stop, progress=False).fit()


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_moved_folder_is_resumed_and_changed_pixels_are_not(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, moved, out = tmp_path / "data", tmp_path / "moved", tmp_path / "run"
    write_folders(root, suffix=".bmp")
    interrupted(own_config(root), out, monkeypatch)
    root.rename(moved)
    shutil.copytree(out, tmp_path / "again")
    run = Trainer(own_config(moved), out=out, resume=True, progress=False)
    assert len(run.fit().history) == 2
    path = moved / part / "class 0" / "0.bmp"
    Image.fromarray(noise(999)).save(path)  # as large as before
    with pytest.raises(CheckpointError, match=f"the {part} images of folder have changed"):
        Trainer(own_config(moved), out=tmp_path / "again", resume=True, progress=False)


@pytest.mark.parametrize("part", ["train", "test"])
def test_changed_pixels_are_not_resumed(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Change pixels in place; names and sizes stay the same."""
    write_folders(tmp_path / "data", suffix=".bmp")
    interrupted(own_config(tmp_path / "data"), tmp_path / "run", monkeypatch)
    Image.fromarray(noise(999)).save(tmp_path / "data" / part / "class 1" / "0.bmp")
    with pytest.raises(CheckpointError, match=f"the {part} images of folder have changed"):
        Trainer(own_config(tmp_path / "data"), out=tmp_path / "run", resume=True, progress=False)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_contact_sheets_have_readable_names_and_are_few(tmp_path: Path, capsys: Any) -> None:
    root = tmp_path / "data"
    write_folders(root, train=(6, 5, 4, 3, 2))
    names = ["great white shark", "naïve Übung", "a:b*c?", "$x$", "雪" * 40]
    for part in ("train", "test"):
        for label, name in enumerate(names):
            (root / part / f"class {label}").rename(root / part / name)
    show = ["data", "show", "folder", "--root", str(root), "--rows", "1", "--columns", "2"]
    assert main([*show, "--out", str(tmp_path / "all")]) == 0
    found = sorted(path.name for path in (tmp_path / "all").iterdir())
    assert found == [
        *("0-great_white_shark-6.png", "1-naïve_Übung-5.png", "2-a_b_c-4.png"),
        *("3-x-3.png", f"4-{'雪' * 26}-2.png", "overview.png"),
    ]
    assert "classes are shown" not in capsys.readouterr().out
    assert main([*show, "--out", str(tmp_path / "few"), "--classes", "3"]) == 0
    found = sorted(path.name for path in (tmp_path / "few").iterdir())
    assert found == [
        *("0-great_white_shark-6.png", "2-a_b_c-4.png", f"4-{'雪' * 26}-2.png", "overview.png")
    ]
    assert "showing 3 of 5 classes; raise --classes" in capsys.readouterr().out
    assert main([*show, "--out", str(tmp_path / "none"), "--classes", "0"]) == 2
    assert not (tmp_path / "none").exists()


def kill_this_process(*arguments: Any, **options: Any) -> torch.Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("not reached")


def refuse_image(image: Any) -> torch.Tensor:
    raise RuntimeError("an error of the reader")


def test_a_lost_worker_is_named_and_errors_of_workers_stay(tmp_path: Path) -> None:
    write_folders(tmp_path)
    images, *_ = list_folder(tmp_path / "train")
    requests = [Request(np.arange(2)), Request(np.arange(2, 4))]
    for prepare, kind, message in (
        (kill_this_process, LongTailError, "ended unexpectedly.*lower --workers"),
        (refuse_image, RuntimeError, "an error of the reader"),
    ):
        source = FileSource(tmp_path / "train")
        reader = Reader(source, images, plain=prepare, augmented=RandomResizedCrop(8))
        workers = Workers(reader, 2)
        with pytest.raises(kind, match=message):
            list(workers.read(requests))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="workers that are forked have the patch")
def test_a_lost_worker_of_the_decode_scan_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    write_folders(tmp_path)
    monkeypatch.setattr("fastsam.longtail.data.scan.decode", kill_this_process)
    assert check(tmp_path, "--decode", "--workers", "2") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastsam: error: a worker process that reads images ended unexpectedly")


def test_workers_are_silent_when_the_main_process_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "excepthook", None)
    expect_lost_connections()
    sys.excepthook(ConnectionResetError, ConnectionResetError(104, "reset"), None)
    sys.excepthook(EOFError, EOFError(), None)
    assert capsys.readouterr().err == ""
    sys.excepthook(KeyError, KeyError("shown"), None)
    assert "shown" in capsys.readouterr().err


def test_labels_beyond_the_class_names_and_one_class(tmp_path: Path, capsys: Any) -> None:
    write_folders(tmp_path, train=(3,))
    assert check(tmp_path) == 1
    assert "1 class(es), but at least 2 are required" in capsys.readouterr().err
    data = load_dataset("digits-lt")
    with pytest.raises(
        DataError, match=r"labels of the train set of few must be from 0 to 2, .* got 9"
    ):
        LongTailData("few", data.train, None, data.test, ("a", "b", "c"), {}, "")


def test_file_images_keep_their_reading(tmp_path: Path) -> None:
    write_folders(tmp_path)
    data = load_dataset("folder", data_root=tmp_path, value_range=(0, 10))
    assert isinstance(data.train, FileImages)
    assert data.train.reading == Reading("transpose", (0, 10))


def test_given_data_have_their_own_name(tmp_path: Path, capsys: Any) -> None:
    digits = load_dataset("digits-lt")
    mine = dataclasses.replace(digits, name="mine")
    config = recipe("own:mine", "ce", "sgd", epochs=1, model="resnet8").config()
    assert config.imbalance is None
    assert config.image_size is None
    result = Trainer(config, data=mine, out=tmp_path / "run", progress=False).fit()
    assert result.config["data"] == "own:mine"
    assert main(["spectrum", str(tmp_path / "run"), "--steps", "1"]) == 2
    assert "own:mine was created in Python" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"config.data is 'digits-lt', but the data set is 'mine'"):
        Trainer(recipe("digits-lt", "ce", "sgd").config(), data=mine)
    with pytest.raises(UsageError, match=r"unknown data 'mine'; valid: cifar10-lt"):
        recipe("mine", "ce", "sgd")
