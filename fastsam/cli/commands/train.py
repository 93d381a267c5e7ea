"""The command ``fastsam train``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, fields, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_type_hints

import torch
from tyro.conf import OmitArgPrefixes, arg

from fastsam.cli.config_file import FileOptions, Tracking, config_file, file_sources
from fastsam.cli.options import (
    NAMES,
    every_setting,
    given,
    named,
    named_parts,
    option_value,
    parts_in,
    refuse_settings_of_others,
    settings_of_run,
    with_settings,
)
from fastsam.cli.output import show
from fastsam.cli.profile import ProfileOption, profile_folder, show_profile
from fastsam.cli.resume import (
    ResumeOption,
    StoredRun,
    check_same_parts,
    resume_in,
    stored_run,
)
from fastsam.distributed import torchrun_world
from fastsam.longtail.config import TrainConfig, check_applies, chosen_parts
from fastsam.longtail.data import DATASETS
from fastsam.longtail.errors import CheckpointError, UsageError
from fastsam.longtail.losses import LOSSES
from fastsam.longtail.methods import RULES, Method
from fastsam.longtail.optimizers import OPTIMIZERS
from fastsam.longtail.recipes import recipe
from fastsam.longtail.results import Result
from fastsam.longtail.run_file import RunFile, read_run_file
from fastsam.longtail.tracking import Tracked, check_tracker, tracker
from fastsam.longtail.training import Branch, StageTrainer, stage_trainers
from fastsam.records import build
from fastsam.stopping import StopRequest, stop_signals
from fastsam.text import notice

FIRST_RUN = {"data": "digits-lt", "method": "ce-drw", "optimizer": "sam"}
"""Parts that `fastsam train` uses if the command line names none."""


def _named(name: str) -> Any:
    """Build the help entry of an option that has a default for the first run."""
    return named(name, f"(default: {FIRST_RUN[name]})")


@dataclass(frozen=True)
class TrainCommand:
    """Train one network and evaluate it on the test set after the last epoch."""

    data: Annotated[str | None, _named("data")] = None
    method: Annotated[str | None, _named("method")] = None
    optimizer: Annotated[str | None, _named("optimizer")] = None
    config: Annotated[
        Path | None,
        arg(
            help="YAML file of settings, such as the run.yaml of a run; command-line options override it",
            metavar="FILE",
            help_behavior_hint="",
        ),
    ] = None
    out: Annotated[
        Path | None,
        arg(
            help="output folder for checkpoint, results and run.yaml; without it nothing is saved",
            metavar="DIR",
            help_behavior_hint="",
        ),
    ] = None
    from_run: Annotated[
        Path | None,
        arg(
            name="from",
            help="folder of a run to branch from: training starts from its checkpoint of epoch --at, under "
            "other settings",
            metavar="RUN",
            help_behavior_hint="",
        ),
    ] = None
    at: Annotated[
        int | None,
        arg(
            help="epoch at which to branch from the --from run; both runs share the epochs up to it",
            metavar="INT",
            help_behavior_hint="",
        ),
    ] = None
    from_stage: Annotated[
        Path | None,
        arg(
            help="folder of a finished run with these settings that is the first of the --stages, so that it "
            "is not trained again",
            metavar="RUN",
            help_behavior_hint="",
        ),
    ] = None
    resume: ResumeOption = False
    overwrite: Annotated[bool, arg(help="replace the run in --out")] = False
    keep: Annotated[
        tuple[int, ...],
        arg(
            help="epochs K, of the first stage, whose checkpoint is also kept as epoch-K.pt",
            metavar="INT ...",
            help_behavior_hint="(default: none)",
        ),
    ] = ()
    profile: ProfileOption = None
    quiet: Annotated[bool, arg(help="hide the progress bar")] = False
    tracking: Annotated[Tracking, arg(name="tracking"), OmitArgPrefixes] = Tracking()  # noqa: RUF009 (frozen)

    file: ClassVar[RunFile | None] = None
    """Content of the ``config`` file."""

    def run(self) -> None:
        """Train, print the accuracies, and write the output folder."""
        if self.config is not None and self.file is None:
            read_run_file(self.config)  # raises: the file does not exist
        if self.out is None and (self.resume or self.overwrite or self.keep):
            raise UsageError("--resume, --overwrite and --keep require --out; pass --out DIR")
        if (self.from_run is None) != (self.at is None):
            raise UsageError("--from and --at require each other; pass --from RUN --at EPOCH")
        if self.from_run is not None and self.resume is True:
            raise UsageError(
                "--from cannot be combined with a bare --resume; pass --resume auto, or only --resume"
            )
        if self.from_run is not None and self.from_stage is not None:
            raise UsageError("--from and --from-stage exclude each other; pass one of them")
        check_tracker(self._tracked(self.out, ""))
        with stop_signals() as stop, ExitStack() as training:
            self._train(stop, training)

    def _train(self, stop: StopRequest, training: ExitStack) -> None:
        """Train; from the first step on, signals are deferred until ``training`` is closed."""
        stated = {} if self.file is None else self.file.settings
        stored = stored_run(self.resume, self.out, stages=stated.get("stages"))
        branch = None
        if self.from_run is not None and self.at is not None and stored is None:
            branch = Branch.load(self.from_run, self.at)
        config, sources = self._settings(stored, branch)
        with torchrun_world(
            config.device, timeout=config.rank_timeout, errors=self.out, stop=stop
        ) as world:
            stages = stage_trainers(
                config,
                sources=sources,
                out=self.out,
                resume=self.resume,
                overwrite=self.overwrite,
                branch=branch,
                from_stage=self.from_stage,
                keep=self.keep or (stored.keep if stored is not None else ()),
                world=world,
                profile=profile_folder(self.profile, self.out),
                stop=stop,
                progress=not self.quiet,
            )
            writes = world.rank == 0
            with closing(stages):
                for one in stages:
                    self._announce(one, writes=writes)
                    training.enter_context(stop.deferred())
                    self._fit(one, writes=writes)
        if writes and self.out is not None:
            print(f"results: {self.out}")

    def _announce(self, one: StageTrainer, *, writes: bool) -> None:
        """Print what is going to be trained."""
        trainer = one.trainer
        config = trainer.config
        if not writes:
            return
        if one.stage.name:
            print(f"stage {one.stage.name}:")
        length = "1 epoch" if config.epochs == 1 else f"{config.epochs} epochs"
        print(f"{config.data}, {config.method}, {config.optimizer}, {length}")
        if trainer.precision_reason is not None:
            show(f"precision auto: {config.precision}, because {trainer.precision_reason}")
        if trainer.steps_per_epoch == 1:
            notice(
                f"an epoch is one step ({len(trainer.data.train)} images, batch size "
                f"{config.batch_size}); lower --batch-size"
            )
        if self.out is None:
            print("Results are not saved. Pass --out DIR to keep them.")
        if config.device == "cpu" and torch.cuda.is_available():
            print("Training on CPU although a GPU is available; pass --device cuda.")
        for note in trainer.data.notes:
            print(note)
        print(f"training set, SHA-256: {trainer.data.subset_hash}", flush=True)

    def _fit(self, one: StageTrainer, *, writes: bool) -> None:
        """Train a stage, and print and report its results."""
        folder = None if one.folder is None else Path(one.folder)
        tracked = self._tracked(folder, "" if one.last else one.stage.name)
        with tracker(tracked if writes else Tracked(), one.trainer.config) as sink:
            one.trainer.on_epoch = sink.epoch
            unshown: list[OSError] = []

            def finished(result: Result) -> None:
                try:
                    if writes:
                        _show(result)
                except (
                    OSError
                ) as error:  # a closed pipe or a full disk; the result is written nevertheless
                    unshown.append(error)
                sink.result(result)

            one.trainer.on_result = finished
            one.fit()
        if unshown:
            raise unshown[0]
        if one.trainer.profile is not None:
            show_profile(one.trainer.profile)

    def _tracked(self, folder: Path | None, stage: str) -> Tracked:
        """Return what to report to the tracker: a run for each stage."""
        tracked = Tracked(out=folder, **asdict(self.tracking))
        if not stage or self.tracking.track == "none":
            return tracked
        run = self.tracking.name or ("" if self.out is None else self.out.resolve().name)
        return replace(tracked, name=f"{run}-{stage}".lstrip("-"))

    def _settings(
        self, stored: StoredRun | None, branch: Branch | None
    ) -> tuple[TrainConfig, dict[str, str]]:
        """Return the settings of the run, and the source of each by name."""
        named = {name: getattr(self, name) for name in NAMES if getattr(self, name) is not None}
        if stored is not None:
            return stored.changed_by({**named, **given(self)}), stored.sources
        if branch is not None:
            return branch.settings(**named, **given(self))
        chosen = recipe(**{**FIRST_RUN, **named}, **given(self))
        config = chosen.config()
        return config, {
            **chosen.sources,
            **({} if self.file is None else file_sources(config, self.file)),
        }


def command(arguments: Sequence[str]) -> Any:
    """Return the command with options for the settings of the parts named in ``arguments``.

    ``--help`` alone shows the settings of all parts.

    Raises:
        UsageError: if a name is unknown, or an option belongs to a part that the run does not use.
    """
    file = config_file(arguments)
    stated = {} if file is None else file.settings
    named = {**parts_in(stated), **named_parts(arguments)}
    if not arguments or (not named and {"--help", "-h"} & set(arguments)):
        settings, values = every_setting(plugins=bool(arguments)), {}
    else:
        try:
            values = _values(arguments, named, {} if file is None else file.options)
        except UsageError as error:
            if file is None:
                raise
            raise UsageError(f"{error} (with the settings of --config {file.path})") from error
        settings = settings_of_run(values)
        own = {*(item.name for item in (*fields(TrainCommand), *fields(Tracking))), *NAMES}
        refuse_settings_of_others(arguments, own | settings.keys(), values)
        for name in stated.keys() - own - settings.keys():
            try:
                check_applies(name, chosen_parts(values))
            except UsageError as error:
                raise UsageError(f"--config {file and file.path}: {error}") from error
    base = TrainCommand if file is None else _with_defaults(file)
    made = with_settings(base, settings, recipe=values, given=stated)
    balanced = [name for name, loss in LOSSES.examples().items() if loss.balances_classes]
    weighted = [rule for rule in RULES.names() if Method(balanced[0], rule).balances_twice]
    made.__doc__ = (
        "Train one network and evaluate it on the test set. "
        f"Data sets: {', '.join(DATASETS.names())}. Methods: LOSS or LOSS-RULE, where LOSS is one of "
        f"{', '.join(LOSSES.names())} and RULE is one of {', '.join(RULES.names())}. "
        f"The losses {', '.join(balanced)} balance classes themselves and refuse the rules "
        f"{', '.join(weighted)}. "
        f"Optimizers: {', '.join(OPTIMIZERS.names())}. The recipe of data set, method and optimizer "
        "overrides the defaults below; a resumed run keeps its settings. To see the recipe's values, and "
        "only the settings that apply, pass --data, --method and --optimizer before --help."
    )
    return made


def _with_defaults(file: RunFile) -> type[TrainCommand]:
    """Return the command with the values of a file as its defaults.

    Raises:
        UsageError: if a value has the wrong type.
    """
    stated = {"from_run" if key == "from" else key: value for key, value in file.options.items()}
    try:
        options = build(FileOptions, stated)
    except ValueError as error:
        raise UsageError(f"--config {file.path}: {error}") from error
    tracking = Tracking(**{item.name: getattr(options, item.name) for item in fields(Tracking)})
    defaults: dict[str, Any] = {
        **{name: file.settings[name] for name in NAMES if name in file.settings},
        "from_run": None if options.from_run is None else Path(options.from_run),
        "at": options.at,
        "from_stage": None if options.from_stage is None else Path(options.from_stage),
        "keep": options.keep,
        "tracking": tracking,
    }
    hints = get_type_hints(TrainCommand, include_extras=True)
    return make_dataclass(
        TrainCommand.__name__,
        [(name, hints[name], value) for name, value in defaults.items()],
        bases=(TrainCommand,),
        frozen=True,
        namespace={"file": file},
    )


def _values(
    arguments: Sequence[str], named: dict[str, str], stated: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the settings of the run in ``arguments`` that determine its parts.

    Args:
        arguments: the command line.
        named: the parts that it and the ``--config`` file name.
        stated: options in the ``--config`` file.
    """
    resume, folder = resume_in(arguments), option_value(arguments, "--out")
    if resume and folder:
        out = Path(folder)
        stored = stored_run(resume, out, stages=named.get("stages"))
        if stored is not None:
            check_same_parts(stored, named, out)
            return stored.config.flat()
    run = option_value(arguments, "--from") or stated.get("from")
    epoch = str(option_value(arguments, "--at") or stated.get("at"))
    if run and epoch.isdecimal():
        with suppress(CheckpointError):  # raised again, and reported, by the command's run()
            return Branch.load(str(run), int(epoch)).settings(**named)[0].flat()
    names = {name: named.get(name, default) for name, default in FIRST_RUN.items()}
    chosen = recipe(**names, **{k: v for k, v in named.items() if k not in names})
    return {**names, **{name: entry.value for name, entry in chosen.entries.items()}}


def _show(result: Result) -> None:
    from fastsam.report import Run, accuracy_table, by_settings

    show(accuracy_table(by_settings([Run(result)])))
    skipped = sum(record.skipped for record in result.history)
    if skipped:
        print(f"skipped {skipped} updates with infinite or NaN gradients")
    if result.unreadable:
        first = next(iter(result.unreadable))
        show(f"skipped {len(result.unreadable)} unreadable images; the first is {first}")
