"""Files of spectra: JSON or NumPy archives, with checksums."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsam.files import from_json, to_json, write_atomically, write_text

_MARK = "fastsam_spectrum"
_HASHES = "array_sha256"
_ARRAYS = {"alpha": np.float64, "beta": np.float64, "order": np.int64}


def write_spectrum(path: Path, content: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
    """Write the fields of a spectrum, atomically; a symbolic link at ``path`` is replaced.

    Args:
        path: a ``.json`` or ``.npz`` file; its folder is created if it does not exist.
        content: values of the fields by name.
        summary: main results, for readers of the JSON.

    Raises:
        ValueError: ``path`` has another suffix.
        OSError: the file cannot be written; an existing file is unchanged.
    """
    arrays = {name: np.asarray(content[name], dtype=dtype) for name, dtype in _ARRAYS.items()}
    scalars = {name: value for name, value in content.items() if name not in arrays}
    if path.suffix == ".json":
        lists = {name: value.tolist() for name, value in arrays.items()}
        write_text(path, to_json({_MARK: 1, **scalars, **lists, "summary": summary}))
    elif path.suffix == ".npz":
        hashes = {name: _hash(value) for name, value in arrays.items()}
        mark = np.array(to_json({**scalars, _HASHES: hashes}))
        write_atomically(
            path, lambda file: np.savez(file, allow_pickle=False, **arrays, **{_MARK: mark})
        )
    else:
        raise ValueError(f"a spectrum is saved as .json or .npz, got {path.name!r}")


def read_spectrum(path: Path) -> dict[str, Any]:
    """Read a file written by :func:`write_spectrum`; files of earlier versions have no checksums.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a spectrum, or it is damaged.
    """
    try:
        content = _read_json(path) if path.suffix == ".json" else _read_archive(path)
        for name, dtype in _ARRAYS.items():
            content[name] = np.asarray(content[name], dtype=dtype)
        _check(content)
    except FileNotFoundError:
        raise
    except Exception as error:  # parsers raise all kinds of errors for damaged archives
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"{path} is not a spectrum written by fastsam, or it is damaged: {reason}"
        ) from error
    return content


def _read_json(path: Path) -> dict[str, Any]:
    content = from_json(path.read_text("utf-8"))
    if content.pop(_MARK, None) != 1:
        raise ValueError("it contains no spectrum")
    content.pop("summary", None)
    return content


def _read_archive(path: Path) -> dict[str, Any]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        content = from_json(str(archive[_MARK]))
        arrays = {name: archive[name] for name in _ARRAYS}
    hashes = content.pop(_HASHES, None)
    if hashes is not None and hashes != {name: _hash(value) for name, value in arrays.items()}:
        raise ValueError("the SHA-256 of its arrays differs from the stored one")
    return {**content, **arrays}


def _check(content: Mapping[str, Any]) -> None:
    alpha, beta, order = (content[name] for name in _ARRAYS)
    if alpha.ndim != 2 or alpha.shape != beta.shape or order.shape != alpha.shape[:1]:
        raise ValueError(f"its arrays have shapes {alpha.shape}, {beta.shape}, {order.shape}")
    if order.size < 1 or order.min() < 1 or order.max() > alpha.shape[1]:
        raise ValueError("its orders do not match its matrices")
    if not (np.isfinite(alpha).all() and np.isfinite(beta).all()):
        raise ValueError("its matrices contain NaN or infinity")
    if not (content["dimension"] >= 1 and content["eps"] > 0):
        raise ValueError("its dimension or machine epsilon is not positive")


def _hash(array: NDArray[Any]) -> str:
    content = np.ascontiguousarray(array)
    return hashlib.sha256(
        f"{content.dtype.str}{content.shape}".encode() + content.tobytes()
    ).hexdigest()
