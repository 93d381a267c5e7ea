"""Loss functions, converted to the summed loss of a batch and the weight of that sum."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsam.curvature.criteria import as_module, is_likelihood, of_torch, reduction_of
from fastsam.curvature.structure import sample_count
from fastsam.kernels.backends import sum_dtype

LossFunction = Callable[..., Any]


@dataclass(frozen=True)
class BatchLoss:
    """A loss of any form, given as the *sum* of a batch's losses and the weight of that sum.

    Use it if the loss is not ``criterion(model(inputs), targets)`` with mean reduction. The operator
    is the Hessian of (sum of all loss sums) / (sum of all weights).

    Args:
        function: called as ``function(model, batch)``; returns ``(loss_sum, weight)``. ``loss_sum``
            is a scalar tensor, ``weight`` a number or scalar tensor that does not depend on the
            model's parameters.

    Example:
        >>> def summed(model, batch):
        ...     error = model(batch["inputs"]) - batch["targets"]
        ...     return error.square().sum(), len(error)
        >>> loss = BatchLoss(summed)
    """

    function: Callable[[nn.Module, Any], tuple[Tensor, Tensor | float]]


@dataclass(frozen=True)
class OutputLoss:
    """A criterion on outputs and targets that are taken from batches of any form.

    It exposes the model's outputs, so unlike :class:`BatchLoss` it works with every kind of curvature
    matrix.

    Args:
        outputs: ``outputs(model, batch)`` returns the outputs, in the form that ``criterion`` takes.
        targets: ``targets(batch)`` returns the targets.
        criterion: a criterion with mean reduction, as in :func:`fastsam.spectral_density`.

    Example:
        A causal language model of Hugging Face: the logits at a position predict the next token, and
        positions with the label -100 do not count.

        >>> next_token = OutputLoss(
        ...     outputs=lambda model, batch: model(**batch).logits[:, :-1].mT,
        ...     targets=lambda batch: batch["labels"][:, 1:],
        ...     criterion=nn.CrossEntropyLoss(ignore_index=-100),
        ... )
    """

    outputs: Callable[[nn.Module, Any], Any]
    targets: Callable[[Any], Any]
    criterion: LossFunction


class ModelLoss(nn.Module):
    """A model and its loss as a module that maps a batch to (sum of losses, weight of that sum).

    The model is the submodule ``model``, so the names of its parameters begin with ``model.``.
    """

    separable = False
    """Whether a batch may be split along its first dimension without changing the sums."""

    def __init__(self, model: nn.Module, loss: BatchLoss) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return (sum of losses, weight) of a batch, two scalar tensors."""
        result = self._loss.function(self.model, batch)
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(
                "the function of a BatchLoss must return (loss_sum, weight), got "
                f"{type(result).__name__}"
            )
        loss, weight = result
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TypeError(
                "the loss_sum returned by a BatchLoss must be a tensor with one element, got "
                f"{_description(loss)}"
            )
        if not isinstance(weight, Tensor):
            weight = _scalar(weight, loss.device)
        return loss.reshape(()), weight.detach().to(loss.device)


class CriterionLoss(ModelLoss):
    """The loss ``criterion(outputs, targets)`` of batches, as a sum.

    Without a :class:`OutputLoss`, batches are ``(inputs, targets)`` and outputs are ``model(inputs)``.
    """

    separable = True

    def __init__(
        self, model: nn.Module, criterion: LossFunction, parts: OutputLoss | None = None
    ) -> None:
        nn.Module.__init__(self)
        self.model = model
        self._parts = parts
        # As an attribute, so that the buffers of a module (class weights) get the run's dtype.
        self.criterion = criterion

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return (sum of losses, weight) of a batch, two scalar tensors."""
        return self.loss(self.outputs(batch), batch)

    def outputs(self, batch: Any) -> Any:
        """Return the model's outputs."""
        if self._parts is None:
            return self.model(pair(batch)[0])
        return self._parts.outputs(self.model, batch)

    def targets(self, batch: Any) -> Any:
        """Return the targets."""
        return pair(batch)[1] if self._parts is None else self._parts.targets(batch)

    def samples(self, batch: Any) -> int:
        """Return the number of samples."""
        return len(pair(batch)[0]) if self._parts is None else sample_count(batch)

    def loss(
        self, outputs: Any, batch: Any, *, targets: Any | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the sum of the losses of ``outputs`` and its weight.

        Args:
            outputs: the outputs, in any form that the criterion accepts, such as an object with a
                tensor ``logits``.
            batch: the batch, whose number of samples counts if the targets have no length.
            targets: targets to use instead of those of the batch.
        """
        criterion = self.criterion
        if targets is None:
            targets = self.targets(batch)
        if of_torch(criterion) and not isinstance(outputs, Tensor):
            name = getattr(criterion, "__name__", type(criterion).__name__)
            raise TypeError(
                f"{name} requires a tensor of outputs, but the model returned "
                f"{_description(outputs)}; select the tensor, for example with loss_fn=lambda "
                "outputs, targets: F.cross_entropy(outputs.logits, targets), or use "
                "fastsam.curvature.BatchLoss(lambda model, batch: (loss_sum, weight))"
            )
        if is_likelihood(criterion):
            return _summed_likelihood(criterion, outputs, targets)
        counted = isinstance(targets, Tensor) and targets.ndim
        samples = len(targets) if counted else self.samples(batch)
        value = criterion(outputs, targets)
        if not isinstance(value, Tensor):
            raise TypeError(
                f"the loss function returned {type(value).__name__}, expected a scalar tensor; use "
                "fastsam.curvature.BatchLoss(lambda model, batch: (loss_sum, weight))"
            )
        weight = _scalar(samples, value.device)
        reduction = reduction_of(criterion)
        if reduction in ("none", "sum"):
            return value.sum(), weight
        if value.numel() != 1:
            raise TypeError(
                f"the loss function returned shape {tuple(value.shape)}, expected a scalar (mean "
                "reduction); wrap it in fastsam.curvature.BatchLoss, which returns (loss_sum, weight)"
            )
        return value.reshape(()) * samples, weight

    def sample_losses(self, batch: Any, drawn: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the weighted losses of the samples (or positions), and their weights, of one shape.

        Args:
            batch: the batch.
            drawn: classes drawn from the model, for ``nn.CrossEntropyLoss``. The losses are then those
                of these classes; the weights stay those of the batch's targets, so that the mean over
                draws is the Fisher matrix.

        Raises:
            ValueError: the criterion has no attribute ``reduction``, or its forward ignores it.
        """
        criterion = self.criterion
        outputs = self.outputs(batch)
        targets = self.targets(batch)
        samples = self.samples(batch)
        if drawn is not None and is_likelihood(criterion):
            losses = F.cross_entropy(outputs, drawn, reduction="none")
            weights = _target_weights(criterion, targets, losses)
            return weights * losses, weights
        if not isinstance(criterion, nn.Module) or not hasattr(criterion, "reduction"):
            raise ValueError(
                "the losses of single samples require a torch.nn criterion with a reduction, got "
                f"{type(criterion).__name__}"
            )
        separate: Any = copy.copy(criterion)
        separate.reduction = "none"
        losses = separate(outputs, targets)
        if is_likelihood(criterion):
            if targets.is_floating_point():
                return losses, torch.ones_like(losses).detach()
            return losses, _target_weights(criterion, targets, losses)
        if losses.ndim == 0 or len(losses) != samples:
            raise ValueError(
                f"{type(criterion).__name__} with reduction='none' returned shape "
                f"{tuple(losses.shape)} for {samples} samples, expected one row per sample: its "
                "forward must use self.reduction"
            )
        losses = losses.flatten(start_dim=1) if losses.ndim > 1 else losses[:, None]
        # As in loss(): only mean reduction divides by the number of outputs of a sample.
        each = losses.mean(dim=1) if criterion.reduction == "mean" else losses.sum(dim=1)
        return each, torch.ones_like(each).detach()


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside data-parallel and compiled wrappers.

    Raises:
        ValueError: a BatchNorm layer has no running statistics, so its outputs depend on the whole
            batch.
    """
    inner: Any = model
    while isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or hasattr(
        inner, "_orig_mod"
    ):
        inner = inner._orig_mod if hasattr(inner, "_orig_mod") else inner.module
    for name, module in inner.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"{name} is a BatchNorm layer without running statistics: the loss of a sample "
                "depends on its batch, so the loss over the data is undefined; use "
                "track_running_stats=True"
            )
    bare: nn.Module = inner
    return bare


def make_model_loss(model: nn.Module, loss_fn: LossFunction | OutputLoss | BatchLoss) -> ModelLoss:
    """Combine a model and a loss function as described in :func:`fastsam.spectral_density`.

    Raises:
        TypeError: ``model`` is not a module, or ``loss_fn`` is neither callable nor a
            :class:`BatchLoss`.
        ValueError: the normalization of the criterion is unknown. Examples are class weights in
            another criterion than ``nn.CrossEntropyLoss`` and ``nn.NLLLoss``, or a subclass of these
            that overrides forward and may ignore targets or is not a mean.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(loss_fn, BatchLoss):
        return ModelLoss(model, loss_fn)
    parts = None
    if isinstance(loss_fn, OutputLoss):
        parts, loss_fn = loss_fn, loss_fn.criterion
    if not callable(loss_fn):
        raise TypeError(
            "loss_fn must be a criterion, an OutputLoss or a BatchLoss, got "
            f"{type(loss_fn).__name__}"
        )
    criterion = as_module(loss_fn)
    reduction = reduction_of(criterion)
    if reduction not in ("mean", "sum", "none") and not (
        of_torch(criterion) and reduction == "batchmean"
    ):
        raise ValueError(
            f"loss_fn has reduction {reduction!r}, expected 'mean', 'sum' or 'none'; wrap it in "
            "fastsam.curvature.BatchLoss, which returns (loss_sum, weight)"
        )
    if isinstance(criterion, (nn.CrossEntropyLoss, nn.NLLLoss)) and not is_likelihood(criterion):
        _refuse_unknown_mean(criterion)
    if (
        not of_torch(criterion)
        and reduction == "mean"
        and isinstance(getattr(criterion, "weight", None), Tensor)
    ):
        raise ValueError(
            f"{type(criterion).__name__} has class weights, and it is unknown whether its mean divides "
            "by them; use fastsam.curvature.BatchLoss(lambda model, batch: (loss_sum, weight))"
        )
    return CriterionLoss(model, criterion, parts)


def _refuse_unknown_mean(criterion: nn.CrossEntropyLoss | nn.NLLLoss) -> None:
    """Raise ValueError for a subclass that overrides forward, unless its options imply a mean."""
    plain = nn.CrossEntropyLoss()
    for option in ("reduction", "ignore_index"):
        value, default = getattr(criterion, option), getattr(plain, option)
        if value != default:
            raise ValueError(
                f"{type(criterion).__name__} overrides forward and has {option}={value!r}, so the "
                f"denominator of its mean is unknown; leave {option} at {default!r}, or use "
                "fastsam.curvature.BatchLoss(lambda model, batch: (loss_sum, weight))"
            )


def pair(batch: Any) -> tuple[Any, Any]:
    """Return ``(inputs, targets)`` of a batch; raise TypeError for batches of another form."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[0], Tensor):
        raise TypeError(
            "a batch for a plain criterion must be (inputs, targets) with a tensor of inputs, "
            f"got {_description(batch)}; for other forms use fastsam.curvature.BatchLoss(lambda model, "
            "batch: (loss_sum, weight))"
        )
    return batch[0], batch[1]


def _description(batch: Any) -> str:
    if isinstance(batch, (tuple, list)):
        return f"{type(batch).__name__}({', '.join(type(item).__name__ for item in batch)})"
    return type(batch).__name__


def _summed_likelihood(
    criterion: nn.CrossEntropyLoss | nn.NLLLoss, outputs: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the summed loss, and the denominator of the criterion's mean reduction as its weight."""
    class_weights = criterion.weight
    if isinstance(criterion, nn.NLLLoss):
        value = F.nll_loss(
            outputs,
            targets,
            class_weights,
            ignore_index=criterion.ignore_index,
            reduction="sum",
        )
    else:
        value = F.cross_entropy(
            outputs,
            targets,
            class_weights,
            ignore_index=criterion.ignore_index,
            reduction="sum",
            label_smoothing=criterion.label_smoothing,
        )
        # For class probabilities, the mean divides by the number of positions even with weights.
        if targets.is_floating_point():
            positions = targets.numel() // targets.shape[1] if targets.ndim > 1 else 1
            return value, _scalar(positions, value.device)
    return value, _target_weights(criterion, targets, value).sum()


def _scalar(value: float, device: torch.device) -> Tensor:
    """Create a scalar on the device, without a copy from the host, which would make it wait."""
    return torch.full((), float(value), dtype=sum_dtype(device, torch.float32), device=device)


def _target_weights(
    criterion: nn.CrossEntropyLoss | nn.NLLLoss, targets: Tensor, like: Tensor
) -> Tensor:
    """Return the class weight of every target, 0 for ignored ones."""
    counted = targets != criterion.ignore_index
    if criterion.weight is None:
        return counted.to(like.dtype)
    indices = torch.where(counted, targets, torch.zeros_like(targets))
    return (criterion.weight[indices] * counted).detach()
