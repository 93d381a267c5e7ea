"""Structure of batches: tensors in tuples, mappings, dataclasses and other objects."""

from __future__ import annotations

import copy
import hashlib
import pickle
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

_PLAIN = (str, bytes, bool, int, float, complex, np.generic, type(None))
_NO_DATA = (
    type,
    ModuleType,
    FunctionType,
    BuiltinFunctionType,
    MethodType,
    nn.Module,
    torch.dtype,
    torch.device,
    torch.Generator,
    np.ndarray,
    weakref.ref,
)
"""Types, besides plain values, whose attributes are not searched for tensors."""


def map_tensors(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """Return a copy of ``batch`` with ``function`` applied to every tensor in it.

    Tuples, lists, mappings, dataclasses and other objects keep their types.

    Raises:
        TypeError: an object with tensors cannot be copied.
    """
    if isinstance(batch, Tensor):
        return function(batch)
    if type(batch) is dict:
        return {key: map_tensors(function, value) for key, value in batch.items()}
    if isinstance(batch, MutableMapping):
        twin = copy.copy(batch)
        for key, value in batch.items():
            twin[key] = map_tensors(function, value)
        return twin
    if isinstance(batch, Mapping):
        return {key: map_tensors(function, value) for key, value in batch.items()}
    if isinstance(batch, PackedSequence):  # torch requires its sizes to be on the CPU
        sizes = function(batch.batch_sizes).cpu()
        return type(batch)(
            *(sizes if x is batch.batch_sizes else map_tensors(function, x) for x in batch)
        )
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(function, item) for item in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(map_tensors(function, item) for item in batch)
    held = tensors_of(batch)
    if not held:
        return batch
    replacements: dict[int, Any] = {id(tensor): function(tensor) for tensor in held}
    try:
        return copy.deepcopy(batch, replacements)
    except Exception as error:
        raise TypeError(
            f"a batch contains a {type(batch).__name__} with tensors that cannot be copied "
            f"({error}); pass its tensors in a tuple, a dict or a dataclass"
        ) from error


def tensors_of(batch: Any) -> list[Tensor]:
    """Return all tensors in a batch, in order, from containers and from attributes of objects."""
    return [leaf for leaf in _leaves(batch) if isinstance(leaf, Tensor)]


def common_length(batch: Any) -> int | None:
    """Return the first dimension that all tensors of a batch share; None if they share none."""
    lengths = {tensor.shape[0] if tensor.ndim else None for tensor in tensors_of(batch)}
    return lengths.pop() if len(lengths) == 1 else None


def sample_count(batch: Any) -> int:
    """Return the number of samples of a batch that can be split along its first dimension, else 1."""
    return common_length(batch) or 1


def is_empty(batch: Any) -> bool:
    """Return whether a batch has 0 samples."""
    return common_length(batch) == 0


def refuse_unreadable(batch: Any) -> None:
    """Raise TypeError for a batch without tensors, or with an object whose data is inaccessible.

    Raises:
        TypeError: the message names the type.
    """
    found = list(_leaves(batch))
    if not any(isinstance(leaf, Tensor) for leaf in found):
        raise TypeError(
            f"a batch is a {type(batch).__name__} in which no tensor was found; expected tensors in "
            "a tuple, a list, a mapping, a dataclass or the attributes of an object"
        )
    for leaf in found:
        if not isinstance(leaf, (Tensor, list, *_PLAIN, *_NO_DATA)) and (
            callable(getattr(leaf, "to", None)) or _pickled(leaf) is None
        ):
            raise TypeError(
                f"a batch contains a {type(leaf).__name__} in which no tensor was found, so its data "
                "can neither be compared between two reads nor moved to the run's dtype and device; "
                "replace it by tensors"
            )


def sample_digests(batch: Any) -> Iterator[bytes]:
    """Yield a digest per sample of a batch, or one of the whole batch if it has no common length.

    The digests include arrays, strings and numbers besides the tensors. Values without a length are
    part of every sample.
    """
    leaves = [part for leaf in _leaves(batch) for part in _parts(leaf)]
    lengths = {len(part) if part.ndim else None for part in leaves if isinstance(part, np.ndarray)}
    count = lengths.pop() if len(lengths) == 1 else None
    if not count:
        yield _digest(_bytes(leaf) for leaf in leaves)
        return
    rows: list[Any] = []
    common: list[bytes] = []
    for leaf in leaves:
        if isinstance(leaf, np.ndarray):
            rows.append([row.tobytes() for row in leaf])
        elif isinstance(leaf, list) and len(leaf) == count:
            rows.append([_bytes(value) for value in leaf])
        else:
            common.append(_bytes(leaf))
    for sample in zip(*rows, strict=True):
        yield _digest((*sample, *common))


def _digest(parts: Iterable[Any]) -> bytes:
    checksum = hashlib.blake2b(digest_size=16)
    for part in parts:
        checksum.update(part)
    return checksum.digest()


def _parts(leaf: Any) -> Iterator[Any]:
    """Yield the arrays of a tensor (several for a sparse one), or any other leaf unchanged."""
    if not isinstance(leaf, Tensor):
        whole_only = isinstance(leaf, np.ndarray) and leaf.dtype.hasobject
        yield _pickled(leaf) or b"" if whole_only else leaf
    elif leaf.layout is torch.sparse_coo:
        whole = leaf.detach().coalesce()
        yield repr(tuple(whole.shape))
        yield from (
            part for tensor in (whole.indices().T, whole.values()) for part in _parts(tensor)
        )
    elif leaf.layout is not torch.strided:
        yield from _parts(leaf.detach().to_sparse(layout=torch.sparse_coo))
    else:
        tensor = leaf.detach().cpu().contiguous()
        raw = tensor.reshape(-1).view(torch.uint8).numpy()  # NumPy has no bfloat16
        yield (
            raw.reshape(len(tensor), raw.size // max(1, len(tensor)))
            if tensor.ndim
            else raw.tobytes()
        )


def _bytes(leaf: Any) -> bytes:
    if isinstance(leaf, np.ndarray):
        return bytes(leaf.dtype.str.encode() + leaf.tobytes())
    if isinstance(leaf, _PLAIN):
        return repr(leaf).encode()
    if isinstance(leaf, list):
        return repr(leaf).encode()
    return _pickled(leaf) or b""


def _pickled(value: Any) -> bytes | None:
    try:
        return pickle.dumps(value)
    except Exception:  # user classes may raise any error
        return None


def _leaves(batch: Any) -> Iterator[Any]:
    """Yield the leaves of a batch: tensors, arrays, lists of plain values, values, opaque objects."""
    seen: set[int] = set()

    def walk(value: Any) -> Iterator[Any]:
        if isinstance(value, (Tensor, *_PLAIN, *_NO_DATA)):
            yield value
            return
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, Mapping):
            children = list(value.values())
        elif isinstance(value, (tuple, list)):
            children = list(value)
            if children and all(isinstance(child, _PLAIN) for child in children):
                yield children
                return
        else:
            children = _attributes(value)
            # An object without tensors is one opaque value.
            if not any(_holds_tensor(child, seen) for child in children):
                yield value
                return
        for child in children:
            yield from walk(child)

    yield from walk(batch)


def _holds_tensor(value: Any, above: set[int]) -> bool:
    seen = set(above)
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, Tensor):
            return True
        if isinstance(found, (*_PLAIN, *_NO_DATA)) or id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, Mapping):
            waiting += found.values()
        elif isinstance(found, (tuple, list)):
            waiting += found
        else:
            waiting += _attributes(found)
    return False


def _attributes(value: Any) -> list[Any]:
    """Return the values of an object's attributes, in ``__dict__`` and in slots."""
    found = list(getattr(value, "__dict__", {}).values())
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                found.append(getattr(value, name))
    return found
