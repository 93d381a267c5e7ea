"""Choice of the backend of a device: native kernels, or the same steps in PyTorch operations."""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from fastsam.kernels import extension

Backend = Literal["native", "torch"]
Mode = Literal["auto", "native", "torch"]

VARIABLE = "FASTSAM_KERNELS"
"""Environment variable with the :data:`Mode`; unset means ``auto``."""

_TOOLKIT = (
    "a CUDA toolkit needs no root rights: `conda install -c conda-forge cuda-nvcc cuda-cudart-dev`, or "
    "NVIDIA's runfile with `--silent --toolkit --toolkitpath=$HOME/cuda`; put its bin folder on PATH and run "
    "`pip install .` in a checkout of fastsam"
)


class FallbackWarning(UserWarning):
    """Warns that a device has no native kernels, so that PyTorch operations run instead."""


def kernels_mode() -> Mode:
    """Return the mode set by the environment variable ``FASTSAM_KERNELS``.

    ``auto`` (default) uses native kernels on devices that have them and PyTorch operations on others.
    ``native`` raises on devices without kernels. ``torch`` uses PyTorch operations on all devices.

    Raises:
        ValueError: the variable has another value.
    """
    mode = os.environ.get(VARIABLE, "auto")
    if mode not in get_args(Mode):
        raise ValueError(
            f"the environment variable {VARIABLE} is {mode!r}; expected 'auto', 'native' or 'torch'. Unset "
            "it to use native kernels on devices that have them"
        )
    return cast("Mode", mode)


def backend_of(device: torch.device) -> Backend:
    """Return the backend for tensors on ``device``. It depends only on the type of the device.

    Raises:
        ImportError: the native module could not be loaded. There is no fallback in any mode.
        RuntimeError: ``FASTSAM_KERNELS=native`` and the device has no kernels.
        ValueError: ``FASTSAM_KERNELS`` has an invalid value.

    Warns:
        FallbackWarning: the device has no kernels and ``FASTSAM_KERNELS`` is ``auto``; once per process and
            type of device, on rank 0.

    Example:
        >>> import torch
        >>> from fastsam.kernels.backends import backend_of
        >>> backend_of(torch.device("cpu")) in ("native", "torch")
        True
    """
    extension.module()
    mode = kernels_mode()
    if mode == "torch":
        return "torch"
    if mode == "native":
        require_native(device)
        return "native"
    if missing_kernels(device.type) is None:
        return "native"
    _warn_of_fallback(device.type)
    return "torch"


def require_native(device: torch.device | str | None = None) -> None:
    """Raise an error unless the native kernels run on ``device``.

    Args:
        device: a device or its name. Default None: the accelerator that torch finds, or the CPU.

    Raises:
        ImportError: the native module could not be loaded.
        RuntimeError: the device has no kernels, or ``FASTSAM_KERNELS=torch`` disables them. The message gives
            the reason and the fix.

    Example:
        >>> import fastsam
        >>> fastsam.require_native("meta")
        Traceback (most recent call last):
        ...
        RuntimeError: fastsam has no kernels for 'meta' devices, only for the CPU and NVIDIA GPUs...
    """
    extension.module()
    kind = present_device() if device is None else torch.device(device).type
    if kernels_mode() == "torch":
        raise RuntimeError(
            f"{VARIABLE}=torch disables the native kernels: unset it, or set it to auto or native"
        )
    reason = missing_kernels(kind)
    if reason is not None:
        raise RuntimeError(f"{reason}; {_advice(kind)}")


def missing_kernels(device_type: str) -> str | None:
    """Return the reason why devices of a type have no native kernels; None if they have."""
    if device_type == "cpu":
        return None
    if device_type != "cuda":
        return (
            f"fastsam has no kernels for {device_type!r} devices, only for the CPU and NVIDIA GPUs"
        )
    if torch.version.hip is not None:
        return "fastsam has no kernels for AMD GPUs (ROCm), only for the CPU and NVIDIA GPUs"
    if not hasattr(extension.module(), "cuda"):
        return "fastsam was built without CUDA kernels, because the build found no nvcc"
    return _outdated_driver(extension.module().build_info())


def _outdated_driver(build: dict[str, Any]) -> str | None:
    """Return a message if the driver has an older major version than the CUDA runtime of the build."""
    driver, runtime = build.get("cuda_driver", 0), build.get("cuda_runtime", 0)
    if driver // 1000 >= runtime // 1000:
        return None
    return (
        f"fastsam was built with CUDA {cuda_version(runtime)}, but the NVIDIA driver supports only CUDA "
        f"{cuda_version(driver)}"
    )


def cuda_version(number: int) -> str:
    """Format a version number of CUDA.

    Example:
        >>> cuda_version(12080)
        '12.8'
    """
    return f"{number // 1000}.{number % 1000 // 10}"


def _advice(device_type: str) -> str:
    if device_type != "cuda" or torch.version.hip is not None:
        return "move the model to the CPU or to an NVIDIA GPU"
    if not hasattr(extension.module(), "cuda"):
        return _TOOLKIT
    return f"update the driver, or build with a toolkit that it supports: {_TOOLKIT}"


@functools.cache
def _warn_of_fallback(device_type: str) -> None:
    """Warn once per type of device, on rank 0; the cache makes later calls do nothing."""
    if _rank() != 0:
        return
    warnings.warn(
        f"{missing_kernels(device_type)}. SAM, its variants and the Lanczos steps of spectra run as PyTorch "
        "operations there. Results agree up to rounding, but every tensor takes several launches instead of "
        "one launch for all tensors; forward and backward passes are not slower. To get the kernels: "
        f"{_advice(device_type)}. {VARIABLE}=torch silences this warning; fastsam.require_native() raises an "
        "error instead",
        FallbackWarning,
        stacklevel=2,
    )


def _rank() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", "0"))


def present_device() -> str:
    """Return the type of the accelerator that torch finds, or ``cpu`` without one."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def build_info() -> dict[str, Any]:
    """Return how the native module was built, what it finds on this machine, and each device's backend.

    The key ``kernels`` is the mode of ``FASTSAM_KERNELS``. ``backends`` is ``native`` or ``torch`` for the
    CPU and for the accelerator that torch finds, with the reason if the kernels are missing.

    Raises:
        ImportError: the native module could not be loaded.

    Example:
        >>> import fastsam
        >>> sorted(fastsam.build_info())[:3]
        ['backends', 'compiler', 'cuda']
    """
    mode = kernels_mode()
    return {
        **extension.module().build_info(),
        "kernels": mode,
        "backends": {kind: _described(kind, mode) for kind in ("cpu", present_device())},
    }


def _described(device_type: str, mode: Mode) -> str:
    reason = missing_kernels(device_type)
    if reason is not None:
        return f"{'none' if mode == 'native' else 'torch'} ({reason})"
    return "torch" if mode == "torch" else "native"


def sum_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums over tensors of ``dtype`` on ``device``, and of their device scalars.

    It is float64 with native kernels and for float64 tensors, and float32 otherwise, because some devices
    (MPS) have no float64.
    """
    if dtype == torch.float64 or backend_of(device) == "native":
        return torch.float64
    return torch.float32


def widened(tensor: Tensor) -> Tensor:
    """Convert ``tensor`` to the dtype of sums over it; see :func:`sum_dtype`."""
    return tensor.to(sum_dtype(tensor.device, tensor.dtype))
