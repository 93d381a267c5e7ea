"""Reading for another device: few copies, no synchronization, and the same images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastsam.longtail.data import Draw, Images, TensorImages
from fastsam.longtail.data.augment import Compose, RandomCrop, RandomHorizontalFlip
from fastsam.longtail.data.batch import Batch
from fastsam.longtail.data.files import FileImages, Preparation
from fastsam.longtail.data.lists import ImageList
from python_tests.longtail.archives import write_listed

ORDER = np.array_split(np.random.default_rng(0).permutation(23), 5)


def in_memory() -> TensorImages:
    pixels = np.random.default_rng(1).integers(0, 256, (23, 3, 7, 9), dtype=np.uint8)
    return TensorImages(
        torch.from_numpy(pixels),
        np.arange(23) % 4,
        white=255.0,
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.3, 0.1),
        augmentation=Compose((RandomCrop(2), RandomHorizontalFlip())),
    )


def in_files(root: Path) -> FileImages:
    write_listed(root, {"train.txt": ("train", [23])})
    paths, targets = zip(*(line.split() for line in (root / "train.txt").open()), strict=True)
    labels = np.array([int(target) for target in targets])
    return FileImages(root, ImageList(list(paths), labels), Preparation(size=16))


def read(images: Images, device: str, order: Any = ORDER, *, augment: bool = True) -> list[Batch]:
    there = torch.device(device)
    return list(images.batches(order, Draw(3, 1) if augment else None, there))


class Copies(TorchDispatchMode):
    """Counts copies to a named device."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("device") is not None:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def test_copies_do_not_grow_with_the_number_of_batches() -> None:
    """Runs on the meta device, which needs no GPU."""
    images = in_memory()
    with Copies() as first:
        read(images, "meta", augment=False)
    assert tuple(images.images.shape) in first.shapes
    counts = []
    for order in ([np.arange(23)], ORDER):
        with Copies() as copies:
            batches = read(images, "meta", order, augment=False)
        assert [len(batch.targets) for batch in batches] == [len(chosen) for chosen in order]
        counts.append(sorted(copies.shapes))
    assert counts[0] == counts[1] == [(), (3, 1, 1), (3, 1, 1), (23,), (23,)]
    images.images = images.images[:, :, :5].clone()
    assert read(images, "meta")[0].inputs.shape[2] == 5


def test_nothing_to_read() -> None:
    assert read(in_memory(), "cpu", []) == []


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["memory", "files"])
def test_a_gpu_is_sent_batches_without_waiting_for_it(kind: str, tmp_path: Path) -> None:
    images: Images = in_memory() if kind == "memory" else in_files(tmp_path)
    read(images, "cuda")  # the images, and the initialization of the device
    with waiting_is_an_error():
        batches = read(images, "cuda")
    for there, here in zip(batches, read(images, "cpu"), strict=True):
        assert there.inputs.device.type == "cuda"
        assert torch.equal(there.targets.cpu(), here.targets)
        assert torch.equal(there.indices.cpu(), here.indices)
        torch.testing.assert_close(there.inputs.cpu(), here.inputs)
