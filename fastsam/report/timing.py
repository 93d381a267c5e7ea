"""How long the optimizer part of a SAM step takes, against the same step in plain PyTorch."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastsam.files import from_json, to_json, write_text
from fastsam.longtail.errors import DataError
from fastsam.optim import SAM
from fastsam.optim.plain import PlainSAM
from fastsam.records import build


@dataclass(frozen=True)
class StepTiming:
    """Microseconds per step of both optimizers, measured alternately in one process.

    Attributes:
        fused: one number per round for :class:`fastsam.SAM`.
        plain: one number per round for :class:`fastsam.optim.plain.PlainSAM`.
        tensors: parameter tensors of the model.
        parameters: numbers in them.
        difference: largest difference of the weights after some steps of both, relative to the
            largest weight.
        threads: threads of torch.
        device: where the model is.
    """

    FILE: ClassVar[str] = "timing.json"

    fused: list[float]
    plain: list[float]
    tensors: int
    parameters: int
    difference: float
    threads: int
    device: str

    def sentence(self) -> str:
        """Return the result in words, with median and range of the ratio over the rounds."""
        ratios = sorted(plain / fused for plain, fused in zip(self.plain, self.fused, strict=True))
        return (
            f"SAM step without the passes, {self.tensors} tensors, {self.parameters} parameters, "
            f"{self.threads} thread(s), {self.device}: fused {statistics.median(self.fused):.0f} us, "
            f"per-tensor PyTorch {statistics.median(self.plain):.0f} us, "
            f"{statistics.median(ratios):.1f} times faster "
            f"(rounds: {ratios[0]:.1f} to {ratios[-1]:.1f}); "
            f"weights agree within {self.difference:.1e}"
        )

    def save(self, folder: str | Path) -> None:
        """Write ``folder/timing.json``."""
        write_text(Path(folder, self.FILE), to_json(asdict(self)))

    @classmethod
    def load(cls, path: str | Path) -> StepTiming:
        """Read what :meth:`save` wrote."""
        try:
            return build(cls, from_json(Path(path).read_text("utf-8")))
        except ValueError as error:
            raise DataError(f"{path} is not a timing of fastsam: {error}") from error


def time_sam_step(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], *, rounds: int = 7, steps: int = 20
) -> StepTiming:
    """Time the optimizer part of a SAM step (SGD, momentum, weight decay) on copies of ``model``.

    Both optimizers first take three whole steps from the same weights, to see that they compute the
    same; then blocks of steps with fixed gradients alternate.

    Args:
        model: left as it is.
        loss: scalar loss of a model, for the gradients.
        rounds: blocks of each optimizer.
        steps: steps in a block.
    """
    models = [copy.deepcopy(model), copy.deepcopy(model)]
    optimizers = [
        kind(
            copied.parameters(), torch.optim.SGD, rho=0.05, lr=1e-3, momentum=0.9, weight_decay=5e-4
        )
        for kind, copied in zip((SAM, PlainSAM), models, strict=True)
    ]
    for copied, optimizer in zip(models, optimizers, strict=True):
        for _ in range(3):
            _backward(loss, copied)
            optimizer.first_step(zero_grad=True)
            _backward(loss, copied)
            optimizer.second_step(zero_grad=True)
        _backward(loss, copied)
    pairs = list(zip(models[0].parameters(), models[1].parameters(), strict=True))
    scale = max(float(plain.detach().abs().max()) for _, plain in pairs)
    gap = max(float((fused - plain).detach().abs().max()) for fused, plain in pairs)
    device = pairs[0][0].device
    micros: list[list[float]] = [[], []]
    for _ in range(rounds):
        for optimizer, times in zip(optimizers, micros, strict=True):
            _wait(device)
            began = time.perf_counter()
            for _ in range(steps):
                optimizer.first_step()
                optimizer.second_step()
            _wait(device)
            times.append((time.perf_counter() - began) / steps * 1e6)
    return StepTiming(
        fused=micros[0],
        plain=micros[1],
        tensors=len(pairs),
        parameters=sum(plain.numel() for _, plain in pairs),
        difference=gap / scale,
        threads=torch.get_num_threads(),
        device=device.type,
    )


def _backward(loss: Callable[[nn.Module], Tensor], model: nn.Module) -> None:
    loss(model).backward()  # type: ignore[no-untyped-call]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
