"""A calibration of a trained classifier, and the file that keeps it."""

from __future__ import annotations

import base64
import hashlib
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastsam import files
from fastsam.longtail.calibrators import CALIBRATORS, TrainedHead
from fastsam.longtail.errors import CheckpointError, DamagedError
from fastsam.longtail.models.heads import AffineHead
from fastsam.records import build

FORMAT = "fastsam-calibration"
VERSION = 1


@dataclass(frozen=True)
class CalibratorScore:
    """What the best candidate of a calibrator reaches on the validation images.

    Attributes:
        calibrator: its name.
        parameters: parameters of the candidate, without its tensors.
        balanced: mean over classes of the percentage that is right.
        nll: mean negative log-likelihood at ``temperature``.
        temperature: the one that minimizes ``nll``; None where no finite temperature does, and 1 is used.
    """

    calibrator: str
    parameters: dict[str, Any]
    balanced: float
    nll: float
    temperature: float | None

    @property
    def described(self) -> str:
        """The parameters as text; ``-`` for none."""
        return _described(self.parameters) or "-"


@dataclass(frozen=True, eq=False)
class Calibration:
    """A change of the classifier of one trained run, chosen on its validation images.

    Attributes:
        calibrator: name of the calibrator that was chosen.
        parameters: its parameters: plain values, and float32 tensors.
        temperature: logits are divided by it.
        scores: the best candidate of every calibrator that was tried.
        images: number of validation images.
        weights: SHA-256 of the weights that it belongs to.
        refused: reason by name for each calibrator that has no meaning for the run.

    Example:
        >>> score = CalibratorScore("logit-adjustment", {"tau": 1.0}, 90.0, 0.31, 1.7)
        >>> found = Calibration("logit-adjustment", {"tau": 1.0}, 1.7, (score,), 240, "12ab")
        >>> trained = TrainedHead(nn.Identity(), 1.0, np.array([3, 1]))
        >>> found.head(trained)(torch.zeros(1, 2)).softmax(dim=1)
        tensor([[0.3438, 0.6562]])
    """

    calibrator: str
    parameters: dict[str, Any]
    temperature: float
    scores: tuple[CalibratorScore, ...]
    images: int
    weights: str
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def described(self) -> str:
        """Calibrator, plain parameters and temperature as text."""
        plain = {k: v for k, v in self.parameters.items() if not isinstance(v, Tensor)}
        words = (f"{self.calibrator} {_described(plain)}".rstrip(), f"T {self.temperature:.4g}")
        return ", ".join(words)

    def head(self, trained: TrainedHead) -> nn.Module:
        """The calibrated head: maps features ``[B, D]`` to logits ``[B, C]`` whose softmax is calibrated.

        Args:
            trained: the head as it was trained.

        Raises:
            UsageError: the calibrator is not known here.
            CheckpointError: its parameters are of another version of the calibrator.
        """
        calibrator = CALIBRATORS[self.calibrator]
        try:
            head = calibrator.build(self.parameters, trained)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"the parameters of calibrator {self.calibrator} are of another version "
                f"({type(error).__name__}: {error}); run `fastsam calibrate` again"
            ) from error
        return AffineHead(head, 1 / self.temperature, torch.zeros(len(trained.counts)))

    def check_weights(self, weights: str, path: str | Path) -> None:
        """Raise :class:`CheckpointError` unless the calibration belongs to these weights.

        Args:
            weights: what :func:`weights_hash` says of the run.
            path: file of the calibration, for the message.
        """
        if weights != self.weights:
            raise CheckpointError(
                f"{path} is the calibration of other weights (SHA-256 {self.weights[:8]} there, "
                f"{weights[:8]} in the run); run `fastsam calibrate` again, remove the file, or pass "
                "--uncalibrated"
            )

    def save(self, path: str | Path) -> None:
        """Write JSON with a checksum, atomically; tensors are base64 of their float32 values."""
        values = {name: _plain(value) for name, value in self.parameters.items()}
        document = {
            "format": FORMAT,
            "version": VERSION,
            **asdict(replace(self, parameters=values)),
        }
        files.write_text(Path(path), files.to_json(document))

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what :meth:`save` wrote.

        Raises:
            CheckpointError: there is no such file, or a later version of fastsam wrote it.
            DamagedError: the file is something else, or was damaged or edited.
        """
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"no calibration at {path}; `fastsam calibrate RUN` makes one")
        try:
            values = files.from_json(path.read_text("utf-8"))
            if values.pop("format", None) != FORMAT:
                raise ValueError("it is something else")
            version = values.pop("version", None)
            if version == VERSION:
                calibration = build(cls, values)
                calibration._check()
                parameters = {
                    name: _tensor(value) if isinstance(value, dict) else value
                    for name, value in calibration.parameters.items()
                }
                return replace(calibration, parameters=parameters)
        except ValueError as error:
            raise DamagedError(
                f"{path} cannot be read as a calibration: {error}; run `fastsam calibrate` again, or "
                "remove the file"
            ) from error
        raise CheckpointError(
            f"{path} has calibration version {version!r:.20}, this package reads {VERSION}; run "
            "`fastsam calibrate` again"
        )

    def _check(self) -> None:
        """Raise ValueError if a field cannot be."""
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature must be finite and above 0, got {self.temperature}")
        if self.images < 1:
            raise ValueError(f"images must be at least 1, got {self.images}")


def calibration_path(run: Path) -> Path:
    """Where the calibration of a run lies.

    Args:
        run: the run's folder, or the file of one of its checkpoints.

    Example:
        >>> calibration_path(Path("runs/sam/epoch-160.pt")).name
        'epoch-160.calibration.json'
        >>> calibration_path(Path("runs/sam/checkpoint.pt")).name
        'calibration.json'
    """
    if run.is_dir():
        return run / "calibration.json"
    if run.name == "checkpoint.pt":
        return run.with_name("calibration.json")
    return run.with_name(f"{run.stem}.calibration.json")


def weights_hash(*modules: nn.Module) -> str:
    """Return the SHA-256 of names, shapes and values of all weights and buffers.

    Args:
        *modules: the modules in a fixed order.

    Returns:
        64 hexadecimal digits; the same on machines of either byte order.
    """
    digest = hashlib.sha256()
    for number, module in enumerate(modules):
        for name, value in sorted(module.state_dict().items()):
            array = value.detach().cpu().contiguous().numpy()
            digest.update(f"{number} {name} {array.dtype.name} {array.shape}\n".encode())
            digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


def _described(parameters: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in parameters.items())


def _plain(value: Any) -> Any:
    """A parameter as it stands in the file."""
    if not isinstance(value, Tensor):
        return value
    array = value.detach().cpu().float().contiguous().numpy()
    content = base64.b64encode(array.astype("<f4").tobytes()).decode("ascii")
    return {"float32": content, "shape": list(array.shape)}


def _tensor(value: dict[str, Any]) -> Tensor:
    """The tensor that :func:`_plain` wrote.

    Raises:
        ValueError: it is something else.
    """
    if value.keys() != {"float32", "shape"}:
        raise ValueError("a parameter is neither a plain value nor a tensor")
    try:
        content = base64.b64decode(value["float32"], validate=True)
        array = np.frombuffer(content, dtype="<f4").reshape(value["shape"])
    except TypeError as error:
        raise ValueError(f"a tensor cannot be read: {error}") from error
    return torch.from_numpy(array.astype(np.float32))
