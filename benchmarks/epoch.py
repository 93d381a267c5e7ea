"""One epoch of long-tailed training at the size of CIFAR-10-LT, compared with a typical training script."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.machine import save
from fastsam.longtail import Trainer, recipe
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.data import LongTailData, TensorImages, groups_by_rank
from fastsam.longtail.data.augment import Compose, RandomCrop, RandomHorizontalFlip
from fastsam.longtail.data.subset import longtail_counts, subset_hash
from fastsam.longtail.models import build_model
from fastsam.longtail.results import Epoch
from fastsam.optim.plain import PlainSAM

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


@dataclass(frozen=True, kw_only=True)
class EpochTime:
    """Time an epoch of CE with SAM on random images: reading, augmentation and both passes.

    ``trainer`` is :class:`fastsam.longtail.Trainer`. ``script`` reads PIL images in worker processes, updates
    tensor by tensor, and logs loss and accuracy in every step. The epochs of the two alternate.
    """

    n_max: int = 5000
    """Images of the largest of ten classes. With imbalance 100, 5,000 gives 12,406 images in total."""
    model: str = "resnet32"
    """Network."""
    workers: int = 4
    """Number of worker processes that read images for the script."""
    epochs: int = 3
    """Number of timed epochs of each, after one warm-up epoch."""
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    """Device."""
    save: bool = False
    """Write the results to benchmarks/results/."""
    out: Path | None = None
    """Write the results to this folder instead."""

    def run(self) -> None:
        """Time both, print the results, and save them."""
        data = random_data(self.n_max)
        config = recipe(
            "own:random", "ce", "sam", model=self.model, device=self.device, epochs=self.epochs + 1
        ).config()
        script = script_epoch(data, config, workers=self.workers)
        seconds: dict[str, list[float]] = {"trainer": [], "script": []}

        def after(record: Epoch) -> None:
            seconds["trainer"].append(record.seconds)
            began = time.perf_counter()
            script()
            seconds["script"].append(time.perf_counter() - began)

        Trainer(config, data=data, on_epoch=after, progress=False).fit()
        count = len(data.train)
        results: dict[str, Any] = {"images": count, "model": self.model, "workers": self.workers}
        for name, values in seconds.items():
            median = statistics.median(values[1:])
            results[name] = {"median_seconds": median, "seconds": values}
            print(f"{name:8s} {median:8.2f} s an epoch, {count / median:8.0f} images a second")
        if self.save or self.out is not None:
            print(f"wrote {save('epoch', results, device=self.device, folder=self.out)}")


def random_data(n_max: int) -> LongTailData:
    """Create random images with the shape, counts (imbalance 100) and augmentation of CIFAR-10-LT."""
    draw = np.random.default_rng(0)
    counts = longtail_counts(n_max, 10, 100.0)
    augmentation = Compose((RandomCrop(4), RandomHorizontalFlip()))

    def images(targets: np.ndarray[Any, np.dtype[np.int64]]) -> TensorImages:
        pixels = draw.integers(256, size=(len(targets), 3, 32, 32), dtype=np.uint8)
        return TensorImages(torch.from_numpy(pixels), targets, 255.0, MEAN, STD, augmentation)

    targets = np.repeat(np.arange(10), counts)
    return LongTailData(
        name="random",
        train=images(targets),
        validation=None,
        test=images(np.repeat(np.arange(10), 10)),
        class_names=tuple("0123456789"),
        groups=groups_by_rank(10, (3, 7)),
        subset_hash=subset_hash(np.arange(len(targets))),
    )


class PilImages(Dataset[tuple[Tensor, int]]):
    """The same images as a dataset of single PIL images with torchvision's transforms."""

    def __init__(self, images: TensorImages) -> None:
        from torchvision import transforms

        self._pixels = images.images.permute(0, 2, 3, 1).contiguous().numpy()
        self._targets = images.targets.tolist()
        self._transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an augmented image ``[3, 32, 32]`` and its class."""
        from PIL import Image

        return self._transform(Image.fromarray(self._pixels[index])), self._targets[index]


def script_epoch(data: LongTailData, config: TrainConfig, *, workers: int) -> Callable[[], None]:
    """Return a function that trains one epoch as typical training scripts do."""
    if not isinstance(data.train, TensorImages):
        raise TypeError("expected images in memory, from random_data()")
    device = torch.device(config.device)
    model = build_model(config.model, data.num_classes).to(device)
    optimizer = PlainSAM(
        model.parameters(),
        torch.optim.SGD,
        rho=(config.rho or (0.05,))[0],
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    loader: DataLoader[tuple[Tensor, int]] = DataLoader(
        PilImages(data.train),
        batch_size=config.batch_size,
        shuffle=True,
        num_workers=workers,
        pin_memory=device.type == "cuda",
    )
    logged: list[float] = []

    def epoch() -> None:
        model.train()
        for inputs, targets in loader:
            inputs, targets = (x.to(device, non_blocking=True) for x in (inputs, targets))
            for finish in (optimizer.first_step, optimizer.second_step):
                logits = model(inputs)
                loss = nn.functional.cross_entropy(logits, targets)
                loss.backward()  # type: ignore[no-untyped-call]
                finish(zero_grad=True)
            logged.append(loss.item())
            logged.append(float((logits.argmax(dim=1) == targets).float().mean().item()))

    return epoch
