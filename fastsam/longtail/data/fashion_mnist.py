"""``fashion-mnist-lt``: Fashion-MNIST (Xiao et al. 2017), 28x28 grayscale images, cut to a long tail."""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from fastsam.extras import requires_extra
from fastsam.longtail.data.catalog import DataSetPart, register_dataset
from fastsam.longtail.data.dataset import LongTailData
from fastsam.longtail.data.long_tailed import LabeledPixels, cut_to_long_tail
from fastsam.longtail.data.shared_recipes import CIFAR
from fastsam.longtail.data.torchvision_sets import NORMALIZATIONS, DownloadSettings
from fastsam.longtail.errors import DataError
from fastsam.longtail.settings import borrowed, layer

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
"""Folder of the files in Debian's package ``dataset-fashion-mnist``."""

SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
"""SHA-256 of the uncompressed files. The archives of Debian and of the authors contain the same files, but
differ in the file name and time that gzip stores."""

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def load_fashion_mnist_lt(settings: DownloadSettings, progress: bool = True) -> LongTailData:
    """Load Fashion-MNIST and cut its training images to a long tail.

    The four files, compressed or not, are searched in ``data_root/FashionMNIST/raw`` (torchvision's folder),
    ``data_root`` and :data:`DEBIAN`. The first folder that has any of them is used. If there is none,
    ``download`` downloads the files.

    Args:
        settings: folder of the files, and the cut.
        progress: not used; loading takes about a second.

    Raises:
        DataError: if a file is missing, truncated or has the wrong SHA-256.
        UsageError: if the cut is not possible; see :func:`cut_to_long_tail`.
    """
    folder = _folder(settings)
    return cut_to_long_tail(
        "fashion-mnist-lt",
        CLASSES,
        _read(folder, "train"),
        _read(folder, "t10k"),
        settings,
        normalization=NORMALIZATIONS["FashionMNIST"],
    )


def _folder(settings: DownloadSettings) -> Path:
    """Return the folder with the files. Download them if there is none and ``download`` is set."""
    torchvision_folder = settings.root / "FashionMNIST" / "raw"
    for folder in (torchvision_folder, settings.root, DEBIAN):
        if any(_path(folder, name).is_file() for name in SHA256):
            return folder
    if not settings.download:
        raise DataError(f"found Fashion-MNIST neither in {settings.root} nor in {DEBIAN}")
    with requires_extra("longtail", "the download of Fashion-MNIST"):
        from torchvision.datasets import FashionMNIST
    try:
        FashionMNIST(str(settings.root), download=True)
    except (RuntimeError, OSError) as error:
        raise DataError(f"cannot download Fashion-MNIST: {error}") from error
    return torchvision_folder


def _path(folder: Path, name: str) -> Path:
    """Return the path of a file in ``folder``, or of its compressed form if the file does not exist."""
    plain = folder / name
    return plain if plain.is_file() else folder / f"{name}.gz"


def _read(folder: Path, split: str) -> LabeledPixels:
    """Read images and classes of ``train`` or ``t10k`` (the test set)."""
    images = _verified(folder, f"{split}-images-idx3-ubyte")
    labels = _verified(folder, f"{split}-labels-idx1-ubyte")
    rows, columns = images[8:16].view(">i4")
    pixels = torch.from_numpy(images[16:].reshape(-1, 1, rows, columns))
    return LabeledPixels(pixels, labels[8:].astype(np.int64))


def _verified(folder: Path, name: str) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Read a file and verify its SHA-256."""
    path = _path(folder, name)
    if not path.is_file():
        raise DataError(f"{folder} contains neither {name} nor {path.name}; {_remedy(folder)}")
    try:
        content = path.read_bytes() if path.suffix != ".gz" else gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is truncated or damaged: {error}; {_remedy(folder)}") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256[name]:
        raise DataError(
            f"{path} {_fault(content, digest)}: SHA-256 of its content is {digest}, expected "
            f"{SHA256[name]}; {_remedy(folder)}"
        )
    return np.frombuffer(bytearray(content), dtype=np.uint8)


def _fault(content: bytes, digest: str) -> str:
    """Describe what is wrong with a file whose SHA-256 is wrong."""
    for name, known in SHA256.items():
        if digest == known:
            return f"contains {name} instead"
    sizes = [int.from_bytes(content[i : i + 4], "big") for i in range(4, len(content[:16]), 4)]
    dimensions = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    whole = 4 + 4 * dimensions + math.prod(sizes[:dimensions])
    if not 1 <= dimensions <= 3:
        return "is not an idx file of bytes"
    if len(content) != whole:
        return f"is truncated or damaged ({len(content)} bytes, {whole} according to its header)"
    return "is damaged or belongs to another data set"


def _remedy(folder: Path) -> str:
    if folder == DEBIAN:
        return "reinstall it with apt-get install --reinstall dataset-fashion-mnist"
    return "delete the files of Fashion-MNIST and download them again, or pass another data_root"


def _checked(settings: DownloadSettings) -> Iterator[str]:
    yield f"files: {_folder(settings)}, each with the SHA-256 of Fashion-MNIST"


register_dataset(
    DataSetPart(
        name="fashion-mnist-lt",
        build=load_fashion_mnist_lt,
        summary="Fashion-MNIST, 28x28 grayscale images of clothing, cut to a long tail",
        settings=DownloadSettings,
        where="pass --download, or install Debian's package dataset-fashion-mnist",
        check=_checked,
        recipe={
            **layer(
                "definition of fashion-mnist-lt",
                imbalance=100.0,
                kind="exp",
                subset_seed=0,
                n_max=5000,
                validation_per_class=1000,
            ),
            **borrowed(CIFAR, "our choice, from the recipe of CIFAR-10-LT; not tuned"),
            **layer(
                "our choice: drops and deferral at 80 % and 90 % of the epochs, as in CIFAR-10-LT; "
                "not tuned",
                known=False,
                model="resnet8",
                epochs=60,
                warmup_epochs=2,
                lr_milestones=(48, 54),
                defer_epoch=48,
            ),
        },
    )
)
