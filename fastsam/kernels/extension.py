"""Load the native module and find the backend of a device; errors say what is missing and what to do."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch  # loads the OpenMP runtime that _native then shares


def _advice(package: Path) -> str:
    """Return what to do where the native module cannot be loaded from the folder of the package."""
    checkout = package.parent
    if (checkout / "pyproject.toml").is_file():
        return (
            f"build it with `pip install --editable {checkout}`, or start Python in another folder to use "
            "an installed fastsam"
        )
    return "reinstall it with `pip install --force-reinstall --no-deps .` in a checkout of fastsam"


try:
    from fastsam import _native
except ImportError as error:
    _package = Path(__file__).parents[1]
    raise ImportError(
        f"the native module of fastsam cannot be loaded from {_package} ({error}): {_advice(_package)}"
    ) from error

if TYPE_CHECKING:
    from fastsam._native import Execution

TABLE_COLUMNS: tuple[str, ...] = _native.TABLE_COLUMNS
"""Columns of a table of tensors, in the order of ``csrc/include/fastsam/table.h``."""

HYPER_COLUMNS: tuple[str, ...] = _native.HYPER_COLUMNS
"""Columns of a row of hyper-parameters, in the order of ``csrc/include/fastsam/sam.h``."""

ADAPTIVE: int = _native.ADAPTIVE
STOCHASTIC: int = _native.STOCHASTIC
"""Values of the column ``flags``: ``enum Flag`` of ``csrc/include/fastsam/table.h``."""

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""Storage types of the kernels, by the codes of ``csrc/include/fastsam/types.h``."""


def module() -> ModuleType:
    """Return the native module."""
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
