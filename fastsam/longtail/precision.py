"""Precision of the passes of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastsam.longtail.errors import UsageError

Precision = Literal["float32", "bfloat16", "float16", "auto"]

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_BFLOAT16_CAPABILITY = (8, 0)
"""First compute capability whose tensor cores multiply bfloat16 and TF32 (Ampere)."""
_FLOAT16_CAPABILITY = (7, 0)
"""First compute capability with tensor cores, which multiply float16 only (Volta)."""
_CPU_INFO = Path("/proc/cpuinfo")


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Return a new autocast context for passes on ``device``; with ``float32`` autocast is off inside it.

    Every pass of a training step needs a new context, because a context caches weights that then change.

    Raises:
        ValueError: if ``precision`` is ``"auto"``, which :func:`chosen_precision` must replace first.
    """
    if precision == "auto":
        raise ValueError(
            "precision 'auto' has not been decided yet; pass chosen_precision(device)[0] instead"
        )
    dtype = _DTYPES.get(precision)
    if dtype is None and not torch.is_autocast_enabled(device.type):
        return nullcontext()  # cheaper than a disabled autocast context
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def at_least_float32(values: Tensor) -> Tensor:
    """Convert 16-bit values, such as logits under autocast, to float32; return others unchanged."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def chosen_precision(device: torch.device) -> tuple[Precision, str]:
    """Return the precision that ``auto`` stands for on ``device``, and the reason as a phrase.

    The choice depends only on what the hardware can multiply, never on a timing: a machine that happens to be
    busy would otherwise train another network.

    Example:
        >>> import torch
        >>> chosen_precision(torch.device("cpu"))[0] in ("float32", "bfloat16")
        True
    """
    if device.type == "cuda":
        name, capability = (
            torch.cuda.get_device_name(device),
            torch.cuda.get_device_capability(device),
        )
        reason = f"{name} has compute capability {capability[0]}.{capability[1]}"
        if capability >= _BFLOAT16_CAPABILITY:
            return "bfloat16", reason
        return ("float16" if capability >= _FLOAT16_CAPABILITY else "float32"), reason
    if _has_amx():
        return "bfloat16", "this CPU has AMX instructions for bfloat16"
    return "float32", "this CPU has no AMX instructions for bfloat16"


def check_tf32(tf32: bool | None, device: torch.device) -> None:
    """Check that ``device`` can multiply in TF32 if a run requires it.

    Raises:
        UsageError: if ``tf32`` is True and the device has no hardware for it.
    """
    if not tf32:
        return
    if device.type != "cuda":
        raise UsageError(
            f"tf32 requires an NVIDIA GPU, but device is {device}; pass --device cuda, or omit --tf32"
        )
    if torch.cuda.get_device_capability(device) < _BFLOAT16_CAPABILITY:
        raise UsageError(
            f"tf32 requires compute capability 8.0 or higher, but {torch.cuda.get_device_name(device)} has "
            "{}.{}; omit --tf32, or pass --precision float16".format(
                *torch.cuda.get_device_capability(device)
            )
        )


@contextmanager
def float32_products(tf32: bool | None, device: torch.device) -> Iterator[None]:
    """Set how a GPU multiplies float32 numbers inside the context, and restore torch's settings afterwards.

    Args:
        tf32: True to round factors to TF32 (10 bits of mantissa) in matrix products and convolutions, False
            to round in neither, None to keep torch's settings.
        device: device of the run; the context changes nothing for other devices than GPUs.
    """
    if tf32 is None or device.type != "cuda":
        yield
        return
    # Torch's older switches set the newer ones (fp32_precision), too. Setting the newer ones makes the two
    # disagree, and torch.compile, which reads the older ones, would fail.
    cudnn: Any = torch.backends.cudnn  # Any, because torch's types lack this attribute
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        cudnn.allow_tf32 = tf32
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        cudnn.allow_tf32 = before[1]


def _has_amx() -> bool:
    """Return whether the CPU multiplies tiles of bfloat16 (AMX)."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # older versions of torch lack it
    if capabilities is not None:
        return bool(capabilities().get("amx_bf16", False))
    return _CPU_INFO.is_file() and "amx_bf16" in _CPU_INFO.read_text("utf-8", "replace").split()
