"""The program of the demo: train, compare, compute spectra, and write the report."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor, nn

from fastsam.demo.plan import EPOCHS, HEAD_CLASS, LONG_TAIL, PANELS, TAIL_CLASS, PanelPlan
from fastsam.demo.runs import Outcome, run_folder, train_seed
from fastsam.extras import requires_extra
from fastsam.files import write_bytes
from fastsam.longtail import Checkpoint
from fastsam.longtail.errors import UsageError
from fastsam.longtail.landscape import REDRAWN, landscape
from fastsam.longtail.measured import Measured
from fastsam.longtail.trained import TrainedRun
from fastsam.longtail.training import RunFolder, check_free
from fastsam.progress import ProgressBar
from fastsam.report import (
    Arm,
    PairedComparison,
    PairedPanel,
    read_runs,
    spectrum_table,
    write_report,
)
from fastsam.report.figures import comparison_png
from fastsam.report.timing import time_sam_step
from fastsam.threads import cpu_threads

STEPS, PROBES = 40, 2

_Found = TypeVar("_Found")
_Task = tuple[Callable[..., _Found], tuple[Any, ...]]


def run_demo(
    out: str | Path,
    *,
    seed: int = 0,
    seeds: int = 6,
    epochs: int = EPOCHS,
    overwrite: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> Path:
    """Compare training methods on ``digits-lt``, and compute spectra of a head and a tail class.

    Args:
        out: output folder for runs, spectra and report.
        seed: first seed.
        seeds: number of seeds, at least 1; intervals need at least 2.
        epochs: epochs of each run, at least 10.
        overwrite: replace the results of an earlier demo in ``out``.
        progress: show progress: a bar on a terminal, one line per minute elsewhere.
        say: called with each block of text to print.

    Returns:
        Path of the self-contained ``report.html``.

    Raises:
        UsageError: if a number is too small, or ``out`` is not empty and ``overwrite`` is not set.
    """
    for name, value, low in (("seed", seed, 0), ("seeds", seeds, 1), ("epochs", epochs, 10)):
        if value < low:
            raise UsageError(f"{name} must be at least {low}, got {value}")
    out = Path(out)
    check_free(out, allowed=overwrite, flags="--overwrite")
    for plan in PANELS:
        # The report would include runs with other seeds, or of an older demo.
        for earlier in (out / plan.folder).glob("seed-*"):
            shutil.rmtree(earlier)
    every = range(seed, seed + seeds)
    ways = sum(len(plan.ways) for plan in PANELS)
    say(f"training {ways} configurations with {seeds} seed(s), one process per CPU core")
    tasks: list[_Task[dict[str, Outcome]]] = [
        (train_seed, (plan, each, epochs, out)) for plan in PANELS for each in every
    ]
    found = _in_processes(tasks, "training", unit="task", progress=progress)
    panels = [
        _panel(plan, found[place * seeds : (place + 1) * seeds])
        for place, plan in enumerate(PANELS)
    ]
    comparison = PairedComparison(seeds, panels)
    comparison.save(out)

    folders = [
        run_folder(out, LONG_TAIL, seed, way)
        for way in LONG_TAIL.ways
        if way.name in LONG_TAIL.closer
    ]
    _in_processes(
        [(_spectra, (folder,)) for folder in folders], "spectra", unit="run", progress=progress
    )
    trunk = TrainedRun.load(folders[0])
    with cpu_threads(1):
        time_sam_step(trunk.network, _batch_loss(trunk)).save(out)

    write_bytes(out / "overview.png", comparison_png(comparison))
    page = write_report(out)
    _say_what_was_found(out, say)
    say(f"\nreport: {page}")
    return page


def _panel(plan: PanelPlan, outcomes: Sequence[dict[str, Outcome]]) -> PairedPanel:
    """Collect the outcomes of all seeds for each training method."""
    arms = []
    for way in plan.ways:
        mine = [found[way.name] for found in outcomes]
        arms.append(
            Arm(
                way.name,
                Measured.of(each.gradients for each in mine).mean,
                _by_score([each.raw for each in mine]),
                _by_score([each.calibrated for each in mine]),
            )
        )
    return PairedPanel(plan.title, arms, [list(pair) for pair in plan.pairs])


def _by_score(scores: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [each[name] for each in scores] for name in scores[0]}


def _spectra(folder: Path) -> None:
    """Compute the spectra of a run, and the invalid spectrum of published tools for the tail class."""
    run = RunFolder(folder)
    checkpoint = Checkpoint.load(run.checkpoint)
    model, data = checkpoint.build_model(), TrainedRun.load(folder).data()
    with cpu_threads(1):
        for classes, augment in (((HEAD_CLASS, TAIL_CLASS), "none"), ((TAIL_CLASS,), REDRAWN)):
            for item in landscape(
                model,
                data,
                checkpoint,
                classes,
                augment=augment,
                steps=STEPS,
                probes=PROBES,
                progress=False,
            ):
                item.save(folder / "spectra")


def _batch_loss(run: TrainedRun) -> Callable[[nn.Module], Tensor]:
    """Return a function that computes the loss of one fixed training batch."""
    size = run.checkpoint.config.batch_size
    (batch,) = run.data().train.batches([np.arange(size)], None, run.device)
    return lambda model: nn.functional.cross_entropy(model(batch.inputs), batch.targets)


def _say_what_was_found(out: Path, say: Callable[[str], None]) -> None:
    runs = read_runs(out)
    for panel in runs.comparison.panels if runs.comparison is not None else ():
        say(f"\n{panel.table()}\n")
        for verdict, numbers in panel.verdicts():
            say(f"{verdict}\n  {numbers}")
    say(f"\n{spectrum_table([s for s in runs.spectra if s.subject.augment != REDRAWN])}")
    say("An eigenvalue lies within +- of each extreme.")
    say(
        "\nThe same tail class with a new augmentation at every product, which is not a valid operator. It "
        "shows\nhow the noise drives the extremes towards symmetry.\n"
        f"{spectrum_table([s for s in runs.spectra if s.subject.augment == REDRAWN])}"
    )
    if runs.timing is not None:
        say(f"\n{runs.timing.sentence()}")


def _in_processes(
    tasks: Sequence[_Task[_Found]], description: str, *, unit: str, progress: bool
) -> list[_Found]:
    """Run tasks in worker processes, and return their results in order.

    joblib stops its workers if one of them fails or the user interrupts. scikit-learn depends on it.
    """
    with requires_extra("longtail", "the demo"):
        from joblib import Parallel, cpu_count, delayed
    found: Iterator[_Found] = Parallel(n_jobs=min(cpu_count(), len(tasks)), return_as="generator")(
        delayed(task)(*arguments) for task, arguments in tasks
    )
    results = []
    with ProgressBar(total=len(tasks), description=description, unit=unit, enabled=progress) as bar:
        for result in found:
            results.append(result)
            bar.update()
    return results
