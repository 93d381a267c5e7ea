"""Accuracy of several methods with SGD and SAM on digits-lt, with equal tuning, over five seeds."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from scipy.stats import t

from benchmarks.machine import save
from fastsam.files import write_text
from fastsam.longtail import Trainer, recipe

IMBALANCE = 50.0
METHODS = ("ce", "ce-drw", "ldam-drw", "vs")
# Four trials for each optimizer, fixed before the first run: values around the recipe for SGD, rho of the
# paper's Figure 4 for SAM. Other settings come from the recipe of digits-lt.
TRIALS: dict[str, list[dict[str, Any]]] = {
    "sgd": [
        {"lr": lr, "weight_decay": decay}
        for lr, decay in itertools.product((0.05, 0.1), (5e-4, 2e-3))
    ],
    "sam": [{"rho": (rho,)} for rho in (0.05, 0.1, 0.2, 0.5)],
}
SAME = {"lr": 0.1, "weight_decay": 5e-4}
"""The trial of SGD with the learning rate and weight decay of all SAM trials."""
DOUBLED, ALIKE = "sgd, twice the epochs", "sgd, lr and weight decay of sam"
MEASURES = ("accuracy", "head", "mid", "tail")


@dataclass(frozen=True)
class Run:
    """One run: method, optimizer, settings of the trial, and seed."""

    method: str
    optimizer: str
    settings: tuple[tuple[str, Any], ...]
    seed: int

    @property
    def key(self) -> str:
        """Key of the run in the cache."""
        values = ",".join(f"{name}={value}" for name, value in self.settings)
        return f"{self.method} {self.optimizer} {values} seed={self.seed}"

    def train(self) -> dict[str, Any]:
        """Train and return the accuracies of the last epoch, in percent."""
        config = recipe(
            "digits-lt",
            self.method,
            self.optimizer,
            imbalance=IMBALANCE,
            seed=self.seed,
            subset_seed=self.seed,
            **dict(self.settings),
        ).config()
        result = Trainer(config, progress=False).fit()
        if result.validation is None:
            raise AssertionError("digits-lt has a validation set")
        return {
            "validation": result.validation.accuracy,
            "test": {"accuracy": result.test.accuracy, **result.test.groups},
            "subset": result.subset_hash,
            "seconds": result.seconds,
        }


@dataclass(frozen=True)
class LongtailDigits:
    """Compare SGD, SAM, and SGD with twice the epochs for CE, CE-DRW, LDAM-DRW and VS on digits-lt.

    Every seed has its own subset. For each method and optimizer, the trial with the best mean validation
    accuracy over the seeds is evaluated on the test set after its last epoch. SAM uses the recipe's learning
    rate and weight decay; SGD with these values is reported too.
    """

    seeds: int = 5
    """Number of seeds; they are 0, 1, ..."""
    methods: tuple[str, ...] = METHODS
    """Methods to compare."""
    jobs: int = 1
    """Number of concurrent runs, with one thread each."""
    epochs: int = 60
    """Epochs of each run (twice as many for the third column)."""
    minutes: float | None = None
    """Start no run after this many minutes. The same command resumes the benchmark."""
    cache: Path = Path("runs/longtail-digits")
    """Folder for finished runs, from which an interrupted benchmark is resumed."""
    save: bool = False
    """Write the results to benchmarks/results/."""

    def run(self) -> None:
        """Train the runs that are not in the cache, select trials, and print the comparison."""
        deadline = math.inf if self.minutes is None else time.monotonic() + 60 * self.minutes
        first = [
            Run(method, optimizer, self._settings(trial), seed)
            for method in self.methods
            for optimizer, trials in TRIALS.items()
            for trial in trials
            for seed in range(self.seeds)
        ]
        outcomes = self._trained(first, deadline)
        table: dict[str, Any] = {}
        for method in self.methods:
            chosen = {name: self._best(method, name, outcomes) for name in TRIALS}
            longer = dict(chosen["sgd"]) | {"epochs": 2 * self.epochs}
            doubled = [
                Run(method, "sgd", tuple(longer.items()), seed) for seed in range(self.seeds)
            ]
            columns = {
                **{name: self._tests(method, name, chosen[name], outcomes) for name in TRIALS},
                DOUBLED: [outcome["test"] for outcome in self._trained(doubled, deadline).values()],
                ALIKE: self._tests(method, "sgd", self._settings(SAME), outcomes),
            }
            table[method] = {
                "chosen": {name: dict(settings) for name, settings in chosen.items()},
                "test": columns,
                "summary": {name: summary(rows) for name, rows in columns.items()},
                **{
                    f"sam minus {name}": differences(columns["sam"], columns[name])
                    for name in ("sgd", DOUBLED, ALIKE)
                },
            }
            _print(method, table[method])
        if self.save:
            trials = {
                name: [
                    {k: list(v) if isinstance(v, tuple) else v for k, v in x.items()} for x in xs
                ]
                for name, xs in TRIALS.items()
            }
            results = {
                "data": "digits-lt",
                "imbalance": IMBALANCE,
                "epochs": self.epochs,
                "seeds": self.seeds,
                "checkpoint": "last epoch",
                "subsets": [outcomes[run.key]["subset"] for run in first[: self.seeds]],
                "trials": trials,
                "methods": table,
            }
            print(f"wrote {save('longtail-digits', results)}")

    def _settings(self, trial: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
        return (*trial.items(), ("epochs", self.epochs))

    def _trained(self, runs: Sequence[Run], deadline: float) -> dict[str, Any]:
        """Return the outcome of every run, from the cache or by training it."""
        cache = self.cache / "outcomes.json"
        known = json.loads(cache.read_text()) if cache.is_file() else {}
        missing = [run for run in runs if run.key not in known]
        for done, (run, outcome) in enumerate(self._outcomes(missing, deadline), start=1):
            known[run.key] = outcome
            write_text(cache, json.dumps(known, indent=1))
            print(f"{done}/{len(missing)} {run.key}", flush=True)
        left = sum(run.key not in known for run in runs)
        if left:
            raise SystemExit(f"{left} runs are left; repeat the command to resume")
        return {run.key: known[run.key] for run in runs}

    def _outcomes(self, runs: Sequence[Run], deadline: float) -> Iterator[tuple[Run, Any]]:
        """Train runs and yield their outcomes. No run is started after ``deadline`` (monotonic seconds)."""
        if self.jobs == 1:
            for run in runs:
                if time.monotonic() > deadline:
                    return
                yield run, run.train()
            return
        # Spawn workers, because torch's threads do not survive a fork.
        with ProcessPoolExecutor(self.jobs, mp_context=get_context("spawn")) as pool:
            waiting = list(runs)
            running: dict[Future[Any], Run] = {}
            while running or (waiting and time.monotonic() <= deadline):
                while waiting and len(running) < self.jobs and time.monotonic() <= deadline:
                    run = waiting.pop(0)
                    running[pool.submit(run.train)] = run
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield running.pop(future), future.result()

    def _best(
        self, method: str, optimizer: str, outcomes: Mapping[str, Any]
    ) -> tuple[tuple[str, Any], ...]:
        def validation(settings: tuple[tuple[str, Any], ...]) -> float:
            runs = (Run(method, optimizer, settings, seed) for seed in range(self.seeds))
            return statistics.mean([float(outcomes[run.key]["validation"]) for run in runs])

        return max((self._settings(trial) for trial in TRIALS[optimizer]), key=validation)

    def _tests(
        self,
        method: str,
        optimizer: str,
        settings: tuple[tuple[str, Any], ...],
        outcomes: Mapping[str, Any],
    ) -> list[dict[str, float]]:
        runs = (Run(method, optimizer, settings, seed) for seed in range(self.seeds))
        return [outcomes[run.key]["test"] for run in runs]


def summary(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Compute mean and standard deviation of every measure over the seeds."""
    return {
        name: {
            "mean": statistics.mean(row[name] for row in rows),
            "std": statistics.stdev(row[name] for row in rows) if len(rows) > 1 else 0.0,
        }
        for name in MEASURES
    }


def differences(
    left: Sequence[Mapping[str, float]], right: Sequence[Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """Compute the mean paired differences, with the half-width of their 95 % confidence intervals."""
    result = {}
    for name in MEASURES:
        gaps = [a[name] - b[name] for a, b in zip(left, right, strict=True)]
        half = 0.0
        if len(gaps) > 1:
            quantile = float(t.ppf(0.975, len(gaps) - 1))
            half = quantile * statistics.stdev(gaps) / math.sqrt(len(gaps))
        result[name] = {"mean": statistics.mean(gaps), "confidence_95": half}
    return result


def _print(method: str, entry: Mapping[str, Any]) -> None:
    for name, measures in entry["summary"].items():
        cells = "  ".join(
            f"{measure} {measures[measure]['mean']:5.1f} +- {measures[measure]['std']:.1f}"
            for measure in MEASURES
        )
        print(f"{method:9s} {name:41s} {cells}")
    for name in (key for key in entry if " minus " in key):
        cells = "  ".join(
            f"{measure} {gap['mean']:+5.1f} +- {gap['confidence_95']:.1f}"
            for measure, gap in entry[name].items()
        )
        print(f"{method:9s} {name:41s} {cells}")
