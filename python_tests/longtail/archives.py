"""Small data sets in the original file formats."""

from __future__ import annotations

import gzip
import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.io import savemat


def write_cifar10(root: Path, *, per_class: int, test_per_class: int) -> dict[str, str]:
    """Write the Python version of CIFAR-10 with fewer images; return the MD5 of every file."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(10), per_class))
    parts = {f"data_batch_{i + 1}": part for i, part in enumerate(np.array_split(labels, 5))}
    parts["test_batch"] = np.repeat(np.arange(10), test_per_class)
    sums = {}
    for name, part in parts.items():
        data = rng.integers(0, 256, (len(part), 3072), dtype=np.uint8)
        sums[name] = _dump(
            folder / name, {"batch_label": name, "labels": part.tolist(), "data": data}
        )
    names = [
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ]
    sums["batches.meta"] = _dump(folder / "batches.meta", {"label_names": names})
    return sums


def write_cifar100(root: Path, *, per_class: int, test_per_class: int) -> dict[str, str]:
    """Write the Python version of CIFAR-100 with fewer images; return the MD5 of every file."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    sums = {}
    for name, count in (("train", per_class), ("test", test_per_class)):
        fine = rng.permutation(np.repeat(np.arange(100), count))
        data = rng.integers(0, 256, (len(fine), 3072), dtype=np.uint8)
        content = {
            "fine_labels": fine.tolist(),
            "coarse_labels": (fine // 5).tolist(),
            "data": data,
        }
        sums[name] = _dump(folder / name, content)
    meta = {"fine_label_names": [f"class{i}" for i in range(100)], "coarse_label_names": []}
    sums["meta"] = _dump(folder / "meta", meta)
    return sums


def write_mnist(
    folder: Path,
    *,
    per_class: int,
    test_per_class: int,
    prefixes: tuple[str, str] = ("train", "t10k"),
    labels: range = range(10),
    compressed: bool = False,
) -> dict[str, str]:
    """Write the idx files of a data set like MNIST with fewer images; return the SHA-256 of each content."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    sums = {}
    for prefix, count in zip(prefixes, (per_class, test_per_class), strict=True):
        targets = rng.permutation(np.repeat(np.array(labels, dtype=np.uint8), count))
        pixels = rng.integers(0, 256, (len(targets), 28, 28), dtype=np.uint8)
        for name, array in (("images-idx3-ubyte", pixels), ("labels-idx1-ubyte", targets)):
            content = idx_content(array)
            path = folder / f"{prefix}-{name}{'.gz' if compressed else ''}"
            path.write_bytes(gzip.compress(content, mtime=0) if compressed else content)
            sums[f"{prefix}-{name}"] = hashlib.sha256(content).hexdigest()
    return sums


def idx_content(array: NDArray[np.uint8]) -> bytes:
    """Encode an array of bytes in the idx format."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes()
    return header + array.tobytes()


def write_svhn(root: Path, counts: list[int], *, test_per_class: int) -> dict[str, str]:
    """Write SVHN's two files with ``counts`` images of the digits 0, 1, ...; return the MD5 of each."""
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    sums = {}
    for split, of_class in (("train", counts), ("test", [test_per_class] * 10)):
        digits = rng.permutation(np.repeat(np.arange(10), of_class))
        pixels = rng.integers(0, 256, (32, 32, 3, len(digits)), dtype=np.uint8)
        path = root / f"{split}_32x32.mat"
        savemat(path, {"X": pixels, "y": np.where(digits == 0, 10, digits)[:, None]})
        sums[split] = hashlib.md5(path.read_bytes()).hexdigest()
    return sums


def _dump(path: Path, content: Any) -> str:
    path.write_bytes(pickle.dumps(content))
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_image(path: Path, label: int, rng: np.random.Generator) -> None:
    """Encode a JPEG whose color depends on its class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 60, (24, 20, 3)) + np.array([label * 40, 90, 255 - label * 40]) // 2
    Image.fromarray(pixels.astype(np.uint8)).save(path, quality=95)


def write_listed(root: Path, lists: dict[str, tuple[str, list[int]]]) -> None:
    """Write list files ``name: (folder, images of each class)`` and their images."""
    rng = np.random.default_rng(1)
    for name, (folder, counts) in lists.items():
        lines = []
        for label, count in enumerate(counts):
            for number in range(count):
                path = f"{folder}/n{label:08d}/{Path(name).stem}_{number}.JPEG"
                write_image(root / path, label, rng)
                lines.append(f"{path} {label}\n")
        (root / name).write_text("".join(lines))


def write_inaturalist_json(path: Path, counts: list[int]) -> None:
    """Write the competition's JSON for images of ``counts`` classes, in mixed order."""
    images, annotations = [], []
    labels = np.random.default_rng(2).permutation(np.repeat(np.arange(len(counts)), counts))
    for number, label in enumerate(labels.tolist()):
        name = f"train_val2018/Aves/{label}/{number:032x}.jpg"
        images.append({"id": 1000 + number, "file_name": name, "width": 8, "height": 8})
        annotations.append({"id": number, "image_id": 1000 + number, "category_id": label})
    categories = [{"id": label, "name": f"species {label}"} for label in range(len(counts))]
    path.write_text(
        json.dumps({"images": images, "annotations": annotations[::-1], "categories": categories})
    )
