"""fashion-mnist-lt: location and verification of files, and selection of images."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastsam.cli import main
from fastsam.longtail import Checkpoint, Trainer, recipe
from fastsam.longtail.data import TensorImages, fashion_mnist, load_dataset, longtail_indices
from fastsam.longtail.errors import DataError
from python_tests.longtail.archives import idx_content, write_mnist

NAMES = tuple(fashion_mnist.SHA256)
INSTALLED = pytest.mark.skipif(
    not fashion_mnist.DEBIAN.is_dir(),
    reason="needs Fashion-MNIST: apt-get install dataset-fashion-mnist",
)
SMALL = {"n_max": 20, "validation_per_class": 5, "imbalance": 10.0}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small data set in the original format, with Fashion-MNIST's SHA-256 replaced by its own."""
    folder = tmp_path / "data"
    sums = write_mnist(folder, per_class=30, test_per_class=4, compressed=True)
    monkeypatch.setattr(fashion_mnist, "SHA256", sums)
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "nowhere")
    return folder


def pixels(root: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Read images and labels of a split without fastsam."""
    images, labels = (
        gzip.decompress((root / f"{split}-{name}.gz").read_bytes())
        for name in ("images-idx3-ubyte", "labels-idx1-ubyte")
    )
    shape = np.frombuffer(images[4:16], dtype=">u4").astype(int)
    return np.frombuffer(images[16:], np.uint8).reshape(shape), np.frombuffer(labels[8:], np.uint8)


def of(images: Any) -> np.ndarray:
    assert isinstance(images, TensorImages)
    return images.images[:, 0].numpy()


def test_validation_is_held_out_and_the_test_set_is_untouched(root: Path) -> None:
    raw, labels = pixels(root, "train")
    order = {image.tobytes(): place for place, image in enumerate(raw)}
    chosen: dict[int, set[int]] = {}
    for seed in (0, 1, 2):
        data = load_dataset("fashion-mnist-lt", data_root=root, validation_seed=seed, **SMALL)
        again = load_dataset("fashion-mnist-lt", data_root=root, validation_seed=seed, **SMALL)
        assert data.contents() == again.contents()
        assert data.subset_hash == again.subset_hash
        assert data.validation is not None
        assert np.bincount(data.validation.targets).tolist() == [5] * 10
        places = {
            split: [order[image.tobytes()] for image in of(data.split(split))]
            for split in ("train", "validation")
        }
        assert not set(places["train"]) & set(places["validation"])
        for split in places:
            assert labels[places[split]].tolist() == data.split(split).targets.tolist()
        pool = np.setdiff1d(np.arange(300), places["validation"])
        expected = pool[longtail_indices(labels[pool], data.counts)]
        assert places["train"] == expected.tolist()
        chosen[seed] = set(places["validation"])
        images, targets = pixels(root, "t10k")
        assert (of(data.test) == images).all()
        assert (data.test.targets == targets).all()
    assert len({frozenset(places) for places in chosen.values()}) == 3


def test_the_cut_does_not_change_the_validation_set(root: Path) -> None:
    one = load_dataset("fashion-mnist-lt", data_root=root, **SMALL)
    for change in ({"imbalance": 2.0}, {"subset_seed": 4}, {"kind": "step"}, {"n_max": 11}):
        other = load_dataset("fashion-mnist-lt", data_root=root, **{**SMALL, **change})
        assert other.contents()["validation"] == one.contents()["validation"]
        assert other.contents()["test"] == one.contents()["test"]
        assert other.contents()["train"] != one.contents()["train"]


@pytest.mark.parametrize("place", ["", "FashionMNIST/raw"])
@pytest.mark.parametrize("compressed", [True, False])
def test_files_are_found_compressed_or_not(
    place: str, compressed: bool, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_dataset("fashion-mnist-lt", data_root=root, **SMALL).contents()
    there = tmp_path / "other"
    write_mnist(there / place, per_class=30, test_per_class=4, compressed=compressed)
    data = load_dataset("fashion-mnist-lt", data_root=there, **SMALL)
    assert data.contents() == expected
    monkeypatch.setattr(fashion_mnist, "DEBIAN", root)
    assert load_dataset("fashion-mnist-lt", data_root=tmp_path, **SMALL).contents() == expected


def test_torchvision_downloads_only_missing_files(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision.datasets

    asked = []

    def download(folder: str, *, download: bool) -> None:
        asked.append((folder, download))
        if len(asked) == 2:
            raise RuntimeError("no network")
        write_mnist(Path(folder) / "FashionMNIST" / "raw", per_class=30, test_per_class=4)

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", download)
    there = load_dataset("fashion-mnist-lt", data_root=root, download=True, **SMALL)
    assert asked == []
    new = tmp_path / "new"
    got = load_dataset("fashion-mnist-lt", data_root=new, download=True, **SMALL)
    assert asked == [(str(new), True)]
    assert got.contents() == there.contents()
    with pytest.raises(DataError, match="cannot download Fashion-MNIST: no network"):
        load_dataset("fashion-mnist-lt", data_root=tmp_path / "newer", download=True, **SMALL)
    with pytest.raises(
        DataError, match=r"neither in .*: pass --download, or install Debian's pack"
    ):
        load_dataset("fashion-mnist-lt", data_root=tmp_path / "newer", **SMALL)


def _swap(folder: Path, one: str, other: str) -> None:
    paths = [folder / f"{name}.gz" for name in (one, other)]
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, reversed(contents), strict=True):
        path.write_bytes(content)


def _rewrite(path: Path, content: bytes) -> None:
    path.write_bytes(gzip.compress(content))


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_are_refused_with_the_remedy(name: str, root: Path) -> None:
    path = root / f"{name}.gz"
    whole = path.read_bytes()
    content = gzip.decompress(whole)
    other = idx_content(np.zeros((7, 28, 28) if "images" in name else (7,), dtype=np.uint8))
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    faults = [
        (whole[: len(whole) // 2], "is truncated or damaged"),
        (whole[:-3], "is truncated or damaged"),
        (b"", "is truncated or damaged|is not an idx file"),
        (b"not gzip", "is truncated or damaged: Not a gzipped file"),
        (gzip.compress(content[:-5]), "is truncated or damaged .*according to its header"),
        (gzip.compress(content[:6]), "is truncated or damaged"),
        (gzip.compress(content + b"\0"), "is truncated or damaged"),
        (gzip.compress(other), "belongs to another data set"),
        (gzip.compress(flipped), "is damaged or belongs to another data set"),
        (gzip.compress(b""), "is not an idx file"),
        (gzip.compress(b"\0\0\x0d\x01" + content[4:]), "is not an idx file"),
    ]
    for damaged, message in faults:
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=f"{path.name} .*{message}") as failure:
            load_dataset("fashion-mnist-lt", data_root=root, **SMALL)
        assert "pass --download, or install Debian's package" in str(failure.value)
        assert "\n" not in str(failure.value)
    path.unlink()
    with pytest.raises(DataError, match=f"contains neither {name} nor {path.name}; delete"):
        load_dataset("fashion-mnist-lt", data_root=root, **SMALL)
    path.with_suffix("").write_bytes(content[:-5])  # not compressed
    with pytest.raises(DataError, match=f"{name} is truncated"):
        load_dataset("fashion-mnist-lt", data_root=root, **SMALL)


@pytest.mark.parametrize("one", NAMES)
@pytest.mark.parametrize("other", NAMES)
def test_swapped_files_are_named(one: str, other: str, root: Path) -> None:
    _swap(root, one, other)
    if one == other:
        assert load_dataset("fashion-mnist-lt", data_root=root, **SMALL).counts[0] == 20
        return
    with pytest.raises(
        DataError, match=rf"({one}.gz contains {other}|{other}.gz contains {one}) inst"
    ):
        load_dataset("fashion-mnist-lt", data_root=root, **SMALL)


def test_damage_in_debians_folder_is_repaired_by_apt(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fashion_mnist, "DEBIAN", root)
    (root / f"{NAMES[0]}.gz").unlink()
    with pytest.raises(DataError, match="apt-get install --reinstall dataset-fashion-mnist"):
        load_dataset("fashion-mnist-lt", data_root=tmp_path)


@pytest.mark.parametrize("method", ["ce", "ce-drw", "ldam-drw", "vs"])
@pytest.mark.parametrize("optimizer", ["sgd", "sam"])
def test_the_recipe_is_cifar10s_in_60_epochs_and_says_so(method: str, optimizer: str) -> None:
    ours = recipe("fashion-mnist-lt", method, optimizer)
    theirs = recipe("cifar10-lt", method, optimizer, epochs=60, model="resnet8").config().as_dict()
    values = ours.config().as_dict()
    different = {n for n in {**values, **theirs} if values.get(n) != theirs.get(n)}
    assert different == {"data", "n_max", "validation_per_class"}
    assert (values["lr_milestones"], values["n_max"]) == ([48, 54], 5000)
    assert values.get("defer_epoch", 48) == 48
    for name in ("lr", "epochs", "weight_decay", *(["rho"] if optimizer == "sam" else [])):
        assert ours.sources[name].endswith("(not a published value)")
    assert "not tuned" in ours.sources["lr"]


def test_commands(root: Path, tmp_path: Path, capsys: Any) -> None:
    small = ["--n-max", "20", "--validation-per-class", "5", "--imbalance", "10"]
    assert main(["data", "check", "fashion-mnist-lt", "--root", str(root), *small]) == 0
    output = capsys.readouterr().out
    for line in (
        "fashion-mnist-lt: 10 classes, 2 to 20 training images",
        "validation: 50 images",
        "test: 40 images",
        f"files: {root}, each with the SHA-256",
    ):
        assert line in output
    show = ["data", "show", "fashion-mnist-lt", "--root", str(root), *small]
    assert main([*show, "--out", str(tmp_path / "sheets"), "--split", "validation"]) == 0
    sheets = sorted(path.name for path in (tmp_path / "sheets").iterdir())
    assert sheets[0] == "0-T-shirt_top-5.png"
    assert len(sheets) == 11
    capsys.readouterr()
    assert main(["recipes", "--names"]) == 0
    assert "fashion-mnist-lt" in capsys.readouterr().out


SUBSETS: dict[tuple[tuple[str, Any], ...], str] = {
    (): "9cd945df90ff2051adba97b88b7746e6b9510f239bc003f4f89d0531595ca076",
    (("validation_seed", 1),): "23495d67cfdea65d848aaf24a2100e3073db7b512dab7ded8b5ca3f1f96b7ab4",
    (("subset_seed", 1),): "84db434bed973bb30e8bd15bbda7ab085aea173d62c6f30102c80dee860cb65b",
    (("imbalance", 50.0),): "4da3c33b3d573a0d2fdc7c39a373185213501f6acfacea137f95c353517e7655",
    (("kind", "step"),): "2e73ec4fcb4f1ba4369bcbec5bccfaf348a38d7b6fc04eb1fa2aaaf0e2ab23f5",
    (("class_order", "0"),): "d0878bd42ec34355703c571a39fe79b9f16c1cdccca75a25d70e6b8228840179",
    (
        ("class_order", "9,8,7,6,5,4,3,2,1,0"),
    ): "db16f24694b87f309bc9b5334df9a9008aad1d8f8a2ca5ed3cc803b6c0bd724a",
    (
        ("n_max", 500),
        ("validation_per_class", 0),
    ): "0f79fcbd88bba5bc6a84d081c7795f0b420e11f2ea101862e600a617ef0f8653",
}
"""SHA-256 of the chosen indices by settings."""
CONTENTS = {
    "train": "07834f7686cfcbdb21ed7ed64f8e911284d8cf875966b45460b2ffe7ee678ba2",
    "validation": "c7511384c6404b18a35d2cd7184d55ec52d9d0a2ad80b4245b15b367887bdf83",
    "test": "36f44a370c1a4e79227169f8140ef8766f4f09baf851a49c0d54e608f944a224",
}
"""SHA-256 of pixels and classes by split, with the default settings."""


@pytest.mark.slow
@INSTALLED
def test_the_named_set() -> None:
    data = load_dataset("fashion-mnist-lt")
    assert data.counts.tolist() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert data.validation is not None
    assert np.bincount(data.validation.targets).tolist() == [1000] * 10
    assert np.bincount(data.test.targets).tolist() == [1000] * 10
    assert data.train.channels == 1
    assert {split: data.contents()[split] for split in CONTENTS} == CONTENTS
    for settings, digest in SUBSETS.items():
        assert load_dataset("fashion-mnist-lt", **dict(settings)).subset_hash == digest
    balanced = load_dataset("fashion-mnist-lt", imbalance=1.0, n_max=6000, validation_per_class=0)
    everything = of(balanced.train) / 255
    assert (everything.mean(), everything.std()) == pytest.approx((0.2860, 0.3530), abs=5e-5)
    assert (balanced.train.mean, balanced.train.std) == ((0.2860,), (0.3530,))


@pytest.mark.slow
@INSTALLED
def test_a_short_run(tmp_path: Path) -> None:
    config = recipe(
        "fashion-mnist-lt",
        "ldam-drw",
        "sam",
        n_max=30,
        imbalance=10,
        validation_per_class=5,
        epochs=2,
        batch_size=32,
    ).config()
    run = Trainer(config, progress=False, out=tmp_path / "run")
    result = run.fit()
    assert result.counts == [30, 23, 17, 13, 10, 8, 6, 5, 3, 3]
    assert result.test.images == 10000
    assert result.validation is not None
    assert result.validation.images == 50
    assert Checkpoint.load(tmp_path / "run").config == config
