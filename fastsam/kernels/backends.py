"""Choice of the backend of a device: native kernels, or the same steps in PyTorch operations."""

from __future__ import annotations

import functools
import os
import re
import warnings
from dataclasses import dataclass
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


_OTHER_DEVICE = "move the model to the CPU or to an NVIDIA GPU"


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
    """Return the backend for tensors on ``device``. It depends on its type, and on the architecture of a GPU.

    Raises:
        ImportError: the native module could not be loaded. There is no fallback in any mode.
        RuntimeError: ``FASTSAM_KERNELS=native`` and the device has no kernels.
        ValueError: ``FASTSAM_KERNELS`` has an invalid value.

    Warns:
        FallbackWarning: the device has no kernels and ``FASTSAM_KERNELS`` is ``auto``; once per process and
            reason, on rank 0.

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
    missing = missing_kernels(device)
    if missing is None:
        return "native"
    _warn_of_fallback(missing)
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
    if kernels_mode() == "torch":
        raise RuntimeError(
            f"{VARIABLE}=torch disables the native kernels: unset it, or set it to auto or native"
        )
    missing = missing_kernels(torch.device(present_device() if device is None else device))
    if missing is not None:
        raise RuntimeError(f"{missing.reason}; {missing.advice}")


@dataclass(frozen=True)
class Missing:
    """Why a device has no native kernels, and what to do about it."""

    reason: str
    advice: str


def missing_kernels(device: torch.device) -> Missing | None:
    """Return why ``device`` has no native kernels; None if it has."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return Missing(
            f"fastsam has no kernels for {device.type!r} devices, only for the CPU and NVIDIA GPUs",
            _OTHER_DEVICE,
        )
    if torch.version.hip is not None:
        return Missing(
            "fastsam has no kernels for AMD GPUs (ROCm), only for the CPU and NVIDIA GPUs",
            _OTHER_DEVICE,
        )
    if not hasattr(extension.module(), "cuda"):
        return Missing(
            "fastsam was built without CUDA kernels, because the build found no nvcc", _TOOLKIT
        )
    build = extension.module().build_info()
    return _outdated_driver(build) or _other_architecture(build, device)


def _outdated_driver(build: dict[str, Any]) -> Missing | None:
    """Return a message if the driver has an older major version than the CUDA runtime of the build."""
    driver, runtime = build.get("cuda_driver", 0), build.get("cuda_runtime", 0)
    if driver // 1000 >= runtime // 1000:
        return None
    return Missing(
        f"fastsam was built with CUDA {cuda_version(runtime)}, but the NVIDIA driver supports only CUDA "
        f"{cuda_version(driver)}",
        f"update the driver, or build with a toolkit that it supports: {_TOOLKIT}",
    )


def _other_architecture(build: dict[str, Any], device: torch.device) -> Missing | None:
    """Return a message if no code in the build runs on the GPU."""
    major, minor = torch.cuda.get_device_capability(device)
    architectures = build["cuda_architectures"]
    if runs_on(architectures, (major, minor)):
        return None
    return Missing(
        f"fastsam was built for the CUDA architectures {architectures}, but {device} has compute capability "
        f"{major}.{minor}",
        f"build for this GPU, with a toolkit that supports it: run `CUDAARCHS={major}{minor} pip install .` "
        "in a checkout of fastsam",
    )


@functools.cache
def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Return whether code for CMake's ``CUDA_ARCHITECTURES`` runs on a GPU of this compute capability.

    Machine code (``75-real``) runs on GPUs of the same major and the same or a higher minor version. PTX
    (``120-virtual``) is compiled for these and for all newer ones. ``90`` means both. Code for one
    architecture (``90a``) and for one family (``100f``) does not run on newer ones. Names such as ``native``
    do not tell the architecture and count as any.

    Example:
        >>> runs_on("75-real, 90", (8, 0)), runs_on("75-real, 90", (10, 0))
        (False, True)
    """
    for entry in architectures.replace(",", " ").split():
        found = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", entry)
        if found is None:
            return True
        built, suffix = (int(found[1]), int(found[2])), found[3]
        if suffix == "a":
            runs = capability == built
        elif suffix == "f" or found[4] == "-real":
            runs = capability[0] == built[0] and capability >= built
        else:
            runs = capability >= built
        if runs:
            return True
    return False


def cuda_version(number: int) -> str:
    """Format a version number of CUDA.

    Example:
        >>> cuda_version(12080)
        '12.8'
    """
    return f"{number // 1000}.{number % 1000 // 10}"


@functools.cache
def _warn_of_fallback(missing: Missing) -> None:
    """Warn once per reason, on rank 0; the cache makes later calls do nothing."""
    if _rank() != 0:
        return
    warnings.warn(
        f"{missing.reason}. SAM, its variants and the Lanczos steps of spectra run as PyTorch "
        "operations there. Results agree up to rounding, but every tensor takes several launches instead of "
        "one launch for all tensors; forward and backward passes are not slower. To get the kernels: "
        f"{missing.advice}. {VARIABLE}=torch silences this warning; fastsam.require_native() raises an "
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
    missing = missing_kernels(torch.device(device_type))
    if missing is not None:
        return f"{'none' if mode == 'native' else 'torch'} ({missing.reason})"
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
