"""One training step of any optimizer: answer each gradient that it asks for."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsam.distributed import World
from fastsam.longtail.data import Batch
from fastsam.longtail.models.classifier import Classifier
from fastsam.longtail.objective import Objective
from fastsam.longtail.seeds import Stream, derived_seed
from fastsam.optim import frozen_batch_norm_statistics, kept_if_skipped
from fastsam.optim.passes import Need, passes_of, run_passes


@dataclass(frozen=True)
class Step:
    """What the first pass over one batch saw.

    Attributes:
        epoch: counted from 1.
        batch: batch of the epoch (for LPF-SGD, part of a batch), counted from 0.
        loss: scalar loss that was differentiated.
        logits: ``[B, C]``.
        features: what the head was given, ``[B, D]``.
        targets: int64 ``[B]``.
        indices: samples of the batch, positions in the training set, int64 ``[B]``.
    """

    epoch: int
    batch: int
    loss: Tensor
    logits: Tensor
    features: Tensor
    targets: Tensor
    indices: Tensor


@dataclass
class _Piece:
    """A batch, or a part of one, in a step."""

    batch: Batch
    share: float
    number: int
    prepared: list[Any]
    seen: Step | None = None


@dataclass
class Stepper:
    """Takes the steps of a run.

    Attributes:
        network: the network being trained.
        optimizer: any optimizer; see :func:`fastsam.optim.passes_of`.
        objective: the loss.
        seed: seed of what the loss draws in this process.
        world: this process among those of the run.
        precision: ``float32``, or ``bfloat16`` for passes under autocast.
        gradients: cost so far: forward and backward passes over whole batches.
    """

    network: Classifier
    optimizer: Optimizer
    objective: Objective
    seed: int
    world: World = field(default_factory=World)
    precision: str = "float32"
    gradients: float = 0.0

    @property
    def skips_nonfinite_steps(self) -> bool:
        """Whether a step with an infinite or NaN gradient leaves the weights as they were."""
        return bool(getattr(self.optimizer, "skips_nonfinite_steps", False))

    @property
    def skipped_steps(self) -> int:
        """Updates skipped so far because a gradient was not finite; waits for the device."""
        return int(getattr(self.optimizer, "skipped_steps", 0))

    def average_statistics(self) -> None:
        """Give every process the mean of the running statistics of batch normalization."""
        if self.world.world_size == 1:
            return
        statistics = [value for value in self.network.buffers() if value.is_floating_point()]
        self.world.all_reduce(statistics)
        for value in statistics:
            value.div_(self.world.world_size)

    def steps(self, batches: Iterable[Batch], *, epoch: int) -> Iterator[list[Step]]:
        """Take a step for each batch, or for as many batches as the optimizer asks for.

        The last step of an epoch goes round the batches that are left.

        Args:
            batches: the batches of an epoch, each with the views that the objective reads.
            epoch: counted from 1.

        Yields:
            What the first pass over each batch, or part of one, saw.
        """
        stream, numbers = iter(batches), itertools.count()
        for first in stream:
            yield self._step(first, stream, numbers, epoch)

    def _step(
        self, first: Batch, more: Iterator[Batch], numbers: Iterator[int], epoch: int
    ) -> list[Step]:
        batches, place = [first], 0
        pieces: dict[tuple[int, int, int], _Piece] = {}

        def answer(need: Need) -> Tensor:
            nonlocal place
            if need.fresh and pieces:
                following = next(more, None)
                if following is not None:
                    batches.append(following)
                place = (place + 1) % len(batches)
            number, parts = need.part
            count = batches[place].part_count(parts)
            key = place, number % count, count
            if key not in pieces:
                part = batches[place].part(number % count, count)
                serial = next(numbers)
                share = len(part.targets) / len(batches[place].targets)
                pieces[key] = _Piece(part, share, serial, self._prepare(part, epoch, serial))
            piece = pieces[key]
            return self._pass(piece, need, epoch)

        with self._unless_skipped():
            run_passes(passes_of(self.optimizer), answer)
            for piece in pieces.values():
                self.objective.commit(
                    piece.batch, self.network, epoch=epoch, prepared=piece.prepared
                )
        return [piece.seen for piece in pieces.values() if piece.seen is not None]

    def _prepare(self, batch: Batch, epoch: int, number: int) -> list[Any]:
        seed = derived_seed(self.seed, Stream.LOSS, epoch, number)
        with self._autocast():
            return self.objective.prepare(batch, self.network, epoch=epoch, seed=seed)

    def _pass(self, piece: _Piece, need: Need, epoch: int) -> Tensor:
        """Forward, objective and backward; all passes after the first leave statistics alone."""
        trained = [p for p in self.network.parameters() if p.requires_grad]
        earlier = [p.grad for p in trained] if need.add else []
        self.optimizer.zero_grad()
        again = piece.seen is not None
        with frozen_batch_norm_statistics(self.network) if again else nullcontext():
            with self._autocast():
                outputs = self.network.outputs(piece.batch.inputs)
            loss = self.objective.loss(
                outputs,
                piece.batch,
                self.network,
                epoch=epoch,
                prepared=piece.prepared,
                weighting=need.weighting,
                reduce=(lambda weight: weight) if need.local else self._total,
            )
            loss.backward()  # type: ignore[no-untyped-call]
        self.gradients += piece.share
        value = loss.detach().clone()
        if not need.local:
            self.world.all_reduce([value, *(p.grad for p in trained if p.grad is not None)])
        for parameter, gradient in zip(trained, earlier, strict=False):
            if gradient is not None:
                parameter.grad = (
                    gradient if parameter.grad is None else gradient.add_(parameter.grad)
                )
        if piece.seen is None:
            piece.seen = Step(
                epoch=epoch,
                batch=piece.number,
                loss=value,
                logits=outputs.logits.detach(),
                features=outputs.features.detach(),
                targets=piece.batch.targets,
                indices=piece.batch.indices,
            )
        return value

    def _total(self, weight: Tensor) -> Tensor:
        self.world.all_reduce([weight])
        return weight

    def _autocast(self) -> torch.autocast:
        """A context of its own for every pass: its cache of cast weights must not outlive them."""
        device = next(self.network.parameters()).device
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def _unless_skipped(self) -> AbstractContextManager[None]:
        """Undo what a step changes besides the trained weights if the optimizer skips it."""
        if not self.skips_nonfinite_steps:
            return nullcontext()
        frozen = [value for value in self.network.parameters() if not value.requires_grad]
        changed = [*self.network.buffers(), *frozen]
        return kept_if_skipped(self.optimizer, changed)  # type: ignore[arg-type]
