"""Calibrations of trained classifiers, and their files."""

from __future__ import annotations

import base64
import hashlib
import math
import sys
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
    """Validation scores of the best candidate of a calibrator.

    Attributes:
        calibrator: name of the calibrator.
        parameters: parameters of the candidate, without tensors.
        balanced: balanced accuracy (mean over classes) in percent.
        nll: mean negative log-likelihood at ``temperature``, in nats.
        temperature: temperature that minimizes ``nll``; None if no finite temperature does, and 1 is used.
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
    """A change of the classifier of a trained run, chosen on its validation images.

    Attributes:
        calibrator: name of the chosen calibrator.
        parameters: parameters of the calibrator: JSON values and float32 tensors.
        temperature: divisor of the logits.
        scores: score of the best candidate of every calibrator that was tried.
        images: number of validation images.
        weights: SHA-256 of the weights of the run.
        refused: reasons why calibrators could not be applied, by name.

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
        """Return the calibrated head, which maps features ``[B, D]`` to logits ``[B, C]`` for softmax.

        Args:
            trained: the trained head.

        Raises:
            UsageError: if the calibrator is unknown.
            CheckpointError: if another version of the calibrator wrote the parameters.
        """
        calibrator = CALIBRATORS[self.calibrator]
        try:
            head = calibrator.build(self.parameters, trained)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"another version of calibrator {self.calibrator} wrote its parameters "
                f"({type(error).__name__}: {error}); run `fastsam calibrate` again"
            ) from error
        return AffineHead(head, 1 / self.temperature, torch.zeros(len(trained.counts)))

    def check_weights(self, weights: str, path: str | Path) -> None:
        """Raise :class:`CheckpointError` unless the calibration belongs to these weights.

        Args:
            weights: :func:`modules_hash` of the run.
            path: path of the calibration, for the message.
        """
        if weights != self.weights:
            raise CheckpointError(
                f"{path} belongs to other weights (SHA-256 {self.weights[:8]}, but {weights[:8]} in the "
                "run); run `fastsam calibrate` again, remove the file, or pass --uncalibrated"
            )

    def save(self, path: str | Path) -> None:
        """Write JSON with a checksum, atomically. Tensors are stored as base64 of their float32 values."""
        values = {name: _plain(value) for name, value in self.parameters.items()}
        document = {
            "format": FORMAT,
            "version": VERSION,
            **asdict(replace(self, parameters=values)),
        }
        files.write_text(Path(path), files.to_json(document))

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Load a file written by :meth:`save`.

        Raises:
            CheckpointError: if the file is missing, or another version of fastsam wrote it.
            DamagedError: if the file is not a calibration, or was damaged or edited.
        """
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"no calibration at {path}; run `fastsam calibrate RUN` first")
        try:
            values = files.from_json(path.read_text("utf-8"))
            if values.pop("format", None) != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
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
                f"cannot read {path} as a calibration: {error}; run `fastsam calibrate` again or remove the "
                "file"
            ) from error
        raise CheckpointError(
            f"{path} has calibration version {version!r:.20}, but this version of fastsam reads {VERSION}; "
            "run `fastsam calibrate` again"
        )

    def _check(self) -> None:
        """Raise ValueError if a field is out of range."""
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature must be finite and above 0, got {self.temperature}")
        if self.images < 1:
            raise ValueError(f"images must be at least 1, got {self.images}")


def calibration_path(run: Path) -> Path:
    """Return the path of a run's calibration.

    Args:
        run: folder of the run, or a checkpoint file in it.

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


def modules_hash(*modules: nn.Module) -> str:
    """Return the SHA-256 of names, shapes and values of all weights and buffers.

    Args:
        *modules: the modules. The hash depends on their order.

    Returns:
        64 hexadecimal digits, which do not depend on the byte order of the machine.
    """
    digest = hashlib.sha256()
    for number, module in enumerate(modules):
        for name, value in sorted(module.state_dict().items()):
            dtype = str(value.dtype).removeprefix("torch.")
            digest.update(f"{number} {name} {dtype} {tuple(value.shape)}\n".encode())
            flat = value.detach().cpu().reshape(-1)
            content = flat.view(torch.uint8).reshape(len(flat), -1)  # NumPy has no bfloat16
            digest.update(
                (content if sys.byteorder == "little" else content.flip(1)).numpy().tobytes()
            )
    return digest.hexdigest()


def _described(parameters: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in parameters.items())


def _plain(value: Any) -> Any:
    """Convert a parameter to a JSON value."""
    if not isinstance(value, Tensor):
        return value
    array = value.detach().cpu().float().contiguous().numpy()
    content = base64.b64encode(array.astype("<f4").tobytes()).decode("ascii")
    return {"float32": content, "shape": list(array.shape)}


def _tensor(value: dict[str, Any]) -> Tensor:
    """Convert the JSON value of a tensor, written by :func:`_plain`, back to the tensor.

    Raises:
        ValueError: if it is not the value of a tensor.
    """
    if value.keys() != {"float32", "shape"}:
        raise ValueError("a parameter is neither a number, a string nor a tensor")
    try:
        content = base64.b64decode(value["float32"], validate=True)
        array = np.frombuffer(content, dtype="<f4").reshape(value["shape"])
    except TypeError as error:
        raise ValueError(f"cannot read a tensor: {error}") from error
    return torch.from_numpy(array.astype(np.float32))
