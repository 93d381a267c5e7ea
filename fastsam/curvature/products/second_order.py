"""Second derivatives that torch lacks, and faster ones of convolutions and BatchNorm.

torch differentiates the backward pass of a convolution by convolutions with image-sized kernels, and
that of BatchNorm by a long chain of passes over the activations. :class:`FastSecondOrder` replaces
both by equivalents with the same values and first derivatives up to rounding, and with second
derivatives from the kernels that torch uses for first ones. A convolution and the BatchNorm of its output
become one convolution. Unsupported cases are left to torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsam.curvature.products.modes import Arguments, FunctionMode, Keywords

_Geometry = tuple[list[int], list[int], list[int], int]
"""Stride, padding, dilation, groups."""


class TwiceDifferentiable(FunctionMode):
    """Runs a model's forward pass without autocast and with operations that have second derivatives.

    A model that enters ``torch.autocast`` itself would compute in 16 bits even if the caller has
    disabled autocast, so it is disabled for every operation. ``F.hardsigmoid`` is the only activation
    of torch without a second derivative; it is replaced by ``F.hardtanh``, which has one.

    Args:
        device: device of the model.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._kinds = {"cpu", device.type}

    def call(self, function: Callable[..., Any], arguments: Arguments, keywords: Keywords) -> Any:
        """Call ``function``, or its replacement, without autocast."""
        if function is F.hardsigmoid:
            function = _hardsigmoid
        with ExitStack() as stack:
            for kind in self._kinds:
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            return function(*arguments, **keywords)


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    # Clone if in place, because hardtanh saves its argument for the backward pass.
    output = F.hardtanh(input.clone() if inplace else input, -3, 3) / 6 + 0.5
    return input.copy_(output) if inplace else output


class FastSecondOrder(FunctionMode):
    """Replaces convolutions and evaluation-mode ``batch_norm`` inside the context."""

    def call(self, function: Callable[..., Any], arguments: Arguments, keywords: Keywords) -> Any:
        """Call the replacement of ``function``, or ``function`` without one."""
        if function in _CONVOLUTIONS:
            result = _convolution(_CONVOLUTIONS[function], *arguments, **keywords)
        elif function is F.batch_norm:
            result = _batch_norm(*arguments, **keywords)
        else:
            result = None
        return function(*arguments, **keywords) if result is None else result


_CONVOLUTIONS: dict[Any, int] = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}


def _convolution(
    spatial: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor | None:
    if isinstance(padding, str) or input.ndim != spatial + 2:
        return None

    def each(value: int | Sequence[int]) -> list[int]:
        values = [value] if isinstance(value, int) else list(value)
        return values * spatial if len(values) == 1 else values

    geometry = (each(stride), each(padding), each(dilation), groups)
    output: Tensor = _Convolution.apply(input, weight, bias, geometry)
    return output


class _Convolution(torch.autograd.Function):
    """A convolution. If its output is known as ``addcmul(bias, unscaled, scale)``, it is not computed."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: _Geometry,
        unscaled: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        if bias is None or unscaled is None or scale is None:
            return _forward(input, weight, bias, geometry)
        shape = _of_channels(unscaled)
        return torch.addcmul(bias.view(shape), unscaled, scale.view(shape))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, bias, ctx.geometry, *_ = inputs
        ctx.save_for_backward(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, _ = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if needs[0] and needs[1]:
            found = _ConvolutionBackward.apply(gradient, input, weight, ctx.geometry, needs[2])
        else:
            # The input of a first layer or a frozen weight: torch's formula does no unnecessary work here.
            found = _backward(gradient, input, weight, ctx.geometry, needs)
        return (*found, *[None] * (len(ctx.needs_input_grad) - len(found)))


class _ConvolutionBackward(torch.autograd.Function):
    """The gradients by input and weight, and by the bias if ``biased``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        gradient: Tensor, input: Tensor, weight: Tensor, geometry: _Geometry, biased: bool
    ) -> tuple[Tensor, ...]:
        return _backward(gradient, input, weight, geometry, (True, True, biased))[: 2 + biased]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        gradient, input, weight, ctx.geometry, _ = inputs
        ctx.save_for_backward(gradient, input, weight)

    @staticmethod
    def backward(
        ctx: Any, along_input: Tensor, along_weight: Tensor, along_bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        gradient, input, weight = ctx.saved_tensors
        geometry = ctx.geometry
        outgoing = _forward(along_input, weight, None, geometry)
        outgoing = outgoing + _forward(input, along_weight, along_bias, geometry)
        by_input = _backward(gradient, input, along_weight, geometry, (True, False, False))[0]
        by_weight = _backward(gradient, along_input, weight, geometry, (False, True, False))[1]
        return outgoing, by_input, by_weight, None, None


def _forward(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: _Geometry) -> Tensor:
    stride, padding, dilation, groups = geometry
    zeros = [0] * len(stride)
    output: Tensor = torch.ops.aten.convolution(
        input, weight, bias, stride, padding, dilation, False, zeros, groups
    )
    return output


def _backward(
    gradient: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: _Geometry,
    wanted: tuple[bool, bool, bool],
) -> tuple[Any, Any, Any]:
    stride, padding, dilation, groups = geometry
    zeros = [0] * len(stride)
    found: tuple[Any, Any, Any] = torch.ops.aten.convolution_backward(
        gradient,
        input,
        weight,
        [weight.shape[0]] if wanted[2] else None,
        stride,
        padding,
        dilation,
        False,
        zeros,
        groups,
        wanted,
    )
    return found


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    if training or running_mean is None or running_var is None:
        return None
    scale = torch.rsqrt(running_var + eps)
    if weight is not None:
        scale = scale * weight
    shift = -running_mean * scale
    if bias is not None:
        shift = bias + shift
    folded = _fold(input, scale, shift)
    if folded is not None:
        return folded
    shape = _of_channels(input)
    return torch.addcmul(shift.view(shape), input, scale.view(shape))


def _fold(input: Tensor, scale: Tensor, shift: Tensor) -> Tensor | None:
    """Return ``scale * input + shift`` as one convolution, if ``input`` is the output of a convolution.

    Its weight and bias are those of the convolution, scaled and shifted by channel. Derivatives of
    ``scale`` and ``shift`` then cost passes over the weights instead of passes over the activations.
    """
    if not isinstance(input.grad_fn, _Convolution._backward_cls):
        return None
    node: Any = input.grad_fn
    source, weight, bias = node.saved_tensors
    if input._version > 0:  # changed in place, which left no trace in the graph
        return None
    if scale.requires_grad and not weight.requires_grad:
        return None  # the derivative of the scale would cost that of a frozen weight
    unscaled = input.detach()
    if bias is not None:
        unscaled = unscaled - bias.detach().view(_of_channels(input))
        shift = torch.addcmul(shift, bias, scale)
    scaled = weight * scale.view(-1, *[1] * (weight.ndim - 1))
    output: Tensor = _Convolution.apply(
        source, scaled, shift, node.geometry, unscaled, scale.detach()
    )
    return output


def _of_channels(activations: Tensor) -> list[int]:
    """Return the shape ``[C, 1, ...]`` of a vector by channel, for ``activations`` ``[N, C, ...]``."""
    return [-1] + [1] * (activations.ndim - 2)
