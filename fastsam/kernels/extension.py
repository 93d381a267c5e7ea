"""Load the native module and find the backend of a device; errors say what is missing and what to do."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch  # loads the OpenMP runtime that _native then shares

try:
    from fastsam import _native
except ImportError as error:  # reported by `module()` when a kernel is first needed
    _native = None  # type: ignore[assignment]
    _load_error: ImportError | None = error
else:
    _load_error = None

if TYPE_CHECKING:
    from fastsam._native import Execution

TABLE_COLUMNS: tuple[str, ...] = () if _native is None else _native.TABLE_COLUMNS
"""Columns of a table of tensors, in the order of ``csrc/include/fastsam/table.h``."""

HYPER_COLUMNS: tuple[str, ...] = () if _native is None else _native.HYPER_COLUMNS
"""Columns of a row of hyper-parameters, in the order of ``csrc/include/fastsam/sam.h``."""

ADAPTIVE: int = 0 if _native is None else _native.ADAPTIVE
STOCHASTIC: int = 0 if _native is None else _native.STOCHASTIC
"""Values of the column ``flags``: ``enum Flag`` of ``csrc/include/fastsam/table.h``."""

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""Storage types of the kernels, by the codes of ``csrc/include/fastsam/types.h``."""


def module() -> ModuleType:
    """Return the native module.

    Raises:
        ImportError: it could not be loaded; the message says why and what to do.
    """
    if _native is None:
        raise ImportError(
            f"fastsam's native module could not be loaded ({_load_error}). Reinstall with "
            "`pip install --force-reinstall --no-deps fastsam`, or `pip install .` in a checkout; "
            "`fastsam doctor` shows what was found."
        ) from _load_error
    return _native


def backend(device: torch.device) -> Any:
    """Return the launches for tensors on ``device``: the native submodule ``cpu`` or ``cuda``.

    Raises:
        RuntimeError: there are no kernels for this device.
    """
    if device.type == "cpu":
        return module().cpu
    if device.type == "cuda":
        cuda = getattr(module(), "cuda", None)
        if cuda is None:
            raise RuntimeError(
                "fastsam was built without CUDA kernels, but a tensor is on a CUDA device. Install the "
                "CUDA toolkit (nvcc) and reinstall fastsam, or move the model to the CPU."
            )
        return cuda
    raise RuntimeError(
        f"fastsam has kernels for cpu and cuda, not for {device.type!r}: move the model to one of them."
    )


def execution(device: torch.device) -> Execution:
    """Return where a launch runs: on torch's current stream on CUDA, with torch's threads on the CPU."""
    loaded = module()
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)
        return loaded.Execution(stream.device_index, stream.cuda_stream, 0)  # type: ignore[no-any-return]
    return loaded.Execution(-1, 0, torch.get_num_threads())  # type: ignore[no-any-return]


def build_info() -> dict[str, Any]:
    """Return how the native module was built and what it finds on this machine.

    Example:
        >>> import fastsam
        >>> sorted(fastsam.build_info())[:2]
        ['compiler', 'cuda']
    """
    return dict(module().build_info())
