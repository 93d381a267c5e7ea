"""Reproduction of the tables and figures in :mod:`fastsam.longtail.published`."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsam.distributed import World, launched_world_size
from fastsam.files import remove_orphans
from fastsam.longtail.build import load_configured
from fastsam.longtail.checkpoint import Checkpoint
from fastsam.longtail.config import TrainConfig, differences, is_own, place_settings
from fastsam.longtail.data import LongTailData
from fastsam.longtail.errors import CheckpointError, DamagedError, DataError, UsageError, unknown
from fastsam.longtail.landscape import ClassSpectrum, check_options, landscape
from fastsam.longtail.published import (
    ACCURACIES,
    EXTREMES,
    FIGURES,
    MEASURES,
    TABLES,
    Measured,
    SpectraFigure,
    Variant,
)
from fastsam.longtail.recipes import Recipe, recipe
from fastsam.longtail.results import Result
from fastsam.longtail.runtime import chosen_device
from fastsam.longtail.training import RunFolder, Trainer
from fastsam.text import notice

AS_PUBLISHED = ("seed", "threads")
"""Settings that may be overridden without making a run incomparable with the published numbers, in
addition to those that only determine where the run is executed."""


@dataclass(frozen=True)
class Row:
    """One row of a reproduced table: test accuracies in percent.

    Attributes:
        variant: method, optimizer and settings that differ from the recipe.
        measured: mean and standard deviation over the seeds (None for one seed), for all classes and for
            head, mid and tail classes.
        published: the paper's numbers for the same settings, as far as they are known.
    """

    variant: Variant
    measured: dict[str, Measured]
    published: Mapping[str, Measured]


@dataclass(frozen=True)
class Panel:
    """One spectrum of a reproduced figure.

    Attributes:
        variant: run of the spectrum.
        item: spectrum with its description.
        published: smallest and largest eigenvalue printed in the paper for the same settings, if known.
    """

    variant: Variant
    item: ClassSpectrum
    published: tuple[float, float] | None


def reproduce_table(
    name: str,
    data: str,
    out: str | Path,
    *,
    seeds: int = 3,
    world: World = World(),  # noqa: B008 (frozen)
    progress: bool = True,
    **overrides: Any,
) -> Iterator[Row]:
    """Train every row of a table with several seeds, and yield each row when it is done.

    Rows are evaluated after the last epoch. Runs are stored in ``out/VARIANT/seed-K`` and shared by tables
    and figures. Finished runs are loaded and interrupted runs are resumed, also with another device, data
    folder or number of threads (a resumed run keeps its number of threads). The seeds are those of the
    training; the subset depends on ``subset_seed``, as in the paper.

    Args:
        name: one of :data:`fastsam.longtail.published.TABLES`.
        data: any data set.
        out: folder of the runs.
        seeds: number of seeds; they are 0, 1, ...
        world: the ranks that train each run together.
        progress: show progress: bars on a terminal, one line per minute elsewhere.
        **overrides: settings that override every recipe.

    Raises:
        UsageError: if a name or setting is not valid, before anything is trained.
    """
    if name not in TABLES:
        raise unknown("table", name, TABLES)
    if not 1 <= seeds <= 1000:
        raise UsageError(f"seeds must be at least 1 and at most 1000, got {seeds}")
    runs = _Runs(data, out, TABLES[name].rows, overrides, world=world, progress=progress)
    for variant in TABLES[name].rows:
        results = [runs.finished(variant, seed)[0] for seed in range(seeds)]
        known = ACCURACIES.get((data, variant.name), {}) if runs.comparable else {}
        yield Row(variant, summarize(results), known)


def reproduce_figure(
    name: str,
    data: str,
    out: str | Path,
    *,
    augment: str = "none",
    steps: int = 80,
    probes: int = 1,
    progress: bool = True,
    **overrides: Any,
) -> Iterator[Panel]:
    """Train the runs of a figure of spectra, and yield its spectra one by one.

    The runs are those of :func:`reproduce_table` with seed 0. Spectra that exist already are loaded.

    Args:
        name: one of :data:`fastsam.longtail.published.FIGURES`.
        data: data set; it must have the classes of the figure.
        out: folder of the runs.
        augment: see :func:`fastsam.longtail.landscape.landscape`. The published numbers used ``redrawn``,
            which does not measure curvature.
        steps: Lanczos steps.
        probes: number of random start vectors.
        progress: show progress: bars on a terminal, one line per minute elsewhere.
        **overrides: settings that override every recipe.

    Raises:
        UsageError: if a name or setting is not valid, or ``torchrun`` started several processes; before
            anything is trained.
    """
    if name not in FIGURES:
        raise unknown("figure", name, FIGURES)
    if launched_world_size() > 1:
        raise UsageError(
            f"{name} requires a single process, but torchrun started {launched_world_size()}; run it "
            "without torchrun"
        )
    figure = FIGURES[name]
    check_options(loss=figure.loss, augment=augment, steps=steps, probes=probes)
    runs = _Runs(data, out, figure.runs, overrides, world=World(), progress=progress)
    for variant in figure.runs:
        epochs = _epochs(figure, runs.config(variant)) or (None,)
        _, folder = runs.finished(variant, 0, checkpoints=epochs)
        for epoch in epochs:
            for item in _spectra(
                folder,
                epoch,
                runs.data(variant),
                figure,
                device=runs.config(variant).device,
                augment=augment,
                steps=steps,
                probes=probes,
                progress=progress,
            ):
                label = item.subject.label
                known = EXTREMES.get((name, variant.name, "all" if label is None else label))
                comparable = runs.comparable and data == "cifar10-lt" and augment == "redrawn"
                yield Panel(variant, item, known if comparable else None)


def summarize(results: Sequence[Result]) -> dict[str, Measured]:
    """Compute mean and standard deviation over runs that differ only in the seed.

    The standard deviation is None for a single run.
    """
    numbers = [
        (r.test.accuracy, *(r.test.groups.get(name, float("nan")) for name in MEASURES[1:]))
        for r in results
    ]
    return {
        name: (statistics.mean(column), statistics.stdev(column) if len(column) > 1 else None)
        for name, column in zip(MEASURES, zip(*numbers, strict=True), strict=True)
    }


class _Runs:
    """The runs of several variants on one data set; each is trained at most once.

    Raises:
        UsageError: if an override does not exist, or is a setting that a variant sets itself or does not
            have.
    """

    def __init__(
        self,
        data: str,
        out: str | Path,
        variants: Sequence[Variant],
        overrides: Mapping[str, Any],
        *,
        world: World,
        progress: bool,
    ) -> None:
        self.out = Path(out)
        self.world = world
        self.progress = progress
        self.comparable = set(overrides) <= {*AS_PUBLISHED, *place_settings()}
        self._recipes: dict[str, Recipe] = {}
        for variant in variants:
            twice = sorted(set(variant.settings) & set(overrides))
            if twice:
                raise UsageError(
                    f"cannot override {twice[0]}, which this table or figure varies; omit it"
                )
            chosen = recipe(
                data, variant.method, variant.optimizer, **variant.settings, **overrides
            )
            chosen.config()
            self._recipes[variant.name] = chosen
        self._loaded: tuple[Any, LongTailData] | None = None

    def config(self, variant: Variant) -> TrainConfig:
        """Return the configuration of a variant with seed 0."""
        return self._recipes[variant.name].config()

    def data(self, variant: Variant) -> LongTailData:
        """Return the data of a variant. The last data set is cached, because most variants share it."""
        config = self.config(variant)
        key = (config.imbalance, config.kind)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = (key, load_configured(config, progress=self.progress))
        return self._loaded[1]

    def finished(
        self, variant: Variant, seed: int, *, checkpoints: Collection[int | None] = ()
    ) -> tuple[Result, RunFolder]:
        """Load or train the run of a variant. Damaged files are created again.

        Runs with seed 0 keep the checkpoints of all epochs that any figure needs.

        Args:
            variant: the variant.
            seed: seed of the training.
            checkpoints: epochs whose checkpoints are needed; None stands for the last epoch.
        """
        one = self._recipes[variant.name].override(seed=seed)
        folder = RunFolder(self.out / variant.name / f"seed-{seed}")
        needed = [
            folder.checkpoint if epoch is None else folder.kept(epoch) for epoch in checkpoints
        ]
        self._set_aside_damaged(needed)
        result = _sound_result(folder)
        if result is not None:
            config = one.config()
            moved = is_own(config.data) and result.config.get("data_root") != config.data_root
            same = (
                moved and bool(result.contents) and result.contents == self.data(variant).contents()
            )
            changed = set(differences(result.config, config.as_dict(), same_content=same))
            changed -= {"threads"}
            if changed:
                raise CheckpointError(
                    f"{folder.path} contains a run with other settings ({', '.join(sorted(changed))}); "
                    "choose another --out"
                )
            if all(path.is_file() for path in needed):
                return result, folder
        self._set_aside_damaged(folder.checkpoints())
        figures = [f for f in FIGURES.values() if seed == 0 and variant in f.runs]
        trainer = Trainer(
            one.config(),
            data=self.data(variant),
            sources=one.sources,
            out=folder.path,
            resume="auto",
            keep={epoch for figure in figures for epoch in _epochs(figure, one.config())},
            world=self.world,
            progress=self.progress,
        )
        return trainer.fit(), folder

    def _set_aside_damaged(self, paths: Iterable[Path]) -> None:
        """Rename damaged checkpoints on rank 0, so that they are created again. All ranks wait for it."""
        for path in paths if self.world.rank == 0 else ():
            try:
                if path.is_file():
                    Checkpoint.load(path)
            except DamagedError as error:
                aside = path.with_name(f"{path.name}.damaged")
                path.replace(aside)
                notice(f"{error}; renamed to {aside.name}, creating it again")
        self.world.barrier()


def _sound_result(folder: RunFolder) -> Result | None:
    """Load the result of a run; return None if there is none or it is damaged."""
    if not folder.result.is_file():
        return None
    try:
        return Result.load(folder.result)
    except DataError as error:
        notice(f"{error}; creating it again")
        return None


def _epochs(figure: SpectraFigure, config: TrainConfig) -> tuple[int, ...]:
    """Return the epochs of a figure; empty for the last epoch only."""
    return tuple(sorted({max(1, round(share * config.epochs)) for share in figure.epochs}))


def _spectra(
    folder: RunFolder,
    epoch: int | None,
    data: LongTailData,
    figure: SpectraFigure,
    *,
    device: str,
    augment: str,
    steps: int,
    probes: int,
    progress: bool,
) -> Iterator[ClassSpectrum]:
    """Yield the spectra of one checkpoint; those without a file are computed and saved."""
    checkpoint = Checkpoint.load(folder.checkpoint if epoch is None else folder.kept(epoch))
    model = checkpoint.build_model().to(chosen_device(device))
    place = folder.path / "spectra" / f"epoch-{checkpoint.epoch}-steps-{steps}-probes-{probes}"
    remove_orphans(place)
    for label in figure.classes:
        known = ClassSpectrum.path(place, label, "train", figure.loss, augment)
        if known.is_file():
            try:
                yield ClassSpectrum.load(known)
                continue
            except DataError as error:
                notice(f"{error}; creating it again")
        (item,) = landscape(
            model,
            data,
            checkpoint,
            [label],
            loss=figure.loss,
            augment=augment,
            steps=steps,
            probes=probes,
            progress=progress,
        )
        item.save(place)
        yield item
