"""Reading of image files: CPU time of the workers, and time of the part that the device makes."""

from __future__ import annotations

import gc
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import v2

from benchmarks.machine import save
from benchmarks.timing import Ratio, Timing, interleaved
from fastsam.distributed import World
from fastsam.longtail.data import Batch, Draw
from fastsam.longtail.data.device_part import DevicePart
from fastsam.longtail.data.files import FileImages, Preparation
from fastsam.longtail.data.image_source import FileSource, ImageSource
from fastsam.longtail.data.jpeg import torchcodec_decoder
from fastsam.longtail.data.lists import ImageList
from fastsam.longtail.data.normalization import Normalization
from fastsam.longtail.data.pack import Pack, write_pack
from fastsam.longtail.data.pixels import Reading, decode, decode_fast
from fastsam.longtail.data.preprocessing import Preprocessing
from fastsam.longtail.data.resized_crop import cut
from fastsam.longtail.data.workers import Reader, Request, Workers
from fastsam.longtail.samplers import ShuffledSampler
from fastsam.longtail.seeds import Stream, derived_seed
from fastsam.longtail.training.batches import EpochBatches
from fastsam.threads import cpu_threads

HEIGHT, WIDTH, QUALITY = 375, 500, 95
"""Size and JPEG quality of the photographs: those of a typical file of ImageNet."""
BEFORE = "18f5aa7"
"""Commit before the workers handed over bytes."""


@dataclass(frozen=True, kw_only=True)
class DataPath:
    """Time the reading of photographs for training and for evaluation.

    ``fastsam`` decodes and crops in the worker and hands over bytes. ``before`` does what commit 18f5aa7 did:
    every step per image in the worker, in float32, with torch's global generator seeded for each image.
    ``packed`` is fastsam on a packed copy, without decoding.
    ``script`` is a loop as in official training scripts: torchvision's transforms of Pillow images and a
    ``DataLoader``. Each has one worker. The time is CPU time of the worker process, including the transfer to
    the main process.
    """

    images: int = 64
    """Number of different photographs."""
    batch_size: int = 64
    """Images per batch."""
    batches: int = 4
    """Batches per sample."""
    rounds: int = 9
    """Samples of each contestant."""
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    """Device of the part that is made of whole batches."""
    save: bool = False
    """Write the results to benchmarks/results/."""
    out: Path | None = None
    """Write the results to this folder instead."""

    def run(self) -> None:
        """Time the contestants, print the results, and save them."""
        with tempfile.TemporaryDirectory() as name:
            root = Path(name)
            size = write_photographs(root, self.images)
            listed = ImageList([f"{i}.jpg" for i in range(self.images)], np.zeros(self.images, int))
            images = FileImages(root, listed, Preparation())
            content: dict[str, Any] = {
                "settings": {
                    "images": self.images,
                    "height": HEIGHT,
                    "width": WIDTH,
                    "mean_bytes": size,
                    "batch_size": self.batch_size,
                    "batches": self.batches,
                    "workers": 1,
                    "before": BEFORE,
                },
                "torchcodec": torchcodec_decoder() is not None,
                "checks": self._checks(images),
                "worker": {
                    "training": self._race(self._training(images)),
                    "evaluation": self._race(self._evaluation(images)),
                },
                "device_part": self._device_part(images),
            }
        for name, part in content["worker"].items():
            print(f"\n{name}: CPU time of the worker per image")
            for key, row in part.items():
                ratio = row["times_fastsam"]
                print(
                    f"  {key:20s} {row['median'] * 1e3:7.3f} ms  {ratio['median']:5.2f}x fastsam "
                    f"[{ratio['lower']:.2f}, {ratio['upper']:.2f}]"
                )
        print(f"\non {self.device}, per image of a batch:")
        for key, row in content["device_part"].items():
            print(
                f"  {key:20s} {row['median'] * 1e3:7.4f} ms (CPU {row['cpu_median'] * 1e3:.4f} ms)"
            )
        print(content["checks"])
        if self.save or self.out is not None:
            print(f"wrote {save('data_path', content, device=self.device, folder=self.out)}")

    def _order(self, number: int) -> list[NDArray[np.int64]]:
        """Return the images of the batches of a sample, the same for all contestants."""
        order = np.random.default_rng(number).integers(
            0, self.images, (self.batches, self.batch_size)
        )
        return list(order)

    def _training(self, images: FileImages) -> dict[str, Contestant]:
        def fastsam(source: ImageSource) -> Contestant:
            workers = Workers(_reader(images, source=source), 1)

            def read(number: int) -> Iterator[object]:
                order = self._order(number)
                return workers.read(map(Request, order, Draw(0, number).seeds(order)))

            return Contestant(read)

        before = _Before(images, augment=True)
        script = _Script(images, _training_script(images.preparation))
        contestants = {"fastsam": fastsam(FileSource(images.root))}
        if torchcodec_decoder() is not None:
            contestants["fastsam, Pillow"] = fastsam(_PillowSource(images.root))
        contestants["fastsam, packed"] = fastsam(self._pack(images))
        contestants["before"] = Contestant(lambda number: before.read(self._order(number)))
        contestants["script"] = Contestant(lambda number: script.read(self._order(number)))
        return contestants

    def _evaluation(self, images: FileImages) -> dict[str, Contestant]:
        workers = Workers(_reader(images), 1)
        packed = Workers(_reader(images, source=self._pack(images)), 1)
        before = _Before(images, augment=False)
        script = _Script(images, _evaluation_script(images.preparation))
        return {
            "fastsam": Contestant(lambda number: workers.read(map(Request, self._order(number)))),
            "fastsam, packed": Contestant(
                lambda number: packed.read(map(Request, self._order(number)))
            ),
            "before": Contestant(lambda number: before.read(self._order(number))),
            "script": Contestant(lambda number: script.read(self._order(number))),
        }

    def _pack(self, images: FileImages) -> Pack:
        return write_pack(images.root, images.images.paths, Reading())

    def _race(self, contestants: dict[str, Contestant]) -> dict[str, Any]:
        """Measure the contestants in turn, in every round in another order."""
        names = list(contestants)
        taken: dict[str, list[float]] = {name: [] for name in names}
        for contestant in contestants.values():
            contestant.seconds(0)
        for turn in range(1, self.rounds + 1):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                seconds = contestants[name].seconds(turn)
                taken[name].append(seconds / (self.batches * self.batch_size))
        timings = {name: Timing(tuple(v), tuple(v), 1) for name, v in taken.items()}
        contestants.clear()
        gc.collect()  # ends the workers
        base = timings["fastsam"].wall
        return {
            name: {**timing.as_dict(), "times_fastsam": Ratio.of(timing.wall, base).as_dict()}
            for name, timing in timings.items()
        }

    def _device_part(self, images: FileImages) -> dict[str, Any]:
        device = torch.device(self.device)
        order = [np.arange(self.batch_size) % self.images]
        (seeds,) = Draw(0, 1).seeds(order)
        (read,) = Workers(_reader(images), 0).read(
            [Request(order[0], seeds)], pin=device.type == "cuda"
        )
        normalization = Normalization(images.mean, images.std)
        parts = {
            "augment, normalize": DevicePart(normalization, images.preparation.per_batch()),
            "normalize": DevicePart(normalization),
        }
        finish = {name: part.on(device) for name, part in parts.items()}
        with cpu_threads(1):  # as the workers, so that the times can be added on a CPU
            timings = interleaved(
                {name: _bound(function, read) for name, function in finish.items()},
                rounds=self.rounds,
                seconds_per_sample=0.5,
                device=device,
            )
        rows = {}
        for name, timing in timings.items():
            per_image = Timing(
                tuple(seconds / self.batch_size for seconds in timing.wall),
                tuple(seconds / self.batch_size for seconds in timing.cpu),
                timing.calls_per_sample,
            )
            rows[name] = per_image.as_dict()
        return rows

    def _checks(self, images: FileImages) -> dict[str, Any]:
        """Compare pixels with Pillow's, and batches read by several workers and ranks.

        Raises:
            AssertionError: if they differ.
        """
        order = np.arange(self.images)
        (seeds,) = Draw(0, 1).seeds([order])
        crop, largest, decoded_alike = images.preparation.per_image(), 0, True
        for place, path in enumerate(images.images.paths):
            image = decode(images.root / path, Reading()).pixels
            box = crop.box(seeds.take(place), image.height, image.width)  # type: ignore[union-attr]
            part = Image.fromarray(cut(image, box).permute(1, 2, 0).numpy())
            expected = part.resize(crop.shape, Image.Resampling.BILINEAR)
            fast = decode_fast(images.root / path, Reading())
            found = crop(fast, seeds.take(place)).permute(1, 2, 0).int()
            largest = max(largest, int((found - torch.from_numpy(np.array(expected))).abs().max()))
            if isinstance(fast, Tensor):
                whole = torch.from_numpy(np.array(image)).permute(2, 0, 1)
                decoded_alike = decoded_alike and torch.equal(fast, whole)
        if largest > 2 or not decoded_alike:
            raise AssertionError(f"pixels differ from Pillow's by {largest}/255")
        with warnings.catch_warnings():
            # There may be fewer cores than workers here.
            warnings.filterwarnings("ignore", "This DataLoader will create")
            epochs = {
                f"{workers} workers, {ranks} ranks": _epoch(images, workers, ranks, self.batch_size)
                for workers in (0, 2, 4)
                for ranks in (1, 2)
            }
        first = next(iter(epochs.values()))
        for name, epoch in epochs.items():
            if not torch.equal(epoch, first):
                raise AssertionError(f"{name} read other inputs")
        return {
            "largest_difference_from_pillow": largest,
            "torchcodec_has_the_bits_of_pillow": decoded_alike,
            "equal_bits": list(epochs),
        }


class Contestant:
    """Reads batches with one worker.

    Args:
        read: ``read(number)`` starts the reading of sample ``number``.
    """

    def __init__(self, read: Callable[[int], Iterator[object]]) -> None:
        self._read = read
        self._worker: psutil.Process | None = None

    def seconds(self, number: int) -> float:
        """Read a sample, and return the CPU time of the worker in seconds.

        The first call starts the worker and includes its start.
        """
        before = set(psutil.Process().children())
        began = _cpu_seconds(self._worker) if self._worker is not None else 0.0
        for _ in self._read(number):
            pass
        if self._worker is None:
            (self._worker,) = set(psutil.Process().children()) - before
        return _cpu_seconds(self._worker) - began


def write_photographs(root: Path, count: int) -> float:
    """Write JPEG files cut from scikit-learn's two photographs, and return their mean size in bytes.

    Args:
        root: folder for ``0.jpg``, ``1.jpg``, ...
        count: number of files.
    """
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    photographs = load_sample_images().images
    sizes = []
    for number in range(count):
        whole = photographs[number % len(photographs)]
        top = int(rng.integers(whole.shape[0] - HEIGHT + 1))
        left = int(rng.integers(whole.shape[1] - WIDTH + 1))
        part = whole[top : top + HEIGHT, left : left + WIDTH, rng.permutation(3)]
        path = root / f"{number}.jpg"
        Image.fromarray(np.ascontiguousarray(part)).save(path, quality=QUALITY)
        sizes.append(path.stat().st_size)
    return float(np.mean(sizes))


class _PillowSource(FileSource):
    """Files that TorchCodec does not decode."""

    def pixels(self, path: str) -> Any:
        return self.picture(path)


def _reader(images: FileImages, *, source: ImageSource | None = None) -> Reader:
    return Reader(
        source or FileSource(images.root),
        images.images,
        plain=images.preprocessing.resized,
        augmented=images.preparation.per_image(),
    )


class _Before(Dataset[Any]):
    """The reader of commit 18f5aa7."""

    def __init__(self, images: FileImages, *, augment: bool) -> None:
        preparation = images.preparation
        self.images = images
        self.augment = augment
        self.augmented = v2.Compose(
            [
                v2.RandomResizedCrop(preparation.size),
                v2.RandomHorizontalFlip(),
                v2.ColorJitter(*(preparation.jitter,) * 3, 0.0),
            ]
        )
        self.preprocessing: Preprocessing = images.preprocessing
        self.requests: list[NDArray[np.int64]] = []
        self.loader: DataLoader[Any] = DataLoader(
            self,
            batch_size=None,
            sampler=self.requests,
            num_workers=1,
            collate_fn=_stacked,
            persistent_workers=True,
            generator=torch.Generator(),
        )

    def read(self, order: Sequence[NDArray[np.int64]]) -> Iterator[object]:
        self.requests[:] = order
        return iter(self.loader)

    def __getitem__(self, samples: NDArray[np.int64]) -> list[tuple[Tensor, int, int]]:
        return [(self._one(sample), 0, sample) for sample in samples.tolist()]

    def _one(self, sample: int) -> Tensor:
        image = decode(self.images.root / self.images.images.paths[sample], Reading()).pixels
        if not self.augment:
            return self._normalized(v2.functional.pil_to_tensor(self._resized(image)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(0, Stream.AUGMENT, 1, sample))
            return self._normalized(v2.functional.pil_to_tensor(self.augmented(image)))

    def _resized(self, image: Any) -> Any:
        resized = v2.functional.resize(image, [self.preprocessing.resize or 0])
        return v2.functional.center_crop(resized, list(self.preprocessing.size))

    def _normalized(self, pixels: Tensor) -> Tensor:
        mean, std = (
            torch.tensor(values)[:, None, None] for values in (self.images.mean, self.images.std)
        )
        return (pixels.float() / 255 - mean) / std


class _Script(Dataset[Any]):
    """A data set and a loader as in official training scripts."""

    def __init__(self, images: FileImages, transform: Callable[[Any], Tensor]) -> None:
        self.paths = [images.root / path for path in images.images.paths]
        self.transform = transform
        self.requests: list[list[int]] = []
        self.loader: DataLoader[Any] = DataLoader(
            self,
            batch_sampler=self.requests,
            num_workers=1,
            persistent_workers=True,
            generator=torch.Generator(),
        )

    def read(self, order: Sequence[NDArray[np.int64]]) -> Iterator[object]:
        self.requests[:] = [batch.tolist() for batch in order]
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        with self.paths[index].open("rb") as file:
            image = Image.open(file).convert("RGB")
        return self.transform(image), 0, index


def _training_script(preparation: Preparation) -> Callable[[Any], Tensor]:
    composed: Callable[[Any], Tensor] = transforms.Compose(
        [
            transforms.RandomResizedCrop(preparation.size),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(*(preparation.jitter,) * 3, 0.0),
            transforms.ToTensor(),
            transforms.Normalize(preparation.mean, preparation.std),
        ]
    )
    return composed


def _evaluation_script(preparation: Preparation) -> Callable[[Any], Tensor]:
    composed: Callable[[Any], Tensor] = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(preparation.size),
            transforms.ToTensor(),
            transforms.Normalize(preparation.mean, preparation.std),
        ]
    )
    return composed


def _stacked(samples: list[tuple[Tensor, int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    inputs, targets, indices = zip(*samples, strict=True)
    return torch.stack(inputs), torch.tensor(targets), torch.tensor(indices)


def _epoch(images: FileImages, workers: int, ranks: int, batch_size: int) -> Tensor:
    """Read an epoch on every rank, and return the inputs in the order of the images."""
    own = FileImages(images.root, images.images, images.preparation, workers)
    parts: list[Batch] = []
    for rank in range(ranks):
        batches = EpochBatches(
            own,
            ShuffledSampler(len(own), seed=0),
            batch_size=batch_size // 2,
            views=1,
            augment=True,
            seed=0,
            device=torch.device("cpu"),
            world=World(rank, ranks),
        )
        parts += batches.read(1)
    own.close()
    inputs = torch.cat([part.inputs for part in parts])
    return inputs[torch.cat([part.indices for part in parts]).argsort()]


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _bound(function: Callable[[Any], object], value: Any) -> Callable[[], object]:
    return lambda: function(value)
