"""Second derivatives that torch lacks, and faster ones of convolutions and BatchNorm.

torch differentiates the backward pass of a convolution by convolutions with image-sized kernels, and
that of BatchNorm by a long chain of passes over the activations. :class:`FastSecondOrder` replaces
both by equivalents with the same values and first derivatives up to rounding, and with second
derivatives from the kernels that torch uses for first ones. Unsupported cases are left to torch.
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
    output: Tensor = _Convolution.apply(input, weight, geometry)
    return output if bias is None else output + bias.view(-1, *[1] * spatial)


class _Convolution(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, weight: Tensor, geometry: _Geometry) -> Tensor:
        return _forward(input, weight, geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, ctx.geometry = inputs
        ctx.save_for_backward(input, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        input, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if needs[0] and needs[1]:
            return (*_ConvolutionBackward.apply(gradient, input, weight, ctx.geometry), None)
        # The input of a first layer or a frozen weight: torch's formula does no unnecessary work here.
        found = _backward(gradient, input, weight, ctx.geometry, (needs[0], needs[1]))
        return found[0], found[1], None


class _ConvolutionBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        gradient: Tensor, input: Tensor, weight: Tensor, geometry: _Geometry
    ) -> tuple[Tensor, Tensor]:
        return _backward(gradient, input, weight, geometry, (True, True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        gradient, input, weight, ctx.geometry = inputs
        ctx.save_for_backward(gradient, input, weight)

    @staticmethod
    def backward(
        ctx: Any, along_input: Tensor, along_weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        gradient, input, weight = ctx.saved_tensors
        geometry = ctx.geometry
        outgoing = _forward(along_input, weight, geometry) + _forward(input, along_weight, geometry)
        by_input = _backward(gradient, input, along_weight, geometry, (True, False))[0]
        by_weight = _backward(gradient, along_input, weight, geometry, (False, True))[1]
        return outgoing, by_input, by_weight, None


def _forward(input: Tensor, weight: Tensor, geometry: _Geometry) -> Tensor:
    stride, padding, dilation, groups = geometry
    zeros = [0] * len(stride)
    output: Tensor = torch.ops.aten.convolution(
        input, weight, None, stride, padding, dilation, False, zeros, groups
    )
    return output


def _backward(
    gradient: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: _Geometry,
    wanted: tuple[bool, bool],
) -> tuple[Any, Any]:
    stride, padding, dilation, groups = geometry
    zeros = [0] * len(stride)
    by_input, by_weight, _ = torch.ops.aten.convolution_backward(
        gradient,
        input,
        weight,
        None,
        stride,
        padding,
        dilation,
        False,
        zeros,
        groups,
        [*wanted, False],
    )
    return by_input, by_weight


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
    shape = [-1] + [1] * (input.ndim - 2)
    scale = torch.rsqrt(running_var + eps)
    if weight is not None:
        scale = scale * weight
    centered = input - running_mean.view(shape)
    if bias is None:
        return centered * scale.view(shape)
    return torch.addcmul(bias.view(shape), centered, scale.view(shape))
