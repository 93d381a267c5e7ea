"""Extreme eigenpairs of an operator, with measured residuals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastsam.curvature.lanczos import LanczosRun, LanczosSettings, lanczos
from fastsam.curvature.operators import Operator
from fastsam.curvature.quadrature import ritz_pairs
from fastsam.kernels.backends import widened

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastsam.curvature.options import LanczosOptions


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Approximate eigenpairs of both ends of a spectrum.

    Attributes:
        values: Rayleigh quotients, float64 ``[count]``: first the ``top`` largest in descending
            order, then the smallest in ascending order.
        vectors: unit vectors ``[count, n]`` on the operator's device.
        residuals: ``||H v - value v||``, float64 ``[count]``: an eigenvalue is within this distance
            of the value.
        top: number of pairs from the upper end.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    top: int


def eigenpairs(
    operator: Operator,
    *,
    top: int = 1,
    bottom: int = 1,
    **options: Unpack[LanczosOptions],
) -> Eigenpairs:
    """Return the ``top`` largest and ``bottom`` smallest eigenvalues with their eigenvectors.

    It makes one Lanczos run that keeps the basis, and one product per pair for the residuals. A
    multiple eigenvalue occurs once, because the Krylov space of one start vector contains only one
    direction of its eigenspace.

    Args:
        operator: any symmetric operator.
        top: number of pairs from the upper end. Default 1.
        bottom: number of pairs from the lower end. Default 1.
        **options: see :class:`fastsam.curvature.lanczos.LanczosSettings`; ``probes`` must be 1 and
            ``reorthogonalize`` must be ``"full"``.

    Raises:
        ValueError: an option is invalid, or the run found fewer Ritz values than requested pairs.

    Example:
        >>> from fastsam.curvature import MatrixOperator
        >>> operator = MatrixOperator(torch.diag(torch.tensor([-1.0, 2.0, 5.0])))
        >>> [round(value, 4) for value in eigenpairs(operator, steps=3).values.tolist()]
        [5.0, -1.0]
    """
    return extreme_pairs(operator, LanczosSettings(**options), top=top, bottom=bottom)


def extreme_pairs(
    operator: Operator, settings: LanczosSettings, *, top: int, bottom: int
) -> Eigenpairs:
    """Return :func:`eigenpairs` for an existing settings object."""
    if min(top, bottom) < 0 or top + bottom < 1:
        raise ValueError(
            f"top and bottom must be at least 0 and one of them at least 1, got {top} and {bottom}"
        )
    if settings.reorthogonalize == "none":
        raise ValueError("eigenvectors require the basis: use reorthogonalize='full'")
    if len(settings.indices) != 1:
        raise ValueError(f"eigenpairs requires probes=1, got {len(settings.indices)} probes")
    with lanczos(operator, settings, identity=getattr(operator, "identity", {})) as run:
        vectors = _ritz_vectors(run, top=top, bottom=bottom).to(operator.device)
    images = operator.matmat(vectors)
    values = (widened(vectors) * widened(images)).sum(dim=1)
    residuals = (widened(images) - values[:, None] * widened(vectors)).norm(dim=1)
    return Eigenpairs(
        values=values.cpu().double(),
        vectors=vectors,
        residuals=residuals.cpu().double(),
        top=top,
    )


def _ritz_vectors(run: LanczosRun, *, top: int, bottom: int) -> Tensor:
    order = int(run.order[0])
    both_ends = (
        order == top == bottom == 1
    )  # a multiple of the identity: its value is both extremes
    if top + bottom > order and not both_ends:
        raise ValueError(
            f"{top} + {bottom} eigenpairs were requested, but the run found {order} Ritz values (a "
            "multiple eigenvalue counts once); use more steps or request fewer pairs"
        )
    _, coordinates = ritz_pairs(run.alpha[0, :order], run.beta[0, :order])
    chosen = [order - 1 - index for index in range(top)] + list(range(bottom))
    assert run.basis is not None
    rows = run.basis[0, :order]
    mix = torch.from_numpy(coordinates[:, chosen])
    vectors: Tensor = widened(mix.T.to(rows) @ rows)
    vectors /= vectors.norm(dim=1, keepdim=True)
    return vectors.to(rows.dtype)
