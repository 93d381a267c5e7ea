"""SAM in the Trainer of Hugging Face Transformers."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal, TypedDict

from torch import Tensor, nn

from fastsam.optim import SAM


class SAMOptions(TypedDict, total=False):
    """Options of :class:`fastsam.SAM` for the whole training; their defaults are those of SAM."""

    rho: float
    adaptive: bool | Literal["weights"]
    eta: float | None
    stochastic_rounding: bool
    start: int
    interval: int
    stop: int | None
    check_finite: bool


class SAMTrainer:
    """A mixin that trains with SAM around the optimizer that a ``transformers.Trainer`` makes.

    A class names it before the trainer: ``class MyTrainer(SAMTrainer, Trainer)``. The arguments of the
    trainer, such as ``optim``, learning rate, weight decay, schedule, precision and checkpoints, keep their
    meaning. Both passes of a step go over the same micro-batches, ``gradient_accumulation_steps`` of them,
    which stay in memory until the step is made. ``max_grad_norm`` clips the gradient of the update; the
    length of the ascent is ``rho`` whatever the norm of its gradient. The reported loss is that of the first
    pass. A SAM passed as ``optimizers=(SAM(...), None)`` is used as it is.

    Args:
        *args: arguments of the trainer.
        sam: options of SAM. By default SAM ascends with ``rho=0.05`` in every step.
        **kwargs: keyword arguments of the trainer.

    Raises:
        ValueError: ``sam`` together with an optimizer that is a SAM, or DeepSpeed, whose engine makes the
            steps; the latter when the optimizer is made, before the first step.

    Example:
        >>> from fastsam.integrations.hugging_face import SAMTrainer
        >>> # class MyTrainer(SAMTrainer, Trainer): ...
        >>> # MyTrainer(model=model, args=arguments, train_dataset=data, sam={"rho": 0.05}).train()
        >>> # See examples/hugging_face_sam.py.
    """

    optimizer: Any
    accelerator: Any

    def __init__(self, *args: Any, sam: SAMOptions | None = None, **kwargs: Any) -> None:
        self.sam = sam
        self._micro_batches: list[Any] = []
        super().__init__(*args, **kwargs)
        if sam and isinstance(self.optimizer, SAM):
            raise ValueError(
                f"sam={sam!r} was given with an optimizer that is a SAM already; expected one of both: leave "
                "out sam=, or pass the base optimizer in optimizers="
            )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Make the trainer's optimizer and wrap it in SAM."""
        super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        if getattr(self, "is_deepspeed_enabled", False):
            raise ValueError(
                "SAMTrainer got a DeepSpeed configuration; expected none, because DeepSpeed's engine makes "
                "the steps by itself. Use FSDP2 (TrainingArguments(fsdp=...)) to shard the model"
            )
        # After an earlier training, the optimizer is inside Accelerate's wrapper.
        if not isinstance(getattr(self.optimizer, "optimizer", self.optimizer), SAM):
            self.optimizer = SAM(optimizer=self.optimizer, **(self.sam or {}))
        return self.optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, without micro-batches that an earlier training left in the middle of a step."""
        self._micro_batches = []
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Make the first pass over a micro-batch, and after the last one the ascent and the second pass.

        The trainer makes the update after it.

        Args:
            model: the network, as the trainer has wrapped it.
            inputs: the micro-batch.
            num_items_in_batch: items of all micro-batches of the step, by which the loss is divided; None
                where the trainer divides by the number of micro-batches.

        Returns:
            The loss of the first pass over the micro-batch, a scalar.
        """
        step = super().training_step  # type: ignore[misc]
        loss: Tensor = step(model, inputs, num_items_in_batch)
        self._micro_batches.append(inputs)
        if not self.accelerator.sync_gradients:
            return loss
        micro_batches, self._micro_batches = self._micro_batches, []
        sam = self.optimizer.optimizer  # inside Accelerate's wrapper
        if sam.ascent_due:
            sam.first_step(zero_grad=True)
            for index, micro_batch in enumerate(micro_batches, start=1):
                last = index == len(micro_batches)
                with nullcontext() if last else self.accelerator.no_sync(model):
                    step(model, micro_batch, num_items_in_batch)
        return loss
