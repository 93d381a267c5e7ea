"""Tables of docs/longtail/methods.md, created from the records."""

from __future__ import annotations

import math

from benchmarks.longtail_methods.plan import BASELINE
from benchmarks.longtail_methods.summary import KINDS, ArmSummary, Summary, summary
from benchmarks.markdown import markdown_table
from fastsam.report.paired import Difference

_IN_PROGRESS = "In progress.\n"


def tables() -> dict[str, str]:
    """Return the sections of the document, by name."""
    found = summary()
    sections = {"arms": _arms, "answers": _answers, "sam": _sam}
    return {
        f"longtail-methods-{name}": _IN_PROGRESS if found is None else table(found)
        for name, table in sections.items()
    }


def _arms(found: Summary) -> str:
    """Return a table of scores and cost of every arm."""
    rows = [
        [
            arm.way,
            arm.optimizer,
            *(_cell(arm, "raw", score) for score in ("balanced", "head", "mid", "tail", "ece")),
            *(_cell(arm, "tau", score) for score in ("balanced", "head", "mid", "tail", "ece")),
            f"{arm.gradients:.0f}",
        ]
        for arm in found.arms.values()
    ]
    scores = ("all", "head", "mid", "tail", "ECE")
    header = [
        f"method, {_seeds(found)}",
        "optimizer",
        *scores,
        *(f"{score}, tau" for score in scores),
        "gradients",
    ]
    return markdown_table(header, rows)


def _answers(found: Summary) -> str:
    """Return a table of every arm minus the baseline."""
    rows = [
        [
            arm.way,
            arm.optimizer,
            *(cell for kind in KINDS for cell in _judged(arm.gap[kind])),
        ]
        for arm in found.arms.values()
        if arm.gap
    ]
    header = [
        f"minus {BASELINE}, {_seeds(found)}",
        *("optimizer", "as trained", "verdict", "after tau", "verdict"),
    ]
    return markdown_table(header, rows)


def _sam(found: Summary) -> str:
    """Return a table of SAM minus SGD for every method."""
    rows = [
        [
            arm.way,
            *(
                cell
                for kind in KINDS
                for cell in (
                    *_judged(arm.sam_gap[kind]["balanced"]),
                    str(arm.sam_gap[kind]["tail"]),
                )
            ),
        ]
        for arm in found.arms.values()
        if arm.sam_gap
    ]
    header = [
        f"SAM minus SGD, {_seeds(found)}",
        *("as trained", "verdict", "tail, as trained", "after tau", "verdict", "tail, after tau"),
    ]
    return markdown_table(header, rows)


def _cell(arm: ArmSummary, kind: str, score: str) -> str:
    mean, deviation = arm.scores[kind][score]
    return f"{mean:.1f}" if math.isnan(deviation) else f"{mean:.1f} +- {deviation:.1f}"


def _judged(gap: Difference) -> tuple[str, str]:
    return str(gap), gap.verdict()


def _seeds(found: Summary) -> str:
    count = len(found.seeds)
    return f"{count} seed" if count == 1 else f"{count} seeds"
