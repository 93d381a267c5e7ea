"""Ways to train that were compared over the same seeds, and what the comparison says."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

from fastsam.files import from_json, to_json, write_text
from fastsam.longtail.errors import DataError
from fastsam.records import build
from fastsam.report.paired import Difference, paired
from fastsam.report.text_table import TextTable, mean_and_deviation

Judged = Literal["raw", "calibrated"]
SCORES = ("accuracy", "balanced", "head", "mid", "tail")
"""Scores of an arm, in percent on the test set."""


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: its name.
        gradients: forward and backward passes over whole batches, mean over seeds.
        raw: each score of each seed, as trained.
        calibrated: the same after a calibration chosen on validation images; empty without one.
    """

    name: str
    gradients: float
    raw: dict[str, list[float]]
    calibrated: dict[str, list[float]]

    def scores(self, judged: Judged, score: str) -> list[float]:
        """Return a score of each seed, in percent."""
        return (self.raw if judged == "raw" else self.calibrated)[score]


@dataclass(frozen=True)
class PairedPanel:
    """Arms that were trained on the same data with the same seeds.

    Attributes:
        title: the data.
        arms: the arms; others are compared with the first.
        pairs: further pairs of names that sentences compare, left minus right.
    """

    title: str
    arms: list[Arm]
    pairs: list[list[str]]

    def difference(self, left: str, right: str, judged: Judged, score: str) -> Difference:
        """Return the paired difference of two arms."""
        by_name = {arm.name: arm for arm in self.arms}
        return paired(by_name[left].scores(judged, score), by_name[right].scores(judged, score))

    def gaps(self, left: str, right: str, judged: Judged, score: str) -> list[float]:
        """Return the difference of two arms for each seed."""
        by_name = {arm.name: arm.scores(judged, score) for arm in self.arms}
        return [a - b for a, b in zip(by_name[left], by_name[right], strict=True)]

    def cost(self, name: str) -> float:
        """Return the gradients of an arm over those of the first; NaN where they are unknown."""
        by_name = {arm.name: arm.gradients for arm in self.arms}
        first = self.arms[0].gradients
        return by_name[name] / first if first else math.nan  # older runs did not count

    @property
    def seeds(self) -> int:
        """Number of seeds of each arm."""
        return len(self.arms[0].raw["balanced"])

    @property
    def judged(self) -> tuple[Judged, ...]:
        """How the arms were judged: as trained, and after calibration where all were calibrated."""
        calibrated = all(arm.calibrated for arm in self.arms)
        return get_args(Judged) if calibrated else ("raw",)

    def compared(self) -> list[tuple[str, str]]:
        """Return the names of arms that are compared: others with the first, then the further pairs."""
        first = self.arms[0].name
        pairs = [(arm.name, first) for arm in self.arms[1:]]
        return pairs + [(left, right) for left, right in self.pairs]

    def verdicts(self) -> list[tuple[str, str]]:
        """Return what calibration does to the first arm, and the verdict on each pair of arms.

        Each is a verdict on balanced accuracy, after calibration if there was one, and the numbers behind
        it: differences overall and on the tail with 95 % intervals, and the cost.
        """
        pairs = [self._about_pair(*pair) for pair in self.compared()]
        return [self._about_calibration(), *pairs] if "calibrated" in self.judged else pairs

    def _about_calibration(self) -> tuple[str, str]:
        first = self.arms[0]
        overall, tail = (
            paired(first.calibrated[score], first.raw[score]) for score in ("balanced", "tail")
        )
        return (
            f"{first.name}, calibrated vs. as trained: {overall.verdict()}.",
            f"Balanced accuracy {overall} points, tail {tail}. Calibration needs no further training.",
        )

    def _about_pair(self, left: str, right: str) -> tuple[str, str]:
        sentences = []
        for judged in self.judged[::-1]:
            overall, tail = (
                self.difference(left, right, judged, score) for score in ("balanced", "tail")
            )
            when = "As trained" if judged == "raw" else "After calibration"
            sentences.append(f"{when}: balanced accuracy {overall} points, tail {tail}.")
        cost = self._ratio(left, right)
        if not math.isnan(cost):
            sentences.append(f"Cost: {cost:.2g}x the gradients.")
        verdict = self.difference(left, right, self.judged[-1], "balanced").verdict()
        return f"{left} vs. {right}: {verdict}.", " ".join(sentences)

    def _ratio(self, left: str, right: str) -> float:
        cost = self.cost(right)
        return self.cost(left) / cost if cost else math.nan

    def differences(self) -> TextTable:
        """Return each difference with its interval and the verdict on it."""
        rows = tuple(
            (
                f"{left}, minus {right}",
                "as trained" if judged == "raw" else "calibrated",
                str(balanced.n),
                str(balanced),
                balanced.verdict(),
                str(tail),
                tail.verdict(),
                f"{self._ratio(left, right):.2f}x",
            )
            for left, right in self.compared()
            for judged in self.judged
            for balanced, tail in [
                [self.difference(left, right, judged, score) for score in ("balanced", "tail")]
            ]
        )
        scores = ("balanced, points", "verdict", "tail, points", "verdict on the tail")
        return TextTable((self.title, "judged", "seeds", *scores, "gradients"), rows)

    def table(self) -> TextTable:
        """Return mean and standard deviation of each score of each arm, raw and calibrated."""
        rows = tuple(
            (
                f"{arm.name}, {judged}",
                *(mean_and_deviation(arm.scores(judged, score)) for score in SCORES),
                f"{self.cost(arm.name):.2f}x",
            )
            for arm in self.arms
            for judged in self.judged
        )
        return TextTable((f"{self.title}; test accuracy, %", *SCORES, "gradients"), rows)


@dataclass(frozen=True)
class PairedComparison:
    """What `fastsam demo` compared.

    Attributes:
        seeds: number of seeds of each arm.
        panels: one for each data set.
    """

    FILE: ClassVar[str] = "comparison.json"

    seeds: int
    panels: list[PairedPanel]

    def save(self, folder: str | Path) -> None:
        """Write ``folder/comparison.json``."""
        write_text(Path(folder, self.FILE), to_json(asdict(self)))

    @classmethod
    def load(cls, path: str | Path) -> PairedComparison:
        """Read what :meth:`save` wrote.

        Raises:
            DataError: the file is something else.
        """
        try:
            return build(cls, from_json(Path(path).read_text("utf-8")))
        except ValueError as error:
            raise DataError(f"{path} is not a comparison of fastsam: {error}") from error
