"""fastsam train."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import torch
from tyro.conf import arg

from fastsam.cli.options import (
    NAMES,
    every_setting,
    given,
    named_parts,
    refuse_settings_of_others,
    settings_of_run,
    with_settings,
)
from fastsam.cli.output import show
from fastsam.distributed import torchrun_world
from fastsam.longtail.checkpoint import Checkpoint
from fastsam.longtail.config import TrainConfig, find_setting
from fastsam.longtail.data import DATASETS
from fastsam.longtail.errors import CheckpointError, UsageError
from fastsam.longtail.losses import LOSSES
from fastsam.longtail.methods import RULES
from fastsam.longtail.optimizers import OPTIMIZERS
from fastsam.longtail.recipes import recipe
from fastsam.longtail.results import Result
from fastsam.longtail.tracking import TRACKERS, check_tracker, tracker
from fastsam.longtail.training import Branch, RunFolder, Trainer

FIRST_RUN = {"data": "digits-lt", "method": "ce-drw", "optimizer": "sam"}
"""What `fastsam train` trains if nothing is named."""


def _named(name: str) -> Any:
    """How one of them is shown in the help."""
    default = f"(default: {FIRST_RUN[name]})"
    help_text = find_setting(name)[0].metadata["help"]
    return arg(help=help_text, metavar="NAME", help_behavior_hint=default)


@dataclass(frozen=True)
class TrainCommand:
    """Train one network and judge it on the test set after the last epoch."""

    data: Annotated[str | None, _named("data")] = None
    method: Annotated[str | None, _named("method")] = None
    optimizer: Annotated[str | None, _named("optimizer")] = None
    out: Annotated[Path | None, arg(help="folder for checkpoint and results")] = None
    from_run: Annotated[
        Path | None,
        arg(name="from", help="run to continue under other settings, from its epoch --at"),
    ] = None
    at: Annotated[int | None, arg(help="last epoch shared with the run --from", metavar="INT")] = (
        None
    )
    resume: Annotated[bool, arg(help="resume the run in --out, with its settings")] = False
    overwrite: Annotated[bool, arg(help="replace the run in --out")] = False
    keep: Annotated[
        tuple[int, ...],
        arg(help="epochs whose checkpoint is kept as epoch-K.pt", metavar="INT ..."),
    ] = ()
    quiet: Annotated[bool, arg(help="no progress bar")] = False
    track: Annotated[str, arg(help=f"send epochs to: {', '.join(TRACKERS)}")] = "none"

    def run(self) -> None:
        """Train, print the accuracies, write the folder."""
        if self.out is None and (self.resume or self.overwrite or self.keep):
            raise UsageError("--resume, --overwrite and --keep need --out DIR")
        if (self.from_run is None) != (self.at is None):
            raise UsageError("--from RUN and --at EPOCH belong together")
        if self.from_run is not None and self.resume:
            raise UsageError(
                "choose one of --from and --resume; a branch resumes by --resume alone"
            )
        check_tracker(self.track, out=self.out)
        branch = None
        if self.from_run is not None and self.at is not None:
            branch = Branch.load(self.from_run, self.at)
        config, sources = self._settings(branch)
        with torchrun_world(config.device) as world:
            trainer = Trainer(
                config,
                sources=sources,
                out=self.out,
                resume=self.resume,
                overwrite=self.overwrite,
                branch=branch,
                keep=self.keep,
                world=world,
                progress=not self.quiet,
            )
            writes = world.rank == 0
            if writes and self.out is None:
                print("Results are not saved. Pass --out DIR to keep them.")
            if writes and config.device == "cpu" and torch.cuda.is_available():
                print("Training on CPU although a GPU is available; pass --device cuda.")
            if writes:
                for note in trainer.data.notes:
                    print(note)
                print(f"training set, SHA-256: {trainer.data.subset_hash}", flush=True)
                trainer.on_result = _show
            track = self.track if writes else "none"
            with tracker(track, config=trainer.config, out=self.out) as trainer.on_epoch:
                trainer.fit()
        if writes and self.out is not None:
            print(f"results: {self.out}")

    def _settings(self, branch: Branch | None) -> tuple[TrainConfig, dict[str, str]]:
        """Settings, and where each comes from."""
        named = {name: getattr(self, name) for name in NAMES if getattr(self, name) is not None}
        if self.resume and self.out is not None:
            stored = _stored(self.out)
            return stored.config.replace(**named, **given(self)), stored.sources
        if branch is not None:
            return branch.settings(**named, **given(self))
        chosen = recipe(**{**FIRST_RUN, **named}, **given(self))
        return chosen.config(), chosen.sources


def command(arguments: Sequence[str]) -> Any:
    """The command with options for the settings of the parts that ``arguments`` name.

    A plain ``--help`` shows the settings of all parts.

    Raises:
        UsageError: an unknown name, or an option that is a setting of other parts.
    """
    named = named_parts(arguments)
    if not arguments or (not named and {"--help", "-h"} & set(arguments)):
        settings, values = every_setting(plugins=bool(arguments)), {}
    else:
        values = _values(arguments, named)
        settings = settings_of_run(values)
        own = {item.name for item in fields(TrainCommand)}
        refuse_settings_of_others(arguments, own | settings.keys(), values)
    made = with_settings(TrainCommand, settings, recipe=values)
    made.__doc__ = (
        f"Train one network. Data: {', '.join(DATASETS.names())}. Methods are loss or loss-rule, with "
        f"loss one of {', '.join(LOSSES.names())} and rule one of {', '.join(RULES.names())}. "
        f"Optimizers: {', '.join(OPTIMIZERS.names())}. Settings that are not given come from the recipe; "
        "of a run that is resumed, from the run. Name data, method and optimizer before --help to see "
        "only the settings of these."
    )
    return made


def _values(arguments: Sequence[str], named: dict[str, str]) -> dict[str, Any]:
    """The settings of the run that ``arguments`` name, as far as its parts depend on them."""
    if "--resume" in arguments and "--out" in arguments[:-1]:
        stored = _stored(Path(arguments[arguments.index("--out") + 1]))
        return {**stored.config.flat(), **named}
    if "--from" in arguments[:-1] and "--at" in arguments[:-1]:
        run, epoch = (arguments[arguments.index(option) + 1] for option in ("--from", "--at"))
        if epoch.isdecimal():
            with suppress(CheckpointError):  # the command itself says what is missing
                return Branch.load(Path(run), int(epoch)).settings(**named)[0].flat()
    names = {name: named.get(name, default) for name, default in FIRST_RUN.items()}
    chosen = recipe(**names, **{k: v for k, v in named.items() if k not in names})
    return {**names, **{name: entry.value for name, entry in chosen.entries.items()}}


def _stored(out: Path) -> Checkpoint:
    found = RunFolder(out).checkpoints()
    return Checkpoint.load(found[0] if found else out)


def _show(result: Result) -> None:
    from fastsam.report import accuracy_table

    show(accuracy_table([result]))
    skipped = sum(record.skipped for record in result.history)
    if skipped:
        print(f"skipped {skipped} updates whose gradients were infinite or NaN")
    if result.unreadable:
        first = next(iter(result.unreadable))
        show(f"skipped {len(result.unreadable)} images that cannot be read, the first is {first}")
