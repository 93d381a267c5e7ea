"""Tables and figures of docs/results.md, created from the summary."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.late_ascent.arms import BASE
from benchmarks.late_ascent.curvature_summary import PLACES
from benchmarks.late_ascent.records import FOLDER, Unit
from benchmarks.markdown import markdown_table
from benchmarks.seed_scores import SCORES, stored_difference
from fastsam.report import Arm, PairedComparison, PairedPanel


def tables() -> dict[str, str]:
    """Return the sections of the document, by name."""
    summary = json.loads((FOLDER / "summary.json").read_text())
    setups = summary["setups"]
    sections = {
        "tuning": _tuning(summary["tuning"]),
        "answers": _answers(setups) if setups else "",
        "equal-rate": _at_equal_rate(setups),
        "reported-seeds": _by_reported_seeds(setups),
        "arms": _all_arms(setups) if setups else "",
        "curvature": _curvature(setups) if setups else "",
    }
    return {f"late-ascent-{name}": text or "In progress.\n" for name, text in sections.items()}


def comparison() -> PairedComparison:
    """Return the panels of a figure for every complete setup: chosen SAM, and the base, minus chosen SGD."""
    summary = json.loads((FOLDER / "summary.json").read_text())
    panels = [_panel(name, table) for name, table in summary["setups"].items()]
    return PairedComparison(len(panels), panels)


def _panel(name: str, table: Mapping[str, Any]) -> PairedPanel:
    key = (table["setup"], table["method"])
    runs = [Unit(*key, seed, table["stage"]).records() for seed in range(table["seeds"])]
    chosen = table["chosen"]
    shown = {"chosen SGD": chosen["sgd"], "chosen SAM": chosen["sam"]}
    if table["minus base"] is not None:
        shown["SGD, recipe's rate"] = BASE.name
    arms = [
        Arm(
            label,
            table["arms"][arm]["gradients"],
            *(
                {score: [run[arm]["test"][kind][score] for run in runs] for score in SCORES}
                for kind in ("raw", "tau")
            ),
        )
        for label, arm in shown.items()
    ]
    return PairedPanel(f"{name.replace(' ', ', ', 1)}, {len(runs)} seeds", arms, [])


def _tuning(tuning: Mapping[str, Any]) -> str:
    """Return tables of the validation accuracy of every trial, with the chosen trials in bold."""
    parts = []
    for name, table in tuning.items():
        if "trials" in table:
            chosen = set(table["chosen"].values())
            rows = [_trial(arm, [value], [arm in chosen]) for arm, value in table["trials"].items()]
            parts.append(markdown_table([name, "validation, %"], rows))
            continue
        base = max(table["base"], key=table["base"].__getitem__)
        by_images = table["late"]
        empty = [""] * (len(by_images) - 1)
        rows = [
            [*_trial(arm, [value], [arm == base]), *empty] for arm, value in table["base"].items()
        ]
        rows += [
            _trial(
                arm,
                [by_images[images][arm] for images in by_images],
                [arm in table["chosen"][images].values() for images in by_images],
            )
            for arm in next(iter(by_images.values()))
        ]
        header = [name, *(f"{images}, %" for images in by_images)]
        parts.append(markdown_table(header, rows))
    return "\n".join(parts)


def _trial(arm: str, values: Sequence[float], chosen: Sequence[bool]) -> list[str]:
    cells = [
        f"**{value:.2f}**" if bold else f"{value:.2f}"
        for value, bold in zip(values, chosen, strict=True)
    ]
    return [arm, *cells]


def _answers(setups: Mapping[str, Any]) -> str:
    """Return a table of the primary comparison of every complete setup."""
    rows = []
    for name, table in setups.items():
        primary = table["primary"]
        tail = table["minus the chosen SGD"]["tau"][table["chosen"]["sam"]]["tail"]
        raw = table["minus the chosen SGD"]["raw"][table["chosen"]["sam"]]
        others = [table["minus base"], table["few"], table["raw"]]
        rows.append(
            [
                name,
                str(table["seeds"]),
                table["chosen"]["sgd"],
                table["chosen"]["sam"],
                str(stored_difference(primary)),
                f"{primary['p, corrected']:.2g}",
                f"**{primary['verdict']}**",
                str(stored_difference(tail)),
                str(stored_difference(raw["balanced"])),
                str(stored_difference(raw["tail"])),
                *("" if other is None else str(stored_difference(other)) for other in others),
            ]
        )
    header = [
        *("setup", "seeds", "SGD", "SAM", "SAM minus SGD, balanced, after tau", "p", "verdict"),
        *("tail, after tau", "balanced, raw", "tail, raw"),
        *("SAM minus base, after tau", "chosen with 20 images", "chosen and evaluated as trained"),
    ]
    return markdown_table(header, rows)


def _at_equal_rate(setups: Mapping[str, Any]) -> str:
    """Return a table of SAM minus SGD at the same late learning rate, where this SGD is trained."""
    columns = [
        *(("tau", score) for score in ("balanced", "tail", "worst_class")),
        *(("raw", score) for score in ("balanced", "tail")),
    ]
    rows = []
    for name, table in setups.items():
        found = table["at equal rate"]
        if found is not None:
            gaps = [str(stored_difference(found[kind][score])) for kind, score in columns]
            rows.append([name, str(table["seeds"]), found["sgd"], found["sam"], *gaps])
    header = [
        *("setup", "seeds", "SGD", "SAM", "SAM minus SGD, balanced, after tau", "tail, after tau"),
        *("worst class, after tau", "balanced, raw", "tail, raw"),
    ]
    return markdown_table(header, rows) if rows else ""


def _by_reported_seeds(setups: Mapping[str, Any]) -> str:
    """Return a table of SAM minus SGD after a choice by validation images of the reported seeds."""
    rows = []
    for name, table in setups.items():
        found = table["reported seeds"]
        if found is not None:
            arms = [f"{found[key]} (of {found['candidates'][key]})" for key in ("sgd", "sam")]
            rows.append([name, str(table["seeds"]), *arms, str(stored_difference(found))])
    header = ["setup", "seeds", "SGD", "SAM", "SAM minus SGD, balanced, after tau"]
    return markdown_table(header, rows) if rows else ""


def _all_arms(setups: Mapping[str, Any]) -> str:
    """Return tables of all arms of every complete setup."""
    parts = []
    for name, table in setups.items():
        rows = [
            _arm_row(arm, entry, table["minus the chosen SGD"]["tau"].get(arm))
            for arm, entry in table["arms"].items()
        ]
        header = [
            *(f"{name}, {table['seeds']} seeds", "gradients", "balanced, raw", "balanced, tau"),
            *("head, tau", "mid, tau", "tail, raw", "tail, tau", "worst class, tau", "NLL, tau"),
            *("ECE, tau", "training accuracy", "training loss", "balanced, tau, minus SGD"),
        ]
        parts.append(markdown_table(header, rows))
    return "\n".join(parts)


def _arm_row(arm: str, entry: Mapping[str, Any], gap: Mapping[str, Any] | None) -> list[str]:
    def cell(kind: str, score: str, digits: int = 1) -> str:
        mean, deviation = entry[kind][score]
        return f"{mean:.{digits}f} +- {deviation:.{digits}f}"

    return [
        arm,
        f"{entry['gradients']:.0f}",
        cell("raw", "balanced"),
        *(cell("tau", score) for score in ("balanced", "head", "mid")),
        cell("raw", "tail"),
        *(cell("tau", score) for score in ("tail", "worst_class")),
        cell("tau", "nll", 2),
        cell("tau", "ece"),
        cell("clean training", "accuracy"),
        cell("clean training", "nll", 3),
        "" if gap is None else str(stored_difference(gap["balanced"])),
    ]


def _curvature(setups: Mapping[str, Any]) -> str:
    """Return tables of the curvature of every setup that was measured."""
    measured = {name: table["curvature"] for name, table in setups.items() if table["curvature"]}
    return "\n".join(
        table
        for name, found in measured.items()
        for table in (_curvature_places(name, found), _curvature_changes(name, found))
    )


def _curvature_places(name: str, found: Mapping[str, Any]) -> str:
    """Return a table of medians for head and tail classes, and of how often each condition holds."""
    rows = []
    for group, place in itertools.product(("head", "tail"), PLACES):
        medians, counts = found["medians"][group][place], found["negative curvature"][group][place]
        shares = [f"{counts[key]} of {counts['of']}" for key in counts if key != "of"]
        rows.append([f"{group}, {place}", *(f"{value:.3g}" for value in medians.values()), *shares])
    conditions = [key for key in counts if key != "of"]
    return markdown_table([name, *(f"{key}, median" for key in medians), *conditions], rows)


def _curvature_changes(name: str, found: Mapping[str, Any]) -> str:
    """Return a table of late SAM minus late SGD, and of the correlation with tail accuracy."""
    rows = []
    for what in found["sam minus sgd"]["tail"]:
        entries = [found["sam minus sgd"][group][what] for group in ("tail", "head")]
        rows.append(
            [what, *(_interval(e["mean"], *stored_difference(e).interval) for e in entries)]
        )
    for kind, entry in found["correlation with the change of tail accuracy"].items():
        what = f"correlation of log lambda_max with tail accuracy, {kind}"
        rows.append([what, _interval(entry["r"], entry["low"], entry["high"]), ""])
    return markdown_table([f"{name}: SAM minus SGD, mean", "tail classes", "head classes"], rows)


def _interval(mean: float, low: float, high: float) -> str:
    return f"{mean:+.2f} [{low:.2f}, {high:.2f}]"
