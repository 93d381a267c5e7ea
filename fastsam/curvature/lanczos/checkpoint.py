"""Checkpoints of a Lanczos run, from which it can be resumed after a kill at any moment."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from fastsam.files import (
    OWN_FILES,
    from_json,
    remove_orphans,
    to_json,
    write_atomically,
    write_text,
)
from fastsam.kernels.lanczos import Recurrence

_STATE = "state.json"
_EARLIER_STATE = "state.npz"
"""State file of the earlier formats 1 and 2, in which damage could go unnoticed."""
_FORMAT = 4
"""Format of the state; runs in other formats are refused. Format 3 has a checksum of everything, format 4 the
asymmetry."""

STATE_ARRAYS = ("alpha", "beta", "bound", "active", "steps_taken")
"""The arrays of a :class:`Recurrence` that are its state."""


@dataclass(frozen=True)
class Progress:
    """Progress of a run.

    Attributes:
        done: number of completed steps.
        ended: whether the run is complete: all steps were made, the tolerance was reached, or every
            Krylov space is exhausted.
        asymmetry: largest asymmetry of the products for each probe; see :class:`Symmetry`.
    """

    done: int = 0
    ended: bool = False
    asymmetry: tuple[float, ...] = ()


@dataclass
class LanczosCheckpoint:
    """A folder with the checkpoint of one run: a file per basis row, written once, and the state.

    The state is JSON with its checksum and the SHA-256 of every row, so damaged files are detected.

    Args:
        folder: folder of the run, created if it does not exist.
        identity: everything that determines the bits of the run, as JSON values. A run is resumed
            only with an equal identity.
        interval: seconds between two writes; 0 writes after every step.
        writes: set to False on ranks that must not write.
    """

    folder: Path
    identity: Mapping[str, Any]
    interval: float = 60.0
    writes: bool = True

    def __post_init__(self) -> None:
        self.identity = {"checkpoint format": _FORMAT, **self.identity}
        self._hashes: dict[int, str] = {}
        self._last = time.monotonic()

    @staticmethod
    def identity_of(folder: Path) -> dict[str, Any] | None:
        """Return the identity of the run in a folder, or None without a run.

        Raises:
            ValueError: the folder contains something else, or a damaged state.
        """
        state = _read_state(folder)
        return None if state is None else dict(state["identity"])

    @staticmethod
    def fingerprint(folder: Path) -> str | None:
        """Return a hash of the state of the run in a folder, or None without a run."""
        path = folder / _STATE
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None

    @staticmethod
    def remove(folder: Path) -> None:
        """Remove a folder with a run; do nothing if it does not exist.

        The state goes first: after a kill in between, the folder contains no run.
        """
        (folder / _STATE).unlink(missing_ok=True)
        if folder.exists():
            shutil.rmtree(folder)

    def restore(self, basis: Tensor, recurrence: Recurrence, *, all_rows: bool) -> Progress:
        """Fill ``basis`` and ``recurrence`` from the checkpoint, and return the progress of the run.

        Args:
            basis: basis to fill: all rows, or the last two.
            recurrence: recurrence to fill.
            all_rows: whether the basis keeps all rows.

        Raises:
            ValueError: the folder contains a run with another identity, or a damaged one.
        """
        state = _read_state(self.folder)
        if state is None:
            return Progress()
        found, wanted = state["identity"], json.loads(json.dumps(self.identity))
        if found != wanted:
            changed = sorted(
                k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k)
            )
            raise ValueError(
                f"{self.folder} contains a run with other settings ({', '.join(changed)}); "
                "repeat the call with the settings of that run or choose another folder"
            )
        for name in STATE_ARRAYS:
            tensor: Tensor = getattr(recurrence, name)
            tensor.copy_(torch.tensor(state[name], dtype=tensor.dtype, device="cpu"))
        progress = Progress(state["done"], state["ended"], tuple(state["asymmetry"]))
        self._hashes = {int(number): digest for number, digest in state["rows"].items()}
        if progress.ended:
            return progress
        first = 0 if all_rows else max(0, progress.done - 1)
        for number in range(first, min(progress.done + 1, recurrence.steps)):
            self._read_row(number, basis[:, number - first])
        return progress

    def due(self) -> bool:
        """Return whether the interval since the last write has passed."""
        return time.monotonic() - self._last >= self.interval

    def write(self, rows: Mapping[int, Tensor], recurrence: Recurrence, progress: Progress) -> None:
        """Write the run.

        Args:
            rows: the basis rows that the next steps need, ``[probes, n]`` each, by their index. Earlier rows
                are removed; a run that has ended needs none.
            recurrence: T of the completed steps.
            progress: progress of the run.

        Raises:
            OSError: the folder cannot be written to.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._hashes:
            remove_orphans(self.folder)
        for number, row in rows.items():
            if number not in self._hashes:
                self._hashes[number] = _write_row(self._row(number), row)
        oldest = min(rows, default=recurrence.steps)
        self._hashes = {number: of for number, of in self._hashes.items() if number >= oldest}
        state = {
            "identity": self.identity,
            "done": progress.done,
            "ended": progress.ended,
            "asymmetry": progress.asymmetry,
            "rows": self._hashes,
            **{name: getattr(recurrence, name).tolist() for name in STATE_ARRAYS},
        }
        write_text(self.folder / _STATE, to_json(state))
        for path in self.folder.glob("row-*.bin"):
            if int(path.stem.removeprefix("row-")) < oldest:
                path.unlink()
        self._last = time.monotonic()

    def _row(self, number: int) -> Path:
        return self.folder / f"row-{number:06d}.bin"

    def _read_row(self, number: int, row: Tensor) -> None:
        """Fill ``row``, ``[probes, n]``, after its checksum was verified."""
        path = self._row(number)
        try:
            content = np.fromfile(path, dtype=np.uint8)
        except OSError as error:
            raise ValueError(_damaged(path, str(error.strerror or error))) from error
        if hashlib.sha256(content.data).hexdigest() != self._hashes.get(number):
            raise ValueError(_damaged(path, "its SHA-256 differs from the one in the state"))
        row.copy_(torch.from_numpy(content).view(row.dtype).view(row.shape))


def _damaged(path: Path, reason: str) -> str:
    return f"{path} is damaged ({reason}); remove {path.parent} to start the run from the beginning"


def _read_state(folder: Path) -> dict[str, Any] | None:
    """Return the state in a folder, or None without a run."""
    path = folder / _STATE
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        if (folder / _EARLIER_STATE).exists():
            raise _of_earlier_version(folder) from None
        names = [file.name for file in folder.iterdir()] if folder.exists() else []
        if names and not any(name.startswith(("row-", OWN_FILES)) for name in names):
            raise ValueError(
                f"{folder} is not empty and contains no Lanczos run; choose another folder"
            ) from None
        return None
    except NotADirectoryError as error:
        raise ValueError(
            f"checkpoint={str(folder)!r} is not a folder; choose another path"
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(_damaged(path, str(error))) from error
    try:
        state = from_json(text)
    except ValueError as error:
        raise ValueError(_damaged(path, str(error))) from error
    if "identity" in state and state["identity"].get("checkpoint format") != _FORMAT:
        raise _of_earlier_version(folder)
    if set(state) != {"identity", "done", "ended", "asymmetry", "rows", *STATE_ARRAYS}:
        raise ValueError(_damaged(path, "entries are missing or unknown"))
    return state


def _of_earlier_version(folder: Path) -> ValueError:
    return ValueError(
        f"{folder} contains a run in the checkpoint format of another version; remove the folder or choose "
        "another"
    )


def _write_row(path: Path, row: Tensor) -> str:
    """Write ``row``, ``[probes, n]``, to a file and return the SHA-256 of its bytes."""
    digest = hashlib.sha256()

    def write(file: IO[bytes]) -> None:
        for vector in row:
            content = memoryview(vector.cpu().numpy()).cast("B")
            digest.update(content)
            file.write(content)

    write_atomically(path, write)
    return digest.hexdigest()
