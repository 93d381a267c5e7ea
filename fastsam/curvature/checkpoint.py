"""A Lanczos run on disk, written so that it can be continued after a kill at any moment."""

from __future__ import annotations

import hashlib
import json
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsam.files import OWN_FILES, remove_orphans, write_atomically
from fastsam.kernels.lanczos import Recurrence

_STATE = "state.npz"
_FORMAT = 2
"""Of the state; a run in another format is refused. 2 says where the run stands and whether it ended."""

STATE_ARRAYS = ("alpha", "beta", "bound", "active", "steps_taken")
"""The arrays of a :class:`Recurrence` that make up its state."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        done: steps of T.
        ended: nothing is left to do: all steps are taken, the tolerance is met, or every Krylov
            space is exhausted.
        full_passes: how many of the steps were orthogonalised against all earlier vectors.
        estimate: the orthogonality estimate of selective re-orthogonalisation, or None.
    """

    done: int = 0
    ended: bool = False
    full_passes: int = 0
    estimate: Tensor | None = None


@dataclass
class Checkpoint:
    """A folder that holds one run: a file per basis row, written once, and the state.

    Args:
        folder: created where it does not exist.
        identity: everything that decides the bits of the run (JSON values); a run is continued only
            with an equal identity.
        interval: seconds between two writes; 0 writes after every step.
        writes: False where another process has the same run and writes it.
    """

    folder: Path
    identity: Mapping[str, Any]
    interval: float = 60.0
    writes: bool = True

    def __post_init__(self) -> None:
        self.identity = {"checkpoint format": _FORMAT, **self.identity}
        self._written = -1
        self._last = time.monotonic()

    @staticmethod
    def identity_of(folder: Path) -> dict[str, Any] | None:
        """Identity of the run in a folder, None where there is none.

        Raises:
            ValueError: the folder holds something else, or a damaged state.
        """
        path = folder / _STATE
        if not path.exists():
            names = [file.name for file in folder.iterdir()] if folder.exists() else []
            if names and not any(name.startswith(("row-", OWN_FILES)) for name in names):
                raise ValueError(f"{folder} is not empty and holds no Lanczos run; choose another")
            return None
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                identity = json.loads(str(archive["identity"]))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{path} is damaged: {error}; remove the folder to start anew"
            ) from error
        return dict(identity)

    @staticmethod
    def fingerprint(folder: Path) -> str | None:
        """Hash of where the run in a folder stands, None where there is none."""
        path = folder / _STATE
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None

    def restore(self, basis: Tensor, recurrence: Recurrence, *, all_rows: bool) -> Progress:
        """Fill ``basis`` and ``recurrence``, and say where the run stands.

        Raises:
            ValueError: the folder holds a run with another identity.
        """
        found = self.identity_of(self.folder)
        if found is None:
            return Progress()
        wanted = json.loads(json.dumps(self.identity))
        if found != wanted:
            changed = sorted(
                k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k)
            )
            raise ValueError(
                f"{self.folder} holds a run with other settings ({', '.join(changed)}); "
                "repeat the call with the same ones or choose another folder"
            )
        with np.load(self.folder / _STATE, allow_pickle=False) as archive:
            for name in STATE_ARRAYS:
                tensor: Tensor = getattr(recurrence, name)
                tensor.copy_(torch.from_numpy(archive[name]))
            done = int(archive["done"])
            progress = Progress(
                done=done,
                ended=bool(archive["ended"]),
                full_passes=int(archive["full_passes"]),
                estimate=torch.from_numpy(archive["estimate"]) if "estimate" in archive else None,
            )
        steps = recurrence.alpha.shape[1]
        if progress.ended and not all_rows:
            return progress
        first = 0 if all_rows else max(0, done - 1)
        for row in range(first, min(done + 1, steps)):
            loaded = np.load(self._row(row), allow_pickle=False)
            basis[:, row - first].copy_(torch.from_numpy(loaded))
        self._written = min(done, steps - 1)
        return progress

    def due(self) -> bool:
        """Whether the interval has passed."""
        return time.monotonic() - self._last >= self.interval

    def write(self, rows: Mapping[int, Tensor], recurrence: Recurrence, progress: Progress) -> None:
        """Write the run.

        Args:
            rows: the basis rows that the next steps need, by their number, ``[probes, n]`` each.
            recurrence: T so far.
            progress: where the run stands.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._written < 0:
            remove_orphans(self.folder)
        for number, row in rows.items():
            if number > self._written:
                _replace(self._row(number), {"": row.cpu().numpy()})
        self._written = max(rows, default=self._written)
        state = {name: getattr(recurrence, name).cpu().numpy() for name in STATE_ARRAYS}
        for name in ("done", "ended", "full_passes"):
            state[name] = np.array(getattr(progress, name))
        if progress.estimate is not None:
            state["estimate"] = progress.estimate.cpu().numpy()
        state["identity"] = np.array(json.dumps(self.identity))
        _replace(self.folder / _STATE, state)
        for path in self.folder.glob("row-*.npy"):
            if int(path.stem.removeprefix("row-")) < min(rows, default=0):
                path.unlink()
        self._last = time.monotonic()

    def _row(self, number: int) -> Path:
        return self.folder / f"row-{number:06d}.npy"


def _replace(path: Path, arrays: Mapping[str, Any]) -> None:
    if list(arrays) == [""]:
        write_atomically(path, lambda file: np.save(file, arrays[""], allow_pickle=False))
    else:
        write_atomically(path, lambda file: np.savez(file, allow_pickle=False, **arrays))
