"""SAM in the Trainer of Hugging Face Transformers."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal, TypedDict

from torch import Tensor, nn

from fastsam.optim import SAM, frozen_batch_norm_statistics


class SAMOptions(TypedDict, total=False):
    """Options of :class:`fastsam.SAM`, with the same defaults."""

    rho: float
    adaptive: bool | Literal["weights"]
    eta: float | None
    stochastic_rounding: bool
    start: int
    interval: int
    stop: int | None
    check_finite: bool


class SAMTrainer:
    """A mixin that wraps the optimizer of a ``transformers.Trainer`` in SAM.

    List it before the trainer: ``class MyTrainer(SAMTrainer, Trainer)``. The arguments of the trainer, such
    as ``optim``, learning rate, weight decay, schedule, precision and checkpoints, work as usual. Both passes
    of a step use the same ``gradient_accumulation_steps`` micro-batches, which stay in memory during the
    step. The second pass does not update the running statistics of BatchNorm. ``max_grad_norm`` clips the
    gradient of the update; it does not affect the ascent, whose length is always ``rho``. The reported loss
    is that of the first pass. A SAM passed as ``optimizers=(SAM(...), None)`` is not wrapped again.

    Args:
        *args: arguments of the trainer.
        sam: options of SAM. Default None: an ascent with ``rho=0.05`` in every step.
        **kwargs: keyword arguments of the trainer.

    Raises:
        ValueError: ``sam`` is passed together with a SAM optimizer; or DeepSpeed, whose engine makes the
            steps itself, is enabled, which raises when the optimizer is created.

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
                f"sam={sam!r} was passed together with a SAM optimizer, expected only one of them: omit "
                "sam=, or pass the base optimizer in optimizers="
            )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Create the trainer's optimizer and wrap it in SAM."""
        super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        if getattr(self, "is_deepspeed_enabled", False):
            raise ValueError(
                "SAMTrainer does not support DeepSpeed, whose engine makes the steps itself. Remove the "
                "DeepSpeed configuration; to shard the model use FSDP2 (TrainingArguments(fsdp=...))"
            )
        # If train() was called before, Accelerate has wrapped the optimizer.
        if not isinstance(getattr(self.optimizer, "optimizer", self.optimizer), SAM):
            self.optimizer = SAM(optimizer=self.optimizer, **(self.sam or {}))
        return self.optimizer

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Train, after dropping a step that an earlier training did not finish.

        ``train`` calls this method, and with ``auto_find_batch_size`` once more after running out of memory.
        """
        self._micro_batches = []
        return super()._inner_training_loop(*args, **kwargs)  # type: ignore[misc]

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Make the first pass over a micro-batch; after the last, also the ascent and the second pass.

        The trainer then makes the update. Its callbacks in between, and a checkpoint on a signal, see the
        weights without the perturbation.

        Args:
            model: the model, wrapped by the trainer.
            inputs: the micro-batch.
            num_items_in_batch: number of items in all micro-batches of the step, by which the loss is
                divided; None if the trainer divides by the number of micro-batches.

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
            try:
                with frozen_batch_norm_statistics(model):
                    for index, micro_batch in enumerate(micro_batches, start=1):
                        last = index == len(micro_batches)
                        with nullcontext() if last else self.accelerator.no_sync(model):
                            step(model, micro_batch, num_items_in_batch)
            except BaseException:
                sam.restore()
                raise
            sam.return_to_weights()
        return loss
