"""Losses at numbered points, kept in a JSON file from which an interrupted call continues."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastsam.curvature.mean_loss import MeanLoss
from fastsam.files import from_json, to_json, write_text
from fastsam.progress import ProgressBar

_WRITE_SECONDS = 1.0
"""Least time between two writes, so that the file of a fast surface is not written at every point."""
_SAME_LOSS = 1e-4
"""Relative difference of two losses of the same weights that rounding may cause."""

Values = list[float | None]
_Built = TypeVar("_Built")


@dataclass(frozen=True)
class PointsFile:
    """A file of losses at numbered points.

    Attributes:
        path: a ``.json`` file.
        mark: name of the kind of file, which its content carries.
    """

    path: Path
    mark: str

    def __post_init__(self) -> None:
        """Raise ValueError for another suffix."""
        if self.path.suffix != ".json":
            raise ValueError(f"path must be a .json file, got {self.path.name!r}")

    def write(self, content: Mapping[str, Any]) -> None:
        """Write the content atomically."""
        write_text(self.path, to_json({self.mark: 1, **content}))

    def read(self) -> dict[str, Any]:
        """Read the content.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is of another kind, or it is damaged.
        """
        try:
            content = from_json(self.path.read_text("utf-8"))
            if content.pop(self.mark, None) != 1:
                raise ValueError(f"it has no {self.mark!r}")
        except ValueError as error:
            raise ValueError(
                f"{self.path} was not written by fastsam for this purpose, or it is damaged: {error}"
            ) from error
        return content

    def load(self, build: Callable[[dict[str, Any]], _Built]) -> _Built:
        """Build a result from a file in which no point is missing.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: as in :meth:`read`, or points or fields are missing.
        """
        content = self.read()
        losses = content.get("losses", [])
        missing = sum(loss is None for loss in losses)
        if missing:
            raise ValueError(
                f"{self.path} has {len(losses) - missing} of {len(losses)} points; repeat the call "
                "that writes it to compute the rest"
            )
        try:
            return build(content)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path} is damaged: {error!r}") from error


def evaluate_points(
    evaluate: Callable[[int], tuple[float, float | None]],
    count: int,
    *,
    head: Mapping[str, Any],
    file: PointsFile | None,
    description: str,
    progress: bool,
) -> dict[str, Any]:
    """Return ``head`` with the losses and metrics of all points, in the form of the file.

    Args:
        evaluate: returns the loss and the metric at a point.
        count: number of points.
        head: all other content of the file, with a ``"fingerprint"`` of what determines the values,
            and the ``"loss"`` and the ``"metric"`` at a reference point.
        file: where values are stored, at most once a second and when the call ends in any way. Those
            that it already has are not computed again.
        description: label of the progress bar.
        progress: whether to show progress.

    Raises:
        ValueError: the file is damaged or belongs to other points.
    """
    losses: Values = [None] * count
    metrics: Values = [None] * count
    if file is not None and file.path.exists():
        losses, metrics = _stored(file, count, head)

    def content() -> dict[str, Any]:
        return {**head, "losses": losses, "metrics": metrics}

    written = time.monotonic()
    with ProgressBar(total=count, description=description, unit="point", enabled=progress) as bar:
        try:
            for index in range(count):
                if losses[index] is None:
                    losses[index], metrics[index] = evaluate(index)
                    if file is not None and time.monotonic() - written >= _WRITE_SECONDS:
                        file.write(content())
                        written = time.monotonic()
                bar.update()
        finally:
            if file is not None:
                file.write(content())
    return content()


def _stored(file: PointsFile, count: int, head: Mapping[str, Any]) -> tuple[Values, Values]:
    """Return the losses and metrics in a file, after a check that they belong to the same points."""
    stored = file.read()
    losses, metrics = stored.get("losses"), stored.get("metrics")
    if (
        stored.get("fingerprint") != head["fingerprint"]
        or not isinstance(losses, list)
        or not isinstance(metrics, list)
        or not len(losses) == len(metrics) == count
        or not _same(stored.get("loss"), head["loss"])
        # Files of earlier versions do not have it; the fingerprint tells whether there is a metric.
        or (stored.get("metric") is not None and not _same(stored["metric"], head["metric"]))
    ):
        raise ValueError(
            f"{file.path} holds the losses of other points: the parameters, directions, coordinates, "
            "data, loss or metric differ. Pass another path, or remove the file"
        )
    return losses, metrics


def _same(first: Any, second: float | None) -> bool:
    if not isinstance(first, float) or second is None:
        return first is None and second is None
    return math.isclose(first, second, rel_tol=_SAME_LOSS) or (first != first and second != second)


def fingerprint_of(mean: MeanLoss, *parts: Tensor | str) -> str:
    """Return a checksum of the data and dtype of a mean loss and of ``parts``.

    The loss function is not part of it, because functions have no checksum. Files therefore also hold
    the loss and the metric at a reference point.
    """
    checksum = hashlib.blake2b(digest_size=16)
    checksum.update(f"{mean.batches.fingerprint} {mean.loss.dtype}".encode())
    for part in parts:
        if isinstance(part, Tensor):
            raw = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            checksum.update(f" {tuple(part.shape)} ".encode() + raw.numpy().tobytes())
        else:
            checksum.update(f" {part} ".encode())
    return checksum.hexdigest()
