"""Resume a Lanczos run from its checkpoint, on all ranks alike."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastsam.curvature.lanczos.checkpoint import LanczosCheckpoint, Progress
from fastsam.curvature.lanczos.options import LanczosOptions
from fastsam.curvature.lanczos.probes import sphere_probes
from fastsam.curvature.operators.base import Operator, checked_product
from fastsam.distributed import World
from fastsam.kernels.backends import sum_dtype
from fastsam.kernels.lanczos import Recurrence, orthogonalize


def resume(
    checkpoint: LanczosCheckpoint,
    operator: Operator,
    basis: Tensor,
    recurrence: Recurrence,
    options: LanczosOptions,
    *,
    world: World,
) -> Progress:
    """Fill the basis and the recurrence from a checkpoint, and verify that it is of this operator.

    The identity of a run cannot name everything that determines its products, such as the code of a
    loss function. The first step is therefore repeated, by one product, and compared with the stored
    one. A finished run is verified too.

    Args:
        checkpoint: checkpoint of the run.
        operator: symmetric operator of dimension n.
        basis: basis to fill, ``[probes, rows, n]``.
        recurrence: recurrence to fill.
        options: options of the run.
        world: ranks that compute each product together. All of them resume the run, or none.

    Returns:
        The progress of the run; that of a new run if the folder contains none.

    Raises:
        ValueError: the folder contains a damaged run, or one of other settings or of another operator.
    """
    earlier = _restored(checkpoint, basis, recurrence, options, world)
    if not earlier.done:
        return earlier
    products = _verify(checkpoint, operator, basis, recurrence, options, world)
    skip = getattr(operator, "skip", None)
    if skip is not None and not earlier.ended:
        # The verification has read unverified data, as the first product of the run did.
        skip(max(0, earlier.done - products))
    return earlier


def _restored(
    checkpoint: LanczosCheckpoint,
    basis: Tensor,
    recurrence: Recurrence,
    options: LanczosOptions,
    world: World,
) -> Progress:
    """Restore the run; an error on one rank is an error on all, because the others would wait for it."""
    outcome: Progress | str
    try:
        outcome = earlier = checkpoint.restore(
            basis, recurrence, all_rows=options.reorthogonalize == "full"
        )
    except Exception as error:
        world.all_gather(str(error))
        raise
    for rank, found in enumerate(world.all_gather(outcome)):
        if isinstance(found, str):
            raise ValueError(f"rank {rank} cannot resume the run: {found}")
        if found != earlier:
            raise ValueError(
                f"the ranks find different runs in {checkpoint.folder}: {found.done} steps on rank "
                f"{rank}, {earlier.done} on rank {world.rank}; expected a folder on a file system that "
                "all ranks share"
            )
    return earlier


def _verify(
    checkpoint: LanczosCheckpoint,
    operator: Operator,
    basis: Tensor,
    recurrence: Recurrence,
    options: LanczosOptions,
    world: World,
) -> int:
    """Compare the stored first step with one of this operator, and return the number of products.

    Raises:
        ValueError: the products of the operator repeat, but the first step differs.
    """
    stored = _first(recurrence)
    eps = torch.finfo(operator.dtype).eps
    # Other processors and numbers of threads round differently. Near a minimum the terms of the product
    # cancel within the network: in float32 by up to 1e-3 of the product at losses of 1e-5. Another loss
    # function or model changes it by far more.
    allowed = eps**0.25 * stored.norm(dim=0) + 16 * eps * recurrence.bound.cpu().double()

    def differ(one: Tensor, other: Tensor) -> bool:
        # Negated, so that NaN differs. One answer for all ranks, which must go on or fail together.
        return any(world.all_gather(not bool(((one - other).abs() <= allowed).all())))

    found = repeat_first_step(operator, basis, options)
    if not differ(found, stored):
        return 1
    again = repeat_first_step(operator, basis, options)
    if bool(found.isfinite().all()) and differ(again, found):
        return 2  # products change from call to call (verify_data=False): they cannot be compared
    probe = int((found - stored).abs().amax(dim=0).nan_to_num(math.inf).argmax())
    raise ValueError(
        f"{checkpoint.folder} contains a run of another operator: the first diagonal entry of T is "
        f"{stored[0, probe]:.9g} there and {found[0, probe]:.9g} now, the first off-diagonal entry "
        f"{stored[1, probe]:.9g} and {found[1, probe]:.9g}. The loss function, the model, the data or the "
        "matrix differ; repeat the call with those of that run or choose another folder. If only the "
        f"processor differs, the products are below the resolution of {operator.dtype}: use float64"
    )


def repeat_first_step(operator: Operator, basis: Tensor, options: LanczosOptions) -> Tensor:
    """Return the first diagonal and off-diagonal entry of T, float64 ``[2, probes]`` on the CPU.

    The start vectors are drawn again, because a checkpoint need not contain them.
    """
    start = sphere_probes(
        operator.shape[0],
        options.indices,
        seed=options.seed,
        dtype=basis.dtype,
        device=basis.device,
    )
    product = operator.matmat(start.to(operator.device))
    # A copy, because the product may be its argument or memory that the operator reuses.
    image = checked_product(product, start).to(basis.device).clone()
    kind = sum_dtype(basis.device, basis.dtype)
    step = Recurrence.start(len(start), 1, device=basis.device, dtype=kind)
    eps = torch.finfo(operator.dtype).eps
    orthogonalize(start[:, None], image, None, step, step=0, eps=eps)
    return _first(step)


def _first(recurrence: Recurrence) -> Tensor:
    return torch.stack([recurrence.alpha[:, 0], recurrence.beta[:, 0]]).cpu().double()
