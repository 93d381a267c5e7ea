"""One training step of any optimizer: answer each gradient that it asks for."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsam.distributed import World
from fastsam.longtail.data import Batch
from fastsam.longtail.models.classifier import Classifier
from fastsam.longtail.objective import Objective
from fastsam.longtail.seeds import Stream, derived_seed
from fastsam.longtail.training.ascent_batch import AscentBatches
from fastsam.optim import frozen_batch_norm_statistics, kept_if_skipped
from fastsam.optim.passes import Need, passes_of, run_passes


@dataclass(frozen=True)
class Step:
    """What the first pass over one whole batch saw.

    It is the pass at the weights before the step, unless the ascent read only a sample of the batch: then it
    is the pass at the perturbed weights.

    Attributes:
        epoch: counted from 1.
        batch: batch of the epoch (for LPF-SGD, part of a batch), counted from 0.
        loss: scalar loss that was differentiated; that of this process's part of the batch in the first pass
            of a local ascent.
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
    """A batch, a part of one, or a sample of either, in a step.

    Attributes:
        batch: its images.
        share: their number as a share of the whole batch.
        number: batch of the epoch, counted from 0.
        objective: the loss of its passes.
        prepared: what the terms of the loss prepared for it.
        mass: see :class:`AscentSample`.
        is_sample: whether its passes only direct an ascent.
        sample: the sample of it that directs an ascent, once it was taken.
        seen: what the first pass saw; None before it, and for a sample.
    """

    batch: Batch
    share: float
    number: int
    objective: Objective
    prepared: list[Any]
    mass: Tensor | None = None
    is_sample: bool = False
    sample: _Piece | None = None
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
        ascent: samples each batch for its ascent; None for ascents on whole batches.
        gradients: cost so far: forward and backward passes over whole batches.
    """

    network: Classifier
    optimizer: Optimizer
    objective: Objective
    seed: int
    world: World = field(default_factory=World)
    precision: str = "float32"
    ascent: AscentBatches | None = None
    gradients: float = 0.0

    @property
    def skips_nonfinite_steps(self) -> bool:
        """Whether a step with an infinite or NaN gradient leaves the weights as they were."""
        return bool(getattr(self.optimizer, "skips_nonfinite_steps", False))

    @property
    def skipped_steps(self) -> int:
        """Updates skipped so far because a gradient was not finite; waits for the device."""
        return int(getattr(self.optimizer, "skipped_steps", 0))

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
                pieces[key] = self._piece(part, share, serial, epoch, self.objective)
            piece = pieces[key]
            if need.ascent and self.ascent is not None:
                piece = self._sample(piece, self.ascent, epoch)
            return self._pass(piece, need, epoch)

        with self._unless_skipped():
            run_passes(passes_of(self.optimizer), answer)
            for piece in pieces.values():
                self.objective.commit(
                    piece.batch, self.network, epoch=epoch, prepared=piece.prepared
                )
        return [piece.seen for piece in pieces.values() if piece.seen is not None]

    def _piece(
        self, batch: Batch, share: float, number: int, epoch: int, objective: Objective
    ) -> _Piece:
        seed = derived_seed(self.seed, Stream.LOSS, epoch, number)
        with self._autocast():
            prepared = objective.prepare(batch, self.network, epoch=epoch, seed=seed)
        return _Piece(batch, share, number, objective, prepared)

    def _sample(self, piece: _Piece, ascent: AscentBatches, epoch: int) -> _Piece:
        """The sample of a piece that directs an ascent; the same in all passes of a step."""
        if piece.sample is None:
            batch, mass = ascent.sample(piece.batch, epoch=epoch, number=piece.number)
            share = piece.share * len(batch.targets) / len(piece.batch.targets)
            with frozen_batch_norm_statistics(self.network):  # a momentum encoder has them, too
                sample = self._piece(batch, share, piece.number, epoch, ascent.objective)
            piece.sample = replace(sample, mass=mass, is_sample=True)
        return piece.sample

    def _pass(self, piece: _Piece, need: Need, epoch: int) -> Tensor:
        """Forward, objective and backward.

        Only the first pass over a whole piece changes running statistics and is reported.
        """
        trained = [p for p in self.network.parameters() if p.requires_grad]
        earlier = [p.grad for p in trained] if need.add else []
        self.optimizer.zero_grad()
        first = piece.seen is None and not piece.is_sample
        with nullcontext() if first else frozen_batch_norm_statistics(self.network):
            with self._autocast():
                outputs = self.network.outputs(piece.batch.inputs)
            loss = piece.objective.loss(
                outputs,
                piece.batch,
                self.network,
                epoch=epoch,
                prepared=piece.prepared,
                weighting=need.weighting,
                reduce=(lambda weight: weight) if need.local else partial(self._total, piece.mass),
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
        if first:
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

    def _total(self, mass: Tensor | None, weight: Tensor) -> Tensor:
        """What to divide the sum of this process's losses by, so that those of all processes add up.

        Args:
            mass: what the sum stands for among those of all processes; None for its own weight.
            weight: the weight of the sum, which is overwritten.
        """
        if mass is not None:
            total = mass.clone()
            self.world.all_reduce([total])
            return weight * (total / mass).to(weight)
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
