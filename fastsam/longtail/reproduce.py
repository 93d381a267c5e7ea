"""The result tables of the paper: which rows they have, what was published, and running them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsam.longtail.errors import CheckpointError, UsageError, unknown
from fastsam.longtail.recipes import recipe
from fastsam.longtail.results import Result, RunFolder
from fastsam.longtail.trainer import Trainer, load_configured

TABLES: dict[str, tuple[tuple[str, str], ...]] = {
    "table1": tuple(
        (method, optimizer)
        for method in ("ce", "ce-drw", "ldam-drw", "vs")
        for optimizer in ("sgd", "sam")
    ),
    "table3": (
        ("ce", "sgd"),
        ("ce-drw", "sgd"),
        ("ce-drw", "sam"),
        ("ldam-drw", "sgd"),
        ("ldam-drw", "sam"),
    ),
    "table4": tuple(("ce-drw", optimizer) for optimizer in ("sgd", "pgd", "lpf-sgd", "sam")),
}
"""Rows ``(method, optimizer)`` of the tables of Rangwani et al. 2022: CIFAR-LT at factor 100, the
large data sets, and other optimizers that escape saddles."""

PUBLISHED: dict[tuple[str, str, str], tuple[float | None, ...]] = {
    ("cifar10-lt", "ce", "sgd"): (71.7, 90.8, 71.9, 52.3),
    ("cifar10-lt", "ce", "sam"): (73.1, 93.3, 74.1, 51.7),
    ("cifar10-lt", "ce-drw", "sgd"): (75.5, 91.6, 74.1, 61.4),
    ("cifar10-lt", "ce-drw", "sam"): (80.6, 91.4, 78.0, 73.1),
    ("cifar10-lt", "ce-drw", "pgd"): (77.2, None, None, 65.0),
    ("cifar10-lt", "ce-drw", "lpf-sgd"): (78.5, None, None, 67.2),
    ("cifar10-lt", "ldam-drw", "sgd"): (77.5, 91.1, 75.7, 66.4),
    ("cifar10-lt", "ldam-drw", "sam"): (81.9, 91.0, 79.2, 76.4),
    ("cifar10-lt", "vs", "sgd"): (78.6, 90.6, 75.8, 70.3),
    ("cifar10-lt", "vs", "sam"): (82.4, 90.7, 79.6, 78.0),
    ("cifar100-lt", "ce", "sgd"): (38.5, 64.5, 36.8, 8.2),
    ("cifar100-lt", "ce", "sam"): (39.6, 66.5, 38.1, 8.0),
    ("cifar100-lt", "ce-drw", "sgd"): (41.0, 61.3, 41.7, 14.7),
    ("cifar100-lt", "ce-drw", "sam"): (44.6, 61.2, 47.5, 20.7),
    ("cifar100-lt", "ce-drw", "pgd"): (42.2, None, None, 17.0),
    ("cifar100-lt", "ce-drw", "lpf-sgd"): (42.9, None, None, 15.8),
    ("cifar100-lt", "ldam-drw", "sgd"): (42.7, 61.8, 42.2, 19.4),
    ("cifar100-lt", "ldam-drw", "sam"): (45.4, 64.4, 46.2, 20.8),
    ("cifar100-lt", "vs", "sgd"): (41.7, 54.4, 41.1, 26.8),
    ("cifar100-lt", "vs", "sam"): (46.6, 56.4, 48.8, 31.7),
    ("imagenet-lt", "ce", "sgd"): (42.7, 62.5, 36.6, 12.5),
    ("imagenet-lt", "ce-drw", "sgd"): (44.9, 57.9, 42.2, 21.6),
    ("imagenet-lt", "ce-drw", "sam"): (47.1, 56.6, 45.8, 28.1),
    ("imagenet-lt", "ldam-drw", "sgd"): (49.9, 61.1, 48.2, 28.3),
    ("imagenet-lt", "ldam-drw", "sam"): (53.1, 62.0, 52.1, 34.8),
    ("inaturalist18", "ce", "sgd"): (60.3, 72.8, 62.7, 54.8),
    ("inaturalist18", "ce-drw", "sgd"): (63.0, 59.8, 64.4, 62.3),
    ("inaturalist18", "ce-drw", "sam"): (65.3, 60.5, 66.2, 65.5),
    ("inaturalist18", "ldam-drw", "sgd"): (67.5, 63.0, 68.3, 67.8),
    ("inaturalist18", "ldam-drw", "sam"): (70.1, 64.1, 70.5, 71.2),
}
"""Published test accuracy in percent: overall, head, mid, tail; None where it is not known. CIFAR
at factor 100, exponential. Whether they are of the last or the best epoch is not stated there."""

MEASURES = ("all", "head", "mid", "tail")


@dataclass(frozen=True)
class Row:
    """One row of a reproduced table.

    Attributes:
        method: ``loss[-rule]``.
        optimizer: name of the optimizer.
        mean: accuracy over the seeds: overall, head, mid, tail.
        std: standard deviation over the seeds, 0 for a single one.
        published: what the paper reports for the same settings, if anything.
    """

    method: str
    optimizer: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    published: tuple[float | None, ...] | None


def reproduce(
    table: str,
    data: str,
    out: Path,
    *,
    seeds: int = 3,
    progress: bool = True,
    **overrides: Any,
) -> Iterator[Row]:
    """Train every row of a table for several seeds, last epoch each, and yield it when done.

    Runs live in ``out/METHOD-OPTIMIZER/seed-K``; finished ones are read, interrupted ones go on.
    Seeds are seeds of the training; the subset stays that of ``subset_seed``.

    Args:
        table: one of :data:`TABLES`.
        data: data set; the rows are run on any.
        out: folder of the runs.
        seeds: number of seeds, from 0.
        progress: show progress bars on a terminal.
        **overrides: settings that replace those of every recipe.

    Raises:
        UsageError: for an unknown name or setting, before anything is trained.
    """
    if table not in TABLES:
        raise unknown("table", table, TABLES)
    if seeds < 1:
        raise UsageError(f"seeds must be at least 1, got {seeds}")
    recipes = [recipe(data, method, optimizer, **overrides) for method, optimizer in TABLES[table]]
    loaded = load_configured(recipes[0].config())
    for chosen in recipes:
        results = []
        for seed in range(seeds):
            one = chosen.override(seed=seed)
            folder = RunFolder(out / f"{one.method}-{one.optimizer}" / f"seed-{seed}")
            if folder.result.is_file():
                result = Result.from_json(folder.result.read_text("utf-8"))
                if result.config != one.config().as_dict():
                    raise CheckpointError(
                        f"{folder.path} holds a run with other settings; choose another --out"
                    )
                results.append(result)
                continue
            trainer = Trainer(
                one.config(),
                data=loaded,
                sources=one.sources,
                out=folder.path,
                resume=folder.checkpoint.is_file(),
                progress=progress,
            )
            results.append(trainer.fit())
        yield summarise(results)


def summarise(results: Sequence[Result]) -> Row:
    """Mean and standard deviation over runs that differ in nothing but the seed."""
    config = results[0].config
    numbers = [
        (r.test.accuracy, *(r.test.groups.get(name, float("nan")) for name in MEASURES[1:]))
        for r in results
    ]
    columns = list(zip(*numbers, strict=True))
    name = (config["data"], config["method"], config["optimizer"])
    # Only an unchanged recipe is comparable; where and with what seed it runs does not matter.
    changed = {setting for setting, source in results[0].sources.items() if source == "given"}
    comparable = changed <= {"seed", "device", "data_root", "threads", "workers"}
    return Row(
        method=config["method"],
        optimizer=config["optimizer"],
        mean=tuple(statistics.mean(column) for column in columns),
        std=tuple(statistics.stdev(c) if len(c) > 1 else 0.0 for c in columns),
        published=PUBLISHED.get(name) if comparable else None,
    )
