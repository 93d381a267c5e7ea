"""How a loss function is read: the summed loss of a batch and the weight of that sum."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsam.kernels.backends import sum_dtype

LossFunction = Callable[..., Any]


@dataclass(frozen=True)
class BatchLoss:
    """A loss of any form, told exactly: the *sum* of a batch's losses and the weight of that sum.

    Use it wherever ``criterion(model(inputs), targets)`` with mean reduction does not describe the
    loss. The operator is the Hessian of (sum of all loss sums) / (sum of all weights).

    Args:
        function: ``function(model, batch) -> (loss_sum, weight)``; ``loss_sum`` is a scalar tensor,
            ``weight`` a number or scalar tensor that does not depend on the model's parameters.

    Example:
        >>> def summed(model, batch):
        ...     error = model(batch["inputs"]) - batch["targets"]
        ...     return error.square().sum(), len(error)
        >>> loss = BatchLoss(summed)
    """

    function: Callable[[nn.Module, Any], tuple[Tensor, Tensor | float]]


class ModelLoss(nn.Module):
    """A model together with its loss: maps a batch to (sum of its losses, weight of that sum).

    The model is the submodule ``model``, so that the names of its parameters are ``model.<name>``.
    """

    separable = False
    """Whether a batch may be cut along its first dimension without changing the sums."""

    def __init__(self, model: nn.Module, loss: BatchLoss) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        """(sum of losses, weight) of a batch."""
        result = self._loss.function(self.model, batch)
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(
                "the function of a BatchLoss must return (loss_sum, weight), got "
                f"{type(result).__name__}"
            )
        loss, weight = result
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TypeError(
                "the loss_sum returned by a BatchLoss must be a tensor with one element"
            )
        if not isinstance(weight, Tensor):
            weight = _scalar(weight, loss.device)
        return loss.reshape(()), weight.detach().to(loss.device)


class CriterionLoss(ModelLoss):
    """``criterion(model(inputs), targets)`` over batches ``(inputs, targets)``, un-averaged."""

    separable = True

    def __init__(self, model: nn.Module, criterion: LossFunction) -> None:
        nn.Module.__init__(self)
        self.model = model
        self.criterion = (
            criterion  # a module's buffers (class weights) follow the run's dtype and device
        )

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        """(sum of losses, weight) of a batch."""
        inputs, targets = pair(batch)
        return self.loss(self.outputs(inputs), targets, samples=len(inputs))

    def outputs(self, inputs: Any) -> Any:
        """The model's outputs."""
        return self.model(inputs)

    def loss(self, outputs: Any, targets: Any, *, samples: int) -> tuple[Tensor, Tensor]:
        """Sum of the losses of ``outputs`` and its weight.

        Args:
            outputs: whatever the model returns and the criterion takes, such as an object with a
                tensor ``logits``.
            targets: a tensor or any other form; its length counts where it has one.
            samples: length of the inputs.
        """
        criterion = self.criterion
        if of_torch(criterion) and not isinstance(outputs, Tensor):
            name = getattr(criterion, "__name__", type(criterion).__name__)
            raise TypeError(
                f"{name} needs a tensor of outputs, and the model returned "
                f"{_shape_of(outputs)}; pick the tensor, such as loss_fn=lambda outputs, targets: "
                "F.cross_entropy(outputs.logits, targets), or use fastsam.curvature.BatchLoss("
                "lambda model, batch: (loss_sum, weight))"
            )
        if is_likelihood(criterion):
            return _summed_likelihood(criterion, outputs, targets)
        if isinstance(targets, Tensor) and targets.ndim:
            samples = len(targets)
        value = criterion(outputs, targets)
        if not isinstance(value, Tensor):
            raise TypeError(
                f"the loss function returned {type(value).__name__}, expected a scalar tensor; use "
                "fastsam.curvature.BatchLoss(lambda model, batch: (loss_sum, weight))"
            )
        weight = _scalar(samples, value.device)
        reduction = getattr(criterion, "reduction", "mean")
        if reduction in ("none", "sum"):
            return value.sum(), weight
        if value.numel() != 1:
            raise TypeError(
                f"the loss function returned shape {tuple(value.shape)}, expected a scalar (mean "
                "reduction); "
                "wrap it in fastsam.curvature.BatchLoss to say how losses are summed"
            )
        return value.reshape(()) * samples, weight

    def sample_losses(self, inputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Losses of the samples (or positions), weights included, and their weights, of one shape.

        Raises:
            ValueError: the criterion has no reduction to switch off, or does not obey it.
        """
        criterion = self.criterion
        outputs = self.outputs(inputs)
        if not isinstance(criterion, nn.Module) or not hasattr(criterion, "reduction"):
            raise ValueError(
                "the losses of single samples need a torch.nn criterion with a reduction"
            )
        separate: Any = copy.copy(criterion)
        separate.reduction = "none"
        losses = separate(outputs, targets)
        if is_likelihood(criterion):
            if targets.is_floating_point():
                return losses, torch.ones_like(losses).detach()
            return losses, _target_weights(criterion, targets, losses)
        if losses.ndim == 0 or len(losses) != len(inputs):
            raise ValueError(
                f"{type(criterion).__name__} with reduction='none' returned shape "
                f"{tuple(losses.shape)} for {len(inputs)} samples, expected one row for each: its "
                "forward must obey self.reduction"
            )
        losses = losses.flatten(start_dim=1) if losses.ndim > 1 else losses[:, None]
        # As in loss(): only a mean is divided by the number of a sample's outputs.
        each = losses.mean(dim=1) if criterion.reduction == "mean" else losses.sum(dim=1)
        return each, torch.ones_like(each).detach()


def of_torch(criterion: Any) -> bool:
    """Whether a criterion is a class or function of torch's own, or computes its likelihoods."""
    return (
        type(criterion).__module__ == "torch.nn.modules.loss"
        or getattr(criterion, "__module__", None) == "torch.nn.functional"
        or is_likelihood(criterion)
    )


def is_likelihood(criterion: Any) -> TypeGuard[nn.CrossEntropyLoss | nn.NLLLoss]:
    """Whether a criterion computes torch's own cross-entropy or negative log-likelihood.

    A subclass with a forward of its own, such as a focal loss, computes something else.
    """
    forward = getattr(getattr(criterion, "forward", None), "__func__", None)
    return forward in (nn.CrossEntropyLoss.forward, nn.NLLLoss.forward)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside data-parallel and compiled wrappers.

    Raises:
        ValueError: a BatchNorm layer without running statistics, whose outputs depend on the whole
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
                "depends on its "
                "batch, so the loss over the data is not defined; use track_running_stats=True"
            )
    bare: nn.Module = inner
    return bare


def make_model_loss(model: nn.Module, loss_fn: LossFunction | BatchLoss) -> ModelLoss:
    """Join a model and a loss function, as :func:`fastsam.spectral_density` describes.

    Raises:
        TypeError: ``loss_fn`` is neither callable nor a :class:`BatchLoss`.
        ValueError: a criterion whose normalization cannot be known, for example a class-weighted
            one that is not ``nn.CrossEntropyLoss`` or ``nn.NLLLoss``, or a subclass of these with a
            forward of its own that may ignore targets or is not a mean.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(loss_fn, BatchLoss):
        return ModelLoss(model, loss_fn)
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a criterion or a BatchLoss, got {type(loss_fn).__name__}")
    if loss_fn is F.cross_entropy:
        loss_fn = nn.CrossEntropyLoss()
    elif loss_fn is F.nll_loss:
        loss_fn = nn.NLLLoss()
    reduction = getattr(loss_fn, "reduction", "mean")
    if reduction not in ("mean", "sum", "none") and not (
        of_torch(loss_fn) and reduction == "batchmean"
    ):
        raise ValueError(
            f"loss_fn has reduction {reduction!r}, expected 'mean', 'sum' or 'none'; "
            "wrap it in fastsam.curvature.BatchLoss to say how losses are summed"
        )
    if isinstance(loss_fn, (nn.CrossEntropyLoss, nn.NLLLoss)) and not is_likelihood(loss_fn):
        _refuse_unknown_mean(loss_fn)
    if (
        not of_torch(loss_fn)
        and reduction == "mean"
        and isinstance(getattr(loss_fn, "weight", None), Tensor)
    ):
        raise ValueError(
            f"{type(loss_fn).__name__} carries class weights, and whether its mean divides by "
            "them is not known; "
            "use fastsam.curvature.BatchLoss(lambda model, batch: (loss_sum, weight))"
        )
    return CriterionLoss(model, loss_fn)


def _refuse_unknown_mean(criterion: nn.CrossEntropyLoss | nn.NLLLoss) -> None:
    """Refuse a subclass with its own forward, unless its options leave a mean over the samples."""
    plain = nn.CrossEntropyLoss()
    for option in ("reduction", "ignore_index"):
        value, default = getattr(criterion, option), getattr(plain, option)
        if value != default:
            raise ValueError(
                f"{type(criterion).__name__} has a forward of its own and {option}={value!r}, so "
                "what its losses are divided by is not known; leave "
                f"{option} at {default!r}, or use "
                "fastsam.curvature.BatchLoss(lambda model, batch: (loss_sum, weight))"
            )


def pair(batch: Any) -> tuple[Any, Any]:
    """``(inputs, targets)`` of a batch, as every plain criterion needs it."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[0], Tensor):
        raise TypeError(
            "a batch for a plain criterion must be (inputs, targets) with a tensor of inputs, "
            f"got {_shape_of(batch)}; "
            "for any other form use fastsam.curvature.BatchLoss(lambda model, batch: (loss_sum, "
            "weight))"
        )
    return batch[0], batch[1]


def _shape_of(batch: Any) -> str:
    if isinstance(batch, (tuple, list)):
        return f"{type(batch).__name__}({', '.join(type(item).__name__ for item in batch)})"
    return type(batch).__name__


def _summed_likelihood(
    criterion: nn.CrossEntropyLoss | nn.NLLLoss, outputs: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Summed loss and the denominator that the criterion's own mean reduction would have used."""
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
        if (
            targets.is_floating_point()
        ):  # class probabilities: the mean is over positions, weighted or not
            positions = targets.numel() // targets.shape[1] if targets.ndim > 1 else 1
            return value, _scalar(positions, value.device)
    return value, _target_weights(criterion, targets, value).sum()


def _scalar(value: float, device: torch.device) -> Tensor:
    """A number made on the device: a copy to it would make the host wait."""
    return torch.full((), float(value), dtype=sum_dtype(device, torch.float32), device=device)


def _target_weights(
    criterion: nn.CrossEntropyLoss | nn.NLLLoss, targets: Tensor, like: Tensor
) -> Tensor:
    """The class weight of every target, 0 where it is ignored."""
    counted = targets != criterion.ignore_index
    if criterion.weight is None:
        return counted.to(like.dtype)
    indices = torch.where(counted, targets, torch.zeros_like(targets))
    return (criterion.weight[indices] * counted).detach()
