"""The option ``--config FILE``: settings and options of ``fastsam train`` in a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from fastsam.cli.options import NAMES, option_value
from fastsam.cli.resume import resume_in
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.errors import UsageError
from fastsam.longtail.recipes import GIVEN, recipe
from fastsam.longtail.run_file import RunFile, read_run_file
from fastsam.longtail.stage_plan import stages_from
from fastsam.longtail.stages import register_stages
from fastsam.longtail.tracking import TRACKERS


@dataclass(frozen=True)
class Tracking:
    """Report metrics and settings to an experiment tracker."""

    track: Annotated[
        str,
        arg(help="experiment tracker for metrics and settings", metavar="|".join(TRACKERS)),
    ] = "none"
    project: Annotated[str, arg(help="project (wandb) or experiment (mlflow)", metavar="TEXT")] = (
        "fastsam"
    )
    name: Annotated[
        str | None,
        arg(
            help="name of the run in the tracker",
            metavar="TEXT",
            help_behavior_hint="(default: name of the --out folder)",
        ),
    ] = None
    tags: Annotated[
        tuple[str, ...],
        arg(
            help="tags of the run in the tracker, TEXT or KEY=VALUE",
            metavar="TEXT ...",
            help_behavior_hint="(default: none)",
        ),
    ] = ()


@dataclass(frozen=True)
class FileOptions(Tracking):
    """Options that a --config file may contain besides settings."""

    from_run: str | None = None
    at: int | None = None
    from_stage: str | None = None
    keep: tuple[int, ...] = ()


def config_file(arguments: Sequence[str]) -> RunFile | None:
    """Read the ``--config`` file; return None if there is none, which the command reports."""
    value = option_value(arguments, "--config")
    if not value:
        return None
    if resume_in(arguments) is True:
        raise UsageError(
            "--config cannot be combined with a bare --resume, which uses the settings of the run; pass "
            "--resume auto, or only --resume"
        )
    names = {"from", *(item.name for item in fields(FileOptions))} - {"from_run"}
    path = Path(value)
    return _with_stages(read_run_file(path, options=names)) if path.is_file() else None


def _with_stages(file: RunFile) -> RunFile:
    """Register the list of stages in a file, if it has one, and select it."""
    if file.stages is None:
        return file
    part = register_stages(stages_from(str(file.path), file.stages))
    return replace(file, settings={**file.settings, "stages": part.name})


def file_sources(config: TrainConfig, file: RunFile) -> dict[str, str]:
    """Return the sources of a file's settings: the recipe's source if the values agree, else the file."""
    labels = {"recipe": config.recipe, "stages": config.stages}
    own = recipe(config.data, config.method, config.optimizer, **labels)
    if own.entries["epochs"].value != config.epochs:
        own = own.override(epochs=config.epochs)
    sources = {}
    for name, value in file.settings.items():
        if name in NAMES or getattr(config, name) != value:
            continue  # an option overrides it
        entry = own.entries.get(name)
        same = entry is not None and entry.value == value and entry.source != GIVEN
        sources[name] = own.sources[name] if same else str(file.path)
    return sources
