"""Small data sets in the true on-disk formats."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def write_cifar10(root: Path, *, per_class: int, test_per_class: int) -> dict[str, str]:
    """The python version of CIFAR-10, with fewer images; returns the MD5 of every file."""
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
    """The python version of CIFAR-100, with fewer images; returns the MD5 of every file."""
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


def _dump(path: Path, content: Any) -> str:
    path.write_bytes(pickle.dumps(content))
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_image(path: Path, label: int, rng: np.random.Generator) -> None:
    """A JPEG whose colour shows its class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 60, (24, 20, 3)) + np.array([label * 40, 90, 255 - label * 40]) // 2
    Image.fromarray(pixels.astype(np.uint8)).save(path, quality=95)


def write_listed(root: Path, lists: dict[str, tuple[str, list[int]]]) -> None:
    """List files ``name: (folder, images of each class)`` and the images that they name."""
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
    """The competition's JSON for images of ``counts`` classes, in mixed order."""
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
