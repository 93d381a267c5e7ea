"""Mean and standard deviation of the pixels of image files."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from fastsam.longtail.data.cached import cached
from fastsam.longtail.data.files import FileImages
from fastsam.progress import ProgressBar

MOST = 5_000
"""Largest number of images that are read; of more, evenly spaced ones."""
_BATCH = 64
_DIGITS = 4

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel, for pixels in [0, 1]."""


def pixel_statistics(images: FileImages, *, progress: bool = False) -> Statistics:
    """Compute mean and standard deviation of each channel, over images prepared as in evaluation.

    They are rounded to 4 digits, depend on the content of the files only, and are kept in the cache. A
    constant channel gets standard deviation 1.

    Args:
        images: the images.
        progress: show progress: a bar on a terminal, one line per minute elsewhere.
    """
    preprocessing = images.preprocessing
    return cached(
        "computation of mean and standard deviation",
        "statistics",
        images.content(progress=progress),
        {
            "size": list(preprocessing.size),
            "resize": preprocessing.resize,
            "channels": preprocessing.channels,
            "reading": list(images.reading),
            "packed": images.pack is not None,
            "left_out": list(images.left_out),
        },
        lambda: _computed(images, progress=progress),
        to_json=lambda found: [list(values) for values in found],
        from_json=_from_json,
    )


def _computed(images: FileImages, *, progress: bool) -> Statistics:
    channels = images.channels
    plain = replace(images.normalized((0.0,) * channels, (1.0,) * channels), unreadable={})
    places = np.unique(np.linspace(0, len(images) - 1, min(len(images), MOST)).astype(np.int64))
    order = np.array_split(places, -(-len(places) // _BATCH))
    total, squares, pixels = np.zeros(channels), np.zeros(channels), 0
    bar = ProgressBar(
        total=len(places), description="mean and deviation", unit="image", enabled=progress
    )
    with bar:
        for batch in plain.batches(order, None, torch.device("cpu")):
            # NumPy's sums do not depend on the number of threads.
            values = batch.inputs.numpy().astype(np.float64)
            total += values.sum(axis=(0, 2, 3))
            squares += np.square(values).sum(axis=(0, 2, 3))
            pixels += values[:, 0].size
            bar.update(len(values))
    plain.close()
    mean = total / pixels
    std = np.sqrt(np.maximum(squares / pixels - mean**2, 0))
    return (
        tuple(round(float(value), _DIGITS) for value in mean),
        tuple(round(float(value), _DIGITS) or 1.0 for value in std),
    )


def _from_json(values: list[list[float]]) -> Statistics:
    mean, std = (tuple(float(value) for value in part) for part in values)
    if not mean or len(mean) != len(std) or min(std) <= 0:
        raise ValueError("damaged")
    return mean, std
