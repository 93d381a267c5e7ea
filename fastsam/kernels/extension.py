"""Loading of the native module, and its launches for a device."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch  # first, because it loads the OpenMP runtime that _native shares


def _explanation(package: Path, search_path: Sequence[str], error: ImportError) -> str:
    """Return a message with the reason why the native module cannot be loaded, and the fix."""
    checkout = package.parent
    built = not (error.path or "").endswith("__init__.py")
    if built or not (checkout / "pyproject.toml").is_file():
        return (
            f"fastsam's native module could not be loaded ({error}): reinstall it, with "
            "`pip install --force-reinstall --no-deps .` in a checkout of fastsam"
        )
    others = (Path(entry).resolve() / package.name for entry in search_path if entry)
    if any((other / "__init__.py").is_file() and other != package for other in others):
        return (
            f"{checkout} is a checkout whose native module is not built, and it hides the installed fastsam: "
            "start Python in another folder, or run `pip install --editable .` in the checkout"
        )
    return f"{checkout} is a checkout whose native module is not built: run `pip install --editable .` there"


try:
    from fastsam import _native
except ImportError as error:
    _package = Path(__file__).resolve().parents[1]
    raise ImportError(_explanation(_package, sys.path, error)) from error

if TYPE_CHECKING:
    from fastsam._native import Execution

TABLE_COLUMNS: tuple[str, ...] = _native.TABLE_COLUMNS
"""Columns of a table of tensors, in the order of ``csrc/include/fastsam/table.h``."""

HYPER_COLUMNS: tuple[str, ...] = _native.HYPER_COLUMNS
"""Columns of the block of hyperparameters, in the order of ``csrc/include/fastsam/sam.h``."""

ADAPTIVE: int = _native.ADAPTIVE
STOCHASTIC: int = _native.STOCHASTIC
"""Values of the column ``flags``: ``enum Flag`` of ``csrc/include/fastsam/table.h``."""

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""Codes of the kernels' storage types in ``csrc/include/fastsam/types.h``."""


def module() -> ModuleType:
    """Return the native module."""
    return _native


def backend(device: torch.device) -> Any:
    """Return the native launches for tensors on ``device``: the submodule ``cpu`` or ``cuda``.

    The device must have them; see :func:`fastsam.kernels.backends.backend_of`.
    """
    return getattr(module(), device.type)


def execution(device: torch.device) -> Execution:
    """Return the context of a launch: torch's current CUDA stream, or torch's number of CPU threads."""
    loaded = module()
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)
        return loaded.Execution(stream.device_index, stream.cuda_stream, 0)  # type: ignore[no-any-return]
    return loaded.Execution(-1, 0, torch.get_num_threads())  # type: ignore[no-any-return]
