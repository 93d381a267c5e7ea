"""Ways to train that were compared over the same seeds, and what the comparison says."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

from fastsam.files import from_json, to_json, write_text
from fastsam.longtail.errors import DataError
from fastsam.longtail.measured import Measured
from fastsam.longtail.metrics import Metrics
from fastsam.records import build
from fastsam.report.paired import Difference, paired
from fastsam.report.text_table import TextTable

Judged = Literal["raw", "calibrated"]
SCORES = ("accuracy", "balanced", "head", "mid", "tail")
"""Scores of an arm, in percent on the test set."""


def scores_of(metrics: Metrics) -> dict[str, float]:
    """Return the scores of one run by name; NaN for a group of classes that the data does not have."""
    known = {"accuracy": metrics.accuracy, "balanced": metrics.balanced, **metrics.groups}
    return {name: known.get(name, math.nan) for name in SCORES}


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: its name.
        gradients: forward and backward passes over whole batches, mean over seeds; NaN if the number of a
            seed is unknown. Older versions wrote 0 instead.
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
        """Return the gradients of an arm over those of the first; NaN if one of them is unknown."""
        return self._ratio(name, self.arms[0].name)

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
        sentences = [*_sentence("", overall, tail), "Calibration needs no further training."]
        verdict = f"{first.name}, calibrated vs. as trained: {overall.verdict()}."
        return verdict, " ".join(sentences)

    def _about_pair(self, left: str, right: str) -> tuple[str, str]:
        sentences: list[str] = []
        for judged in self.judged[::-1]:
            overall, tail = (
                self.difference(left, right, judged, score) for score in ("balanced", "tail")
            )
            when = "As trained" if judged == "raw" else "After calibration"
            sentences += _sentence(f"{when}: ", overall, tail)
        cost = self._ratio(left, right)
        if not math.isnan(cost):
            sentences.append(f"Cost: {cost:.2g}x the gradients.")
        verdict = self.difference(left, right, self.judged[-1], "balanced").verdict()
        return f"{left} vs. {right}: {verdict}.", " ".join(sentences)

    def _ratio(self, left: str, right: str) -> float:
        by_name = {arm.name: arm.gradients for arm in self.arms}
        counted = by_name[left] > 0 and by_name[right] > 0
        return by_name[left] / by_name[right] if counted else math.nan

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
                _times(self._ratio(left, right)),
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
                *(str(Measured.of(arm.scores(judged, score))) for score in SCORES),
                _times(self.cost(arm.name)),
            )
            for arm in self.arms
            for judged in self.judged
        )
        return TextTable((f"{self.title}; test accuracy, %", *SCORES, "gradients"), rows)


def _sentence(when: str, overall: Difference, tail: Difference) -> list[str]:
    """Return a sentence about the differences that are known; none if there are none."""
    known = [f"balanced accuracy {overall} points"] if overall.known else []
    known += [f"tail {tail}"] if tail.known else []
    text = f"{when}{', '.join(known)}."
    return [text[0].upper() + text[1:]] if known else []


def _times(ratio: float) -> str:
    """Return a ratio of costs, ``1.50x``; empty if it is unknown."""
    return "" if math.isnan(ratio) else f"{ratio:.2f}x"


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
