"""A planned run as a task for an executor: it is picklable, JSON, and a command line."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Any

from fastsam.files import FolderBusyError
from fastsam.longtail.data.worker_count import default_workers
from fastsam.longtail.errors import ChangedRunError
from fastsam.longtail.settings import DEFAULT
from fastsam.longtail.sweeps.plan import PlannedRun
from fastsam.longtail.sweeps.training import complete
from fastsam.rank_errors import ERROR_FILE, read_error, write_error
from fastsam.stopping import EXIT_STOPPED, Stopped, StopRequest


class TaskExit(IntEnum):
    """Exit codes of a task. Any other code, or the number of a signal, means that its process was lost."""

    FINISHED = 0
    BUSY = 3
    """Another process trains the run, or has trained it while this one was set up."""
    FAILED = 4  # not 1, with which Python ends if it cannot even import the package
    STOPPED = EXIT_STOPPED
    """A signal stopped the run."""


@dataclass(frozen=True)
class SweepTask:
    """A planned run in the folder of a sweep. It needs the same file system, and the same data sets.

    Attributes:
        out: folder of the sweep.
        name: name of the run.
        document: the run, as :meth:`PlannedRun.as_dict` returns it.
    """

    out: str
    name: str
    document: dict[str, Any]

    @classmethod
    def of(cls, run: PlannedRun, out: str | Path) -> SweepTask:
        """Create the task that trains a planned run."""
        return cls(str(Path(out).resolve()), run.name, run.as_dict())

    @property
    def command(self) -> list[str]:
        """Command line of a process that runs the task; it reads :meth:`to_json` from standard input.

        The process imports from the folders of this one, as processes of multiprocessing do. With ``-m``, it
        would import from the current folder first, which may be a checkout without the native module.
        """
        program = (
            f"import sys; sys.path[:] = {sys.path!r}; from runpy import run_module; "
            "run_module('fastsam.longtail.sweeps', run_name='__main__')"
        )
        return [sys.executable, "-c", program, str(self._folder)]

    def to_json(self) -> str:
        """Convert the task to JSON, for the standard input of :attr:`command`."""
        return json.dumps(vars(self))

    @classmethod
    def from_json(cls, text: str) -> SweepTask:
        """Create a task from the result of :meth:`to_json`."""
        return cls(**json.loads(text))

    def on_cores(self, cores: int) -> SweepTask:
        """Return the task for a process that may use this number of CPU cores.

        If the number of workers is the default, it becomes that for these cores. The default of the plan is
        that for all cores of a machine.
        """
        if self.document["sources"].get("workers") != DEFAULT:
            return self
        settings = {**self.document["settings"], "workers": default_workers(cores)}
        return replace(self, document={**self.document, "settings": settings})

    def run(self, stop: StopRequest | None = None) -> int:
        """Run the task in this process, which should have no other task. Return its :class:`TaskExit`.

        An error is written to the folder of the run, from where :meth:`error` reads it.

        Args:
            stop: request to stop by a signal; the run then saves.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._error_file.unlink(missing_ok=True)
        try:
            run = PlannedRun.from_dict(self.name, self.document)
            complete(run, Path(self.out), stop=stop, progress=False, quiet=True)
        except (FolderBusyError, ChangedRunError):
            return TaskExit.BUSY
        except Stopped:
            return TaskExit.STOPPED
        except Exception as error:
            write_error(error, 0, self._error_file)
            return TaskExit.FAILED
        return TaskExit.FINISHED

    def error(self) -> str:
        """Return the error that :meth:`run` wrote, in one line that begins with the name of its class.

        It is empty if there is none.
        """
        return read_error(self._error_file)

    @property
    def _folder(self) -> Path:
        return Path(self.out) / self.name

    @property
    def _error_file(self) -> Path:
        return self._folder / ERROR_FILE.format(0)
