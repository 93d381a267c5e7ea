"""Training steps of any optimizer: computes each gradient that the optimizer requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsam.distributed import World, local_part
from fastsam.longtail.data import Batch
from fastsam.longtail.models.classifier import Classifier, Outputs
from fastsam.longtail.objective import Objective
from fastsam.longtail.precision import Precision, autocast
from fastsam.longtail.seeds import Stream, derived_seed, global_seed
from fastsam.longtail.training.ascent_batch import AscentBatches
from fastsam.longtail.training.engine import Engine
from fastsam.optim.batch_norm import batch_norm_layers, frozen_statistics
from fastsam.optim.passes import Need, Passes, passes_of, run_passes
from fastsam.optim.skipped import KeptTensors


@dataclass(frozen=True)
class Step:
    """Outputs of the first pass of a step over a whole batch.

    This pass is at the weights before the step. If the ascent uses only a sample of the batch, it is the pass
    at the perturbed weights.

    Attributes:
        epoch: epoch, counted from 1.
        batch: index of the batch in the epoch (for LPF-SGD, of the part of a batch), counted from 0.
        loss: scalar loss that was differentiated. In the first pass of a local ascent it is the loss of this
            rank's part of the batch.
        logits: ``[B, C]``.
        features: inputs of the head, ``[B, D]``.
        targets: int64 ``[B]``.
        indices: indices of the images in the training set, int64 ``[B]``.
        second: classes of the images that were mixed into these, int64 ``[B]``; None if none were.
        share: share of ``targets`` in the loss of each image, ``[B]``.
    """

    epoch: int
    batch: int
    loss: Tensor
    logits: Tensor
    features: Tensor
    targets: Tensor
    indices: Tensor
    second: Tensor | None = None
    share: Tensor | None = None


@dataclass
class _Piece:
    """A batch in a step, a part of a batch, or a sample of either.

    Attributes:
        batch: this rank's images of the piece.
        micro: its micro-batches, each with the return value of :meth:`Objective.prepare`.
        share: number of images as a fraction of the whole batch.
        number: index of the batch in the epoch, counted from 0.
        objective: objective of its passes.
        whole: batch and prepared values of all ranks, if the objective couples the samples of a batch.
        mass: see :class:`AscentSample`.
        is_sample: whether it is a sample for the ascent gradient.
        sample: sample of this piece for the ascent gradient; None before it is taken.
        seen: outputs of the first pass; None before it, and for a sample.
        divisors: divisors of the losses of its passes so far, by whether the pass is local.
    """

    batch: Batch
    micro: list[tuple[Batch, list[Any]]]
    share: float
    number: int
    objective: Objective
    whole: tuple[Batch, list[Any]] | None = None
    mass: Tensor | None = None
    is_sample: bool = False
    sample: _Piece | None = None
    seen: Step | None = None
    divisors: dict[bool, Tensor] = field(default_factory=dict)


@dataclass
class Stepper:
    """Takes the steps of a run.

    Attributes:
        engine: the network being trained, and how the ranks share its gradients.
        optimizer: any optimizer; see :func:`fastsam.optim.passes_of`.
        objective: objective of the run.
        seed: seed of the random numbers of the loss on this rank.
        precision: precision of the passes.
        ascent: samples each batch for the ascent gradient; None to use whole batches.
        accumulate: micro-batches of a pass, whose gradients are added up.
        gradients: cost so far in forward-backward passes over whole batches.
        batches: number of batches so far.
        parts: number of batches, or parts of batches, of the epoch so far; each has its own random numbers.
        carry: returns tensors to all-reduce along with a given one of the step, of its dtype.
        section: returns a context that labels a part of a step for a profiler: ``pass one``, ``pass two``,
            ``further passes``, ``ascent`` or ``update``.
    """

    engine: Engine
    optimizer: Optimizer
    objective: Objective
    seed: int
    precision: Precision = "float32"
    ascent: AscentBatches | None = None
    accumulate: int = 1
    gradients: float = 0.0
    batches: int = 0
    parts: int = 0
    carry: Callable[[Tensor], list[Tensor]] = lambda _: []
    section: Callable[[str], AbstractContextManager[Any]] = lambda _: nullcontext()

    def __post_init__(self) -> None:
        # A ResNet-50 has 320 modules and parameters: walking over them in each pass would take a millisecond.
        parameters = list(self.network.parameters())
        self._device = parameters[0].device
        self._trained = [value for value in parameters if value.requires_grad]
        moved = [  # by the loss, such as a momentum encoder
            local_part(value)
            for name, value in self.network.named_parameters()
            if not value.requires_grad and name not in self.network.frozen
        ]
        self._kept = KeptTensors([*self.network.buffers(), *moved])
        self._norms = batch_norm_layers(self.network)

    @property
    def network(self) -> Classifier:
        """The network being trained."""
        return self.engine.network

    @property
    def world(self) -> World:
        """The ranks of the run."""
        return self.engine.world

    @property
    def skips_nonfinite_steps(self) -> bool:
        """Whether a step with an infinite or NaN gradient leaves the weights unchanged."""
        return self.engine.loss_scale is not None or self._optimizer_skips

    @property
    def skipped_steps(self) -> int:
        """Number of updates skipped because of infinite or NaN gradients; synchronizes with the device."""
        counter = self.optimizer if self._optimizer_skips else self.engine.loss_scale
        return int(getattr(counter, "skipped_steps", 0))

    @property
    def excused_steps(self) -> int:
        """Number of :attr:`skipped_steps` that only lowered the loss scale; synchronizes with the device."""
        return int(getattr(self.engine.loss_scale, "excused_steps", 0))

    @property
    def _optimizer_skips(self) -> bool:
        """Whether the optimizer itself skips steps with infinite or NaN gradients."""
        return bool(getattr(self.optimizer, "skips_nonfinite_steps", False))

    def steps(
        self, batches: Iterable[Batch], *, epoch: int, parts: int = 0
    ) -> Iterator[list[Step]]:
        """Take one step for each batch, or for several batches if the optimizer requests them.

        If the last step of an epoch requests more batches than are left, it reuses its batches in turn.

        Args:
            batches: the batches of an epoch, each with the views that the objective reads.
            epoch: epoch, counted from 1.
            parts: value of :attr:`parts` after the steps of the epoch that were taken before.

        Yields:
            The outputs of the first pass over each batch or part of a batch.
        """
        stream, self.parts = iter(batches), parts
        for first in stream:
            with self._seeded_network(epoch):
                seen = self._step(first, stream, epoch)
            yield seen

    def _step(self, first: Batch, more: Iterator[Batch], epoch: int) -> list[Step]:
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
                share = len(part.targets) / len(batches[place].targets)
                pieces[key] = self._piece(part, share, self.parts, epoch, self.objective)
                self.parts += 1
            piece = pieces[key]
            if need.ascent and self.ascent is not None:
                piece = self._sample(piece, self.ascent, epoch)
            name = next(names, "further passes")
            with self.section(name):
                loss = self._pass(piece, need, epoch)
            if scale is not None and not self._optimizer_skips and scale.overflowed():
                raise _OverflowError  # closes the step, which restores the weights
            return loss

        scale, names = self.engine.loss_scale, iter(("pass one", "pass two"))
        with self._unless_skipped():
            try:
                run_passes(self._labeled(passes_of(self.optimizer)), answer)
                for piece in pieces.values():
                    for batch, prepared in [piece.whole] if piece.whole else piece.micro:
                        self.objective.commit(batch, self.network, epoch=epoch, prepared=prepared)
            except _OverflowError:
                pass
            if scale is not None:
                scale.finish_step()
        self.batches += len(batches)
        return [piece.seen for piece in pieces.values() if piece.seen is not None]

    @contextmanager
    def _seeded_network(self, epoch: int) -> Iterator[None]:
        """Seed torch's global generators, which layers such as dropout use, for the next step.

        This takes some 20 microseconds. Whether a network is random cannot be read from its modules.
        """
        seed = derived_seed(self.seed, Stream.LAYERS, epoch, self.parts)
        # A network on a GPU may sample on the CPU too, for instance which of its layers to skip.
        with global_seed(seed), global_seed(seed, self._device):
            yield

    def _labeled(self, passes: Passes) -> Passes:
        """Label what the optimizer does between its passes for a profiler."""
        try:
            need = next(passes, None)
            while need is not None:
                loss = yield need
                with self.section("ascent" if need.ascent else "update"):
                    try:
                        need = passes.send(loss)
                    except StopIteration:
                        return
        finally:
            passes.close()

    def _piece(
        self, batch: Batch, share: float, number: int, epoch: int, objective: Objective
    ) -> _Piece:
        micro: list[tuple[Batch, list[Any]]] = []
        count = batch.part_count(self.accumulate)
        for place in range(count):
            part = batch.part(place, count)
            position = (number, place) if place else (number,)
            seed = partial(derived_seed, self.seed, Stream.LOSS, epoch, *position)
            with autocast(self.precision, self._device):
                micro.append((part, objective.prepare(part, self.network, epoch=epoch, seed=seed)))
        whole = None
        if objective.couples_batch and self.world.world_size > 1:
            gather = self.world.all_gather_rows
            everyone = batch._replace(views=()).mapped(gather)
            ((_, prepared),) = micro
            whole = everyone, [None if value is None else gather(value) for value in prepared]
        return _Piece(batch, micro, share, number, objective, whole)

    def _sample(self, piece: _Piece, ascent: AscentBatches, epoch: int) -> _Piece:
        """Return the sample of a piece for the ascent gradient. All passes of a step use the same sample."""
        if piece.sample is None:
            batch, mass = ascent.sample(piece.batch, epoch=epoch, number=piece.number)
            share = piece.share * len(batch.targets) / len(piece.batch.targets)
            with frozen_statistics(self._norms):  # a momentum encoder has statistics too
                sample = self._piece(batch, share, piece.number, epoch, ascent.objective)
            piece.sample = replace(sample, mass=mass, is_sample=True)
        return piece.sample

    def _pass(self, piece: _Piece, need: Need, epoch: int) -> Tensor:
        """Compute the loss and its gradient: the divisors of all ranks, then each micro-batch in turn.

        Only the first pass over a whole piece updates running statistics and is reported.
        """
        earlier = [p.grad for p in self._trained] if need.add else []
        self.optimizer.zero_grad()
        first = piece.seen is None and not piece.is_sample
        whole = piece.whole if not need.local else None
        divisors = self._divisors(piece, epoch, local=need.local)
        losses, seen = [], []
        with nullcontext() if first else frozen_statistics(self._norms):
            for place, (part, prepared) in enumerate(piece.micro, start=1):
                last = place == len(piece.micro)
                with self.engine.gradients(synchronize=last and not need.local):
                    with autocast(self.precision, self._device):
                        outputs = self.engine.outputs(part.inputs)
                    batch, shared = (part, prepared) if whole is None else whole
                    loss = piece.objective.loss(
                        outputs if whole is None else self._of_whole_batch(outputs),
                        batch,
                        self.network,
                        epoch=epoch,
                        prepared=shared,
                        weighting=need.weighting,
                        divisors=divisors,
                    )
                    self.engine.backward(loss, local=need.local)
                losses.append(loss.detach())
                if first:
                    seen.append((outputs.logits.detach(), outputs.features.detach()))
        self.gradients += piece.share
        value = losses[0]
        for other in losses[1:]:
            value += other
        if whole is None and not need.local:
            self.world.all_reduce([value])
        self.engine.unscale(self._trained, value)  # before ``earlier``, which has been unscaled
        for parameter, gradient in zip(self._trained, earlier, strict=False):
            if gradient is not None:
                parameter.grad = (
                    gradient if parameter.grad is None else gradient.add_(parameter.grad)
                )
        if first:
            logits, features = (
                parts[0] if len(parts) == 1 else torch.cat(parts)
                for parts in zip(*seen, strict=True)
            )
            piece.seen = Step(
                epoch=epoch,
                batch=piece.number,
                loss=value,
                logits=logits,
                features=features,
                targets=piece.batch.targets,
                indices=piece.batch.indices,
                second=piece.batch.second,
                share=piece.batch.share,
            )
        return value

    def _divisors(self, piece: _Piece, epoch: int, *, local: bool) -> Tensor:
        """Return the divisors of the losses of a piece. All passes of a step use the same ones."""
        if local not in piece.divisors:
            whole = None if local else piece.whole
            divided = piece.batch if whole is None else whole[0]
            divisors = piece.objective.divisors(divided, epoch=epoch)
            if whole is None and not local:
                divisors = self._of_all_ranks(divisors, piece.mass)
            piece.divisors[local] = divisors
        return piece.divisors[local]

    def _of_whole_batch(self, outputs: Outputs) -> Outputs:
        """Return the outputs of all ranks. Each rank differentiates the loss by its own rows of them."""
        gather = self.world.all_gather_rows
        projections = None if outputs.projections is None else gather(outputs.projections)
        return Outputs(gather(outputs.features), gather(outputs.logits), projections)

    def _of_all_ranks(self, divisors: Tensor, mass: Tensor | None) -> Tensor:
        """Return the divisors of this rank's sums of losses, such that the quotients add up over all ranks.

        Args:
            divisors: divisors of this rank's mean losses; they are overwritten.
            mass: weight of this rank's mean loss among all ranks; None to weight by ``divisors``.
        """
        if mass is None:
            self.world.all_reduce([divisors, *self.carry(divisors)])
            return divisors
        total = mass.clone()
        self.world.all_reduce([total, *self.carry(total)])
        return divisors * (total / mass).to(divisors)

    def _unless_skipped(self) -> AbstractContextManager[None]:
        """Return a context that restores buffers and frozen parameters if the optimizer skips the step."""
        if not self.skips_nonfinite_steps:
            return nullcontext()
        counter = self.optimizer if self._optimizer_skips else self.engine.loss_scale
        return self._kept.if_skipped(counter)  # type: ignore[arg-type]


class _OverflowError(Exception):
    """Raised to abandon a step in float16 for an optimizer that does not skip by itself."""
