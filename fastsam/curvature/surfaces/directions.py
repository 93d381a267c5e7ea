"""Directions in the space of parameters: random or given, and their normalization."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from fastsam.curvature.checks import check_count
from fastsam.curvature.losses import unwrapped
from fastsam.curvature.operators.model import run_dtype
from fastsam.curvature.products.pure import PureLoss
from fastsam.curvature.products.selection import parameter_names
from fastsam.curvature.randomness import USER_CODE
from fastsam.kernels.backends import widened

Direction: TypeAlias = "Mapping[str, Tensor] | Tensor"
Normalization = Literal["none", "filter", "layer"]

_PARALLEL = 1e-6
"""Two directions are refused if the sine of their angle is smaller."""


def random_directions(
    model: nn.Module,
    count: int = 2,
    *,
    seed: int = 0,
    normalize: Normalization = "filter",
    params: Iterable[str] | None = None,
) -> list[dict[str, Tensor]]:
    """Draw Gaussian directions in the space of a model's parameters.

    Li et al., "Visualizing the Loss Landscape of Neural Nets" (NeurIPS 2018, arXiv 1712.09913),
    section 4: every filter of a direction is scaled to the norm of the filter of the weights, so that
    networks with different scales of their weights can be compared. A filter is a slice along the
    first dimension: the weights of one output channel of a convolution or one output of a linear
    layer. Parameters of at most one dimension (biases, scales of normalization layers) get zeros, as
    with the authors' option ``biasbn``.

    Args:
        model: any module with all parameters on one device.
        count: number of directions. Default 2.
        seed: seed of the draws, which are made in float64 on the CPU. The first directions do not
            depend on ``count``. Global generators are not used.
        normalize: ``"filter"`` (default) as above; ``"layer"`` scales every parameter of a direction
            to the norm of that parameter; ``"none"`` returns the Gaussian draws.
        params: names of parameters or layers; all others get zeros. Default None: all that require a
            gradient.

    Returns:
        Directions by parameter name, in the dtype of the parameters, at least float32.

    Raises:
        TypeError, ValueError: an argument is invalid.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> first, second = random_directions(model, seed=1)
        >>> torch.allclose(first["weight"].norm(dim=1), model.weight.norm(dim=1))
        True
        >>> first["bias"].tolist()
        [0.0, 0.0]
    """
    check_count("count", count, unit="directions")
    check_normalization(normalize)
    model = unwrapped(model)
    names = parameter_names(model, params)
    with USER_CODE:  # another run may have swapped its parameters into the model
        available = dict(model.named_parameters())
    weights = [available[name].detach() for name in names]
    dtype = run_dtype(model, names, None)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        drawn = [
            # To the dtype first: some devices have no float64.
            torch.randn(weight.shape, dtype=torch.float64, generator=generator, device="cpu")
            .to(dtype)
            .to(weight.device)
            for weight in weights
        ]
        found.append(dict(zip(names, normalized(drawn, weights, normalize), strict=True)))
    return found


def check_normalization(normalize: str) -> None:
    """Raise ValueError for an unknown normalization."""
    if normalize not in get_args(Normalization):
        raise ValueError(
            f"normalize must be one of {', '.join(get_args(Normalization))}, got {normalize!r}"
        )


def normalized(
    pieces: Sequence[Tensor], weights: Sequence[Tensor], normalize: Normalization
) -> list[Tensor]:
    """Scale a direction, given by tensors of the parameters' shapes, to the norms of the weights."""
    if normalize == "none":
        return list(pieces)
    if normalize == "layer":
        return [_scaled(piece, weight) for piece, weight in zip(pieces, weights, strict=True)]
    return [
        torch.zeros_like(piece) if piece.ndim <= 1 else _scaled(piece, weight, filters=True)
        for piece, weight in zip(pieces, weights, strict=True)
    ]


def _scaled(piece: Tensor, weight: Tensor, *, filters: bool = False) -> Tensor:
    """Scale a tensor, or each of its slices along the first dimension, to the norm of the weight."""
    if not piece.numel():
        return piece
    rows = len(piece) if filters else 1
    own = widened(piece).reshape(rows, -1).norm(dim=1, keepdim=True)
    wanted = widened(weight).reshape(rows, -1).norm(dim=1, keepdim=True)
    factor = torch.where(own > 0, wanted / own, 0)
    return (widened(piece).reshape(rows, -1) * factor).reshape(piece.shape).to(piece.dtype)


def direction_rows(
    loss: PureLoss,
    directions: Direction | Sequence[Direction],
    normalize: Normalization,
) -> Tensor:
    """Convert one or two directions to rows ``[count, n]`` over the chosen parameters.

    Raises:
        TypeError: a direction is neither a mapping nor a tensor.
        ValueError: there are more than two directions or none, a name is unknown, a shape is wrong,
            or a direction is zero or not finite, or the two are parallel.
    """
    check_normalization(normalize)
    if isinstance(directions, Mapping) or (isinstance(directions, Tensor) and directions.ndim == 1):
        directions = [directions]
    listed = list(directions)
    if len(listed) not in (1, 2):
        raise ValueError(f"a surface has one or two directions, got {len(listed)}")
    rows = []
    for number, direction in enumerate(listed):
        flat = _flat(loss, direction, number).detach()
        row = loss.join(normalized(loss.split(flat), loss.values, normalize))
        norm = float(widened(row).norm())
        if not 0 < norm < float("inf"):
            raise ValueError(
                f"direction {number} has the norm {norm} after normalize={normalize!r}; expected a "
                "finite norm above 0"
            )
        rows.append(row)
    stacked = torch.stack(rows)
    cosine = cosine_of(stacked)
    if cosine is not None and 1 - cosine**2 < _PARALLEL**2:
        raise ValueError(
            f"the two directions are parallel (their cosine is {cosine:.6g}), so they span a line; "
            "pass another second direction, or one direction for a curve"
        )
    return stacked


def cosine_of(rows: Tensor) -> float | None:
    """Return the cosine of the angle between two rows; None for a single row."""
    if len(rows) == 1:
        return None
    first, second = (row / row.norm() for row in widened(rows))
    return float(first @ second)


def _flat(loss: PureLoss, direction: Direction, number: int) -> Tensor:
    if isinstance(direction, Mapping):
        unknown = sorted(set(direction) - set(loss.names))
        if unknown:
            raise ValueError(
                f"direction {number}: no chosen parameter is named {unknown[0]!r}; they are "
                f"{', '.join(loss.names)}"
            )
        zeros = {
            name: torch.zeros_like(value)
            for name, value in zip(loss.names, loss.values, strict=True)
        }
        return loss.join_by_name({**zeros, **direction})
    if not isinstance(direction, Tensor):
        raise TypeError(
            f"direction {number} must be a mapping by parameter name or a tensor "
            f"[{loss.dimension}], got {type(direction).__name__}"
        )
    if direction.shape != (loss.dimension,):
        raise ValueError(
            f"direction {number} has shape {tuple(direction.shape)}, expected ({loss.dimension},), "
            "one value for each chosen parameter"
        )
    return direction.to(loss.dtype).to(loss.device)
