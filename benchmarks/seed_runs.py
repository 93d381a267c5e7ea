"""Records of the runs of one seed, in one file. Some runs start from the weights of others."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from benchmarks.machine import environment
from fastsam.files import write_text


class SeedRun(Protocol):
    """A run of a seed.

    Attributes:
        name: name of its record.
        origin: name of the run whose weights it starts from; None for random initial weights.
    """

    @property
    def name(self) -> str: ...

    @property
    def origin(self) -> str | None: ...


R = TypeVar("R", bound=SeedRun)


@dataclass(frozen=True)
class SeedRuns:
    """The file with the records of a seed.

    Attributes:
        path: path of the file.
    """

    path: Path

    def records(self) -> dict[str, Any]:
        """Return the records by name of the run."""
        return json.loads(self.path.read_text())["runs"] if self.path.is_file() else {}

    def train(
        self,
        runs: Sequence[R],
        train: Callable[[R], dict[str, Any]],
        is_trained: Callable[[R], bool],
        *,
        networks: bool = False,
    ) -> None:
        """Train the runs that have no record, and write each record when its run is finished.

        Runs are compared in pairs, so all runs from the same origin must start from the same weights. If an
        origin was trained again with different weights, for instance on another processor, the records of
        old runs from it are removed.

        Args:
            runs: the runs. A run comes after its origin.
            train: trains a run and returns its record. The entry ``settings`` names the device of a run that
                is not trained on the CPU. The entry ``parent`` is a hash of the weights that the
                run starts from; None for random initial weights. If runs start from different states of
                the same seed, ``origin`` names the state.
            is_trained: whether the network of a run exists.
            networks: whether to train runs again that have a record but no network.
        """
        for run in _to_train(runs, self.records(), is_trained, networks):
            print(f"{self.path.parent.name} {self.path.stem}: {run.name}", flush=True)
            record = train(run)
            record["environment"] = environment(
                torch.device(record["settings"].get("device", "cpu"))
            )
            known = {
                name: entry
                for name, entry in self.records().items()
                if not _contradicts(entry, record)
            }
            known[run.name] = record
            write_text(self.path, json.dumps({"runs": known}, indent=1) + "\n")


def _to_train(
    runs: Sequence[R],
    known: Mapping[str, Any],
    is_trained: Callable[[R], bool],
    networks: bool,
) -> list[R]:
    """Return the runs without a record, and those whose network is missing but needed."""
    chosen: list[R] = []
    for run in reversed(runs):
        needed = networks or any(other.origin == run.name for other in chosen)
        if run.name not in known or (needed and not is_trained(run)):
            chosen.insert(0, run)
    return chosen


def _contradicts(entry: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Return whether two runs from the same origin started from different weights."""
    before, now = entry["parent"], new["parent"]
    same_origin = entry.get("origin") == new.get("origin")
    return same_origin and None not in (before, now) and before != now
