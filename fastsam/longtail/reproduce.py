"""Reproduction of the tables and figures in :mod:`fastsam.longtail.published`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastsam.distributed import World, launched_world_size
from fastsam.longtail.build import load_configured
from fastsam.longtail.checkpoint import Checkpoint
from fastsam.longtail.config import TrainConfig, place_settings
from fastsam.longtail.data import LongTailData
from fastsam.longtail.errors import UsageError, unknown
from fastsam.longtail.landscape import ClassSpectrum, check_options, landscape
from fastsam.longtail.measured import Measured
from fastsam.longtail.published import (
    ACCURACIES,
    EXTREMES,
    FIGURES,
    MEASURES,
    TABLES,
    SpectraFigure,
    Variant,
    figure_of,
)
from fastsam.longtail.recipes import Recipe, recipe
from fastsam.longtail.results import Result
from fastsam.longtail.runtime import chosen_device
from fastsam.longtail.sweeps import (
    Execution,
    PlannedRun,
    RunOutcome,
    check_outcomes,
    check_unfinished,
    complete,
    run_plan,
    store_plan,
    stored_result,
)
from fastsam.longtail.training import RunFolder
from fastsam.stopping import StopRequest

AS_PUBLISHED = ("threads",)
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
    execution: Execution = Execution(),  # noqa: B008 (frozen)
    world: World = World(),  # noqa: B008 (frozen)
    stop: StopRequest | None = None,
    progress: bool = True,
    **overrides: Any,
) -> Iterator[Row]:
    """Train every row of a table with several seeds, and yield each row when it is done.

    Rows are evaluated after the last epoch. Runs are stored in ``out/VARIANT/seed-K`` and shared by tables
    and figures. Finished runs are loaded and interrupted runs are resumed, if they have the same settings.
    The seeds are those of the training; the subset depends on ``subset_seed``, as in the paper.

    Args:
        name: one of :data:`fastsam.longtail.published.TABLES`.
        data: any data set.
        out: folder of the runs.
        seeds: number of seeds; they are 0, 1, ...
        execution: number of runs at a time, and part of the plan. By default, runs are trained one after
            the other in this process. A part yields the rows for which other parts have done theirs.
        world: the ranks that train each run together.
        stop: request to stop by a signal, for runs and spectra that are computed in this process; see
            :func:`fastsam.stopping.stop_signals`.
        progress: show progress: bars on a terminal, one line per minute elsewhere.
        **overrides: settings that override every recipe, except ``seed``.

    Raises:
        UsageError, CheckpointError: if a name or setting is not valid, or ``out`` has runs with others.
        TrainingError: if runs failed in processes of their own, after all other runs.
    """
    if name not in TABLES:
        raise unknown("table", name, TABLES)
    if not 1 <= seeds <= 1000:
        raise UsageError(f"seeds must be at least 1 and at most 1000, got {seeds}")
    runs = _Runs(
        data,
        out,
        TABLES[name].rows,
        overrides,
        seeds=seeds,
        world=world,
        stop=stop,
        progress=progress,
    )
    for variant, results in runs.finished(execution):
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
    execution: Execution = Execution(),  # noqa: B008 (frozen)
    stop: StopRequest | None = None,
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
        execution: as in :func:`reproduce_table`. A part only trains and yields nothing.
        stop: as in :func:`reproduce_table`.
        progress: show progress: bars on a terminal, one line per minute elsewhere.
        **overrides: settings that override every recipe, except ``seed``.

    Raises:
        UsageError: if a name or setting is not valid, or ``torchrun`` started several processes; before
            anything is trained.
    """
    if launched_world_size() > 1:
        raise UsageError(
            f"{name} requires a single process, but torchrun started {launched_world_size()}; run it "
            "without torchrun"
        )
    figure = figure_of(name, stages=overrides.get("stages") or "none")
    check_options(loss=figure.loss, augment=augment, steps=steps, probes=probes)
    runs = _Runs(
        data,
        out,
        figure.runs,
        overrides,
        checkpoints=lambda config: _epochs(figure, config) or (None,),
        world=World(),
        stop=stop,
        progress=progress,
    )
    trained = runs.finished(execution)
    # A sweep starts no further process while its caller computes spectra, so it comes first.
    for variant, _ in trained if execution.in_process else list(trained):
        if execution.shard.count > 1:
            continue
        (run,) = runs.planned(variant)
        for epoch in _epochs(figure, run.config) or (None,):
            for item in _spectra(
                RunFolder(runs.out / run.name),
                epoch,
                runs.load(run),
                figure,
                device=run.config.device,
                augment=augment,
                steps=steps,
                probes=probes,
                stop=stop,
                progress=progress,
            ):
                label = item.subject.label
                known = EXTREMES.get((name, variant.name, "all" if label is None else label))
                comparable = runs.comparable and data == "cifar10-lt" and augment == "redrawn"
                yield Panel(variant, item, known if comparable else None)


def summarize(results: Sequence[Result]) -> dict[str, Measured]:
    """Compute mean and standard deviation over runs that differ only in the seed."""
    return {
        name: Measured.of(result.test.group_accuracy(name) for result in results)
        for name in MEASURES
    }


class _Runs:
    """The plan of the runs of several variants on one data set.

    Args:
        data: the data set.
        out: folder of the runs.
        variants: the variants.
        overrides: settings that override every recipe.
        seeds: number of seeds of each variant.
        checkpoints: returns the epochs whose checkpoints are needed; None stands for the last epoch.
        world: the ranks that train each run together.
        stop: request to stop by a signal.
        progress: show progress.

    Raises:
        UsageError: if an override does not exist, or is ``seed``, or a setting that a variant sets itself or
            does not have.
    """

    def __init__(
        self,
        data: str,
        out: str | Path,
        variants: Sequence[Variant],
        overrides: Mapping[str, Any],
        *,
        seeds: int = 1,
        checkpoints: Callable[[TrainConfig], Collection[int | None]] = lambda config: (),
        world: World,
        stop: StopRequest | None = None,
        progress: bool,
    ) -> None:
        if "seed" in overrides:
            raise UsageError(
                "a table or figure sets seed itself; omit it, or pass the number of seeds of a table"
            )
        self.out = Path(out)
        self.world = world
        self.stop = stop
        self.progress = progress
        self.comparable = set(overrides) <= {*AS_PUBLISHED, *place_settings()}
        self._variants = variants
        self._planned: dict[str, list[PlannedRun]] = {}
        for variant in variants:
            twice = sorted(set(variant.settings) & set(overrides))
            if twice:
                raise UsageError(
                    f"cannot override {twice[0]}, which this table or figure varies; omit it"
                )
            chosen = recipe(
                data, variant.method, variant.optimizer, **variant.settings, **overrides
            )
            self._planned[variant.name] = [
                _planned(variant, chosen.override(seed=seed), seed, checkpoints)
                for seed in range(seeds)
            ]
        self._loaded: tuple[Any, LongTailData] | None = None

    def planned(self, variant: Variant) -> list[PlannedRun]:
        """Return the runs of a variant, one for each seed."""
        return self._planned[variant.name]

    def load(self, run: PlannedRun) -> LongTailData:
        """Return the data of a run. The last data set is cached, because most runs share it."""
        key = run.config.parts["data"]
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = (key, load_configured(run.config, progress=self.progress))
        return self._loaded[1]

    def finished(self, execution: Execution) -> Iterator[tuple[Variant, list[Result]]]:
        """Execute the plan, and yield each variant with the results of all seeds when they are there.

        A shard yields the variants for which other shards have done their part.

        Raises:
            TrainingError: if runs failed in processes of their own, after all other runs.
        """
        outcomes = self._outcomes(execution)
        ended: list[RunOutcome] = []
        found: dict[str, Result] = {}
        for variant in self._variants:
            planned = self.planned(variant)
            while any(run.name not in found for run in planned):
                outcome = next(outcomes, None)
                if outcome is None:
                    break
                ended.append(outcome)
                if outcome.result is not None:
                    found[outcome.run.name] = outcome.result
            results = [found.get(run.name) or self._stored(run) for run in planned]
            if None not in results:
                yield variant, [result for result in results if result is not None]
        check_outcomes(ended)

    def _outcomes(self, execution: Execution) -> Iterator[RunOutcome]:
        """Execute runs one after the other in this process, with the other ranks, or by an executor."""
        runs = [run for planned in self._planned.values() for run in planned]
        if not execution.in_process:
            yield from run_plan(runs, self.out, execution)
            return
        if self.world.rank == 0:
            check_unfinished(execution.shard.of(runs), self.out)
            store_plan(self.out, runs)
        for run in execution.shard.of(runs):
            result = complete(
                run,
                self.out,
                load=partial(self.load, run),
                world=self.world,
                stop=self.stop,
                progress=self.progress,
            )
            yield RunOutcome(run, "finished", result)

    def _stored(self, run: PlannedRun) -> Result | None:
        """Return the result of a run that another shard may have finished."""
        return stored_result(
            run, self.out, load=partial(self.load, run), world=self.world, quiet=True
        )


def _planned(
    variant: Variant,
    chosen: Recipe,
    seed: int,
    checkpoints: Callable[[TrainConfig], Collection[int | None]],
) -> PlannedRun:
    """Plan a run. Runs with seed 0 keep the checkpoints of all epochs that any figure needs."""
    config = chosen.config()
    name = f"{variant.name}/seed-{seed}"
    folder = RunFolder(name)
    figures = [figure for figure in FIGURES.values() if seed == 0 and variant in figure.runs]
    needs = [
        (folder.checkpoint if epoch is None else folder.kept(epoch)).name
        for epoch in checkpoints(config)
    ]
    keep = {epoch for figure in figures for epoch in _epochs(figure, config)}
    return PlannedRun.of(name, chosen, keep=tuple(sorted(keep)), needs=tuple(needs))


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
    stop: StopRequest | None,
    progress: bool,
) -> Iterator[ClassSpectrum]:
    """Yield the spectra of one checkpoint: load, continue or compute each."""
    checkpoint = Checkpoint.load(folder.checkpoint if epoch is None else folder.kept(epoch))
    model = checkpoint.build_model().to(chosen_device(device))
    place = folder.path / "spectra" / f"epoch-{checkpoint.epoch}-steps-{steps}-probes-{probes}"
    for label in figure.classes:
        yield from landscape(
            model,
            data,
            checkpoint,
            [label],
            loss=figure.loss,
            augment=augment,
            steps=steps,
            probes=probes,
            out=place,
            stop=stop,
            progress=progress,
        )
