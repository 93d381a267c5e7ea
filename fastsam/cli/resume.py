"""The option ``--resume [auto]``, and the stored run that it continues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg
from tyro.constructors import PrimitiveConstructorSpec

from fastsam.cli.options import option_value
from fastsam.longtail.checkpoint import Checkpoint
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.differences import changes
from fastsam.longtail.errors import CheckpointError, UsageError
from fastsam.longtail.stages import STAGES
from fastsam.longtail.training import RunFolder, StageRecord
from fastsam.longtail.training.resume import newest_outline

ResumeMode = bool | Literal["auto"]
_MODES: dict[tuple[str, ...], ResumeMode] = {
    (): True,
    ("True",): True,
    ("False",): False,
    ("auto",): "auto",
}


def _mode(values: Sequence[str]) -> ResumeMode:
    if tuple(values) not in _MODES:
        raise ValueError("expected auto or no value")
    return _MODES[tuple(values)]


ResumeOption = Annotated[
    ResumeMode,
    PrimitiveConstructorSpec(
        nargs=(0, 1),
        metavar="[auto]",
        choices=("auto", "True", "False"),
        instance_from_str=_mode,
        is_instance=lambda value: isinstance(value, bool) or value == "auto",
        str_from_instance=lambda value: [] if value is True else [str(value)],
    ),
    arg(
        help="resume the run in --out with its settings. auto resumes it if there is one, else starts it: "
        "then the same command may run any number of times",
        help_behavior_hint="(default: start a new run)",
    ),
]


def resume_in(arguments: Sequence[str]) -> ResumeMode:
    """Return the value of ``--resume`` in a command line that is not parsed yet."""
    value = option_value(arguments, "--resume")
    return False if value is None else _MODES.get((value,), True)


@dataclass(frozen=True)
class StoredRun:
    """A run that a command resumes.

    Attributes:
        config: its settings; those before its list of stages changes them.
        sources: source of each setting, by name.
        keep: epochs to come whose checkpoint the run keeps; empty for a run in stages, which reads its
            record itself.
    """

    config: TrainConfig
    sources: dict[str, str]
    keep: tuple[int, ...] = ()

    def changed_by(self, options: Mapping[str, Any]) -> TrainConfig:
        """Return the settings of the run with those of the command; the trainer compares them again.

        Raises:
            UsageError: if an option does not fit the settings, although it is that of the run.
            CheckpointError: if an option does not fit them, and differs from the run's.
        """
        try:
            return self.config.replace(**options)
        except UsageError as error:
            stored = self.config.as_dict()
            changed = changes(stored, {**stored, **options})
            if not changed:
                raise
            raise CheckpointError(
                f"cannot resume: {changed}. Use the same settings or choose another --out"
            ) from error


def stored_run(
    resume: ResumeMode, out: Path | None, *, stages: str | None = None
) -> StoredRun | None:
    """Load the run that a command resumes, without the values of its tensors.

    Args:
        resume: value of the option.
        out: folder of the run.
        stages: list of stages that the command names. If it is registered, it is compared with that of the
            run when training begins. Else the list of the run is registered.

    Returns:
        The run of the newest readable checkpoint, or of the record of its stages; None if the command starts
        a new run.

    Raises:
        CheckpointError: if there is none and ``resume`` is True, or all are damaged.
    """
    if not resume or out is None:
        return None
    record = StageRecord.read(out)
    if record is not None:
        if stages != record.config.stages or not STAGES[stages].stages:
            record.register()
        return StoredRun(record.config, record.sources)
    stored = newest_outline(RunFolder(out))
    if stored is not None and stored.config.stages != "none":
        if resume != "auto":
            raise CheckpointError(
                f"cannot resume {out}: it is a run in stages whose record stages.json is missing; pass the "
                "options of the run with --resume auto"
            )
        return None  # the checkpoint has the settings of the last stage, not those of the run
    if stored is None and resume != "auto":
        Checkpoint.load(out)  # raises: there is none
    if stored is None:
        return None
    # Earlier ones are written already. A user may have removed them to free disk space.
    keep = tuple(epoch for epoch in stored.keep if epoch > stored.epoch)
    return StoredRun(stored.config, stored.sources, keep)


def check_same_parts(stored: StoredRun, named: Mapping[str, str], out: Path) -> None:
    """Raise :class:`UsageError` if a command names other parts than the run that it resumes."""
    for name, value in named.items():
        before = getattr(stored.config, name)
        if value != before:
            raise UsageError(
                f"cannot resume the run in {out}: its {name} is {before}, but the command has {value}; use "
                "the same settings or choose another --out"
            )
