"""Training images per second of the trainer, and how long it waits for data."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.data_path import write_photographs
from benchmarks.machine import save
from fastsam.longtail import Trainer, recipe
from fastsam.longtail.data import LongTailData, groups_by_rank
from fastsam.longtail.data.files import FileImages, Preparation
from fastsam.longtail.data.lists import ImageList
from fastsam.longtail.data.pack import write_pack
from fastsam.longtail.data.pixels import Reading
from fastsam.longtail.data.subset import subset_hash
from fastsam.longtail.results import Epoch

Source = Literal["fashion", "files", "packed"]
CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Train for a few epochs, and report images per second and the share of time spent waiting for data.

    ``fashion`` are the images of Fashion-MNIST, which stay on the device. ``files`` are generated JPEG
    photographs that worker processes decode, and ``packed`` is a packed copy of them.
    """

    sources: tuple[Source, ...] = ("fashion", "files", "packed")
    """Images to train on."""
    optimizers: tuple[str, ...] = ("sgd", "sam")
    """Optimizers."""
    data_root: Path | None = None
    """Folder of the archives of Fashion-MNIST; None for those that are installed."""
    n_max: int = 5000
    """Images of the largest class of Fashion-MNIST, at imbalance 100."""
    model: str = "resnet32"
    """Network for Fashion-MNIST."""
    file_model: str = "resnet50"
    """Network for the photographs."""
    images: int = 4096
    """Number of photographs in an epoch."""
    different: int = 256
    """Number of different files among them."""
    size: int = 224
    """Height and width of the crops in pixels."""
    batch_size: int = 128
    """Images per batch of Fashion-MNIST."""
    file_batch_size: int = 256
    """Photographs per batch."""
    workers: int = 14
    """Number of worker processes."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the passes over photographs."""
    epochs: int = 3
    """Number of epochs, of which the first is a warm-up."""
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    """Device."""
    save: bool = False
    """Write the results to benchmarks/results/."""
    out: Path | None = None
    """Write the results to this folder instead."""

    def run(self) -> None:
        """Train on every source with every optimizer, print the results, and save them after each run."""
        rows: list[dict[str, Any]] = []
        for source in self.sources:
            with self._data(source) as data:
                for optimizer in self.optimizers:
                    rows.append(
                        {
                            "source": source,
                            "optimizer": optimizer,
                            **self._row(data, source, optimizer),
                        }
                    )
                    print(
                        f"{source:8s} {optimizer:4s} {rows[-1]['images_per_second']:9.0f} images/s, "
                        f"waiting for data {rows[-1]['waiting']:.1%} of the time",
                        flush=True,
                    )
                    self._write(rows)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        if self.save or self.out is not None:
            content = {"workers": self.workers, "rows": rows}
            save("throughput", content, device=self.device, folder=self.out)

    def _row(self, data: LongTailData | None, source: Source, optimizer: str) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "device": self.device,
            "epochs": self.epochs,
            "validate_every": self.epochs,
        }
        if data is None:
            settings |= {"model": self.model, "batch_size": self.batch_size, "n_max": self.n_max}
            if self.data_root is not None:
                settings["data_root"] = str(self.data_root)
            name = "fashion-mnist-lt"
        else:
            settings |= {
                "model": self.file_model,
                "batch_size": self.file_batch_size,
                "precision": self.precision,
                "channels_last": True,
            }
            name = "own:photographs"
        history: list[Epoch] = []
        config = recipe(name, "ce", optimizer, **settings).config()
        Trainer(config, data=data, on_epoch=history.append, progress=False).fit()
        timed = history[1:]
        return {
            "model": config.model,
            "batch_size": config.batch_size,
            "precision": config.precision,
            "images_per_second": statistics.median(e.images_per_second or 0.0 for e in timed),
            "waiting": statistics.median(e.waiting or 0.0 for e in timed),
            "memory_mib": timed[-1].memory,
            "epochs": [e.seconds for e in history],
        }

    @contextmanager
    def _data(self, source: Source) -> Iterator[LongTailData | None]:
        """Yield the photographs; None for Fashion-MNIST, which the trainer loads."""
        if source == "fashion":
            yield None
            return
        with tempfile.TemporaryDirectory() as name:
            root = Path(name)
            write_photographs(root, self.different)
            files = [f"{i}.jpg" for i in range(self.different)]
            pack = write_pack(root, files, Reading()) if source == "packed" else None

            def images(count: int) -> FileImages:
                listed = ImageList(
                    [files[i % self.different] for i in range(count)], np.arange(count) % CLASSES
                )
                preparation = Preparation(size=self.size)
                return FileImages(root, listed, preparation, self.workers, pack=pack)

            yield LongTailData(
                name="photographs",
                train=images(self.images),
                validation=None,
                test=images(CLASSES),
                class_names=tuple("0123456789"),
                groups=groups_by_rank(CLASSES, (3, 7)),
                subset_hash=subset_hash(np.arange(self.images)),
            )
