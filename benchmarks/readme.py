"""Writes the README's tables from the results: numbers there are never typed."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS

README = Path(__file__).parents[1] / "README.md"


@dataclass(frozen=True)
class Readme:
    """Rewrites the tables of README.md from benchmarks/results/."""

    def run(self) -> None:
        README.write_text(rendered(README.read_text()))


def rendered(text: str) -> str:
    """``text`` with every marked section replaced by what the results say now."""
    for name, table in (("sam-step", sam_step()),):
        pattern = rf"(<!-- results:{name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda match: match[1] + table + match[2], text, flags=re.DOTALL)  # noqa: B023
    return text


def sam_step() -> str:
    """One table per device that has results."""
    parts = [_sam_step_table(path) for path in sorted(RESULTS.glob("sam_step-*.json"))]
    return "\n".join(parts)


def _sam_step_table(path: Path) -> str:
    results = json.loads(path.read_text())
    environment = results["environment"]
    machine = environment.get("gpu", {}).get("name") or (
        f"{environment['processor']}, {environment['threads']} threads"
    )
    shown = {name: case for name, case in results["cases"].items() if _shown(name)}
    peers = list(next(iter(shown.values()))["peers"])
    head = " | ".join(_title(name, case) for name, case in shown.items())
    lines = [
        f"On {machine}, torch {environment['torch']} (`{environment['command']}`):",
        "",
        f"| time per step (ratio to fastsam) | {head} |",
        "| --- |" + " --- |" * len(shown),
    ]
    for peer in peers:
        cells = []
        for case in shown.values():
            row = case["peers"][peer]
            cells.append(f"{_time(row['median'])} ({row['ratio']:.1f}x)")
        lines.append(f"| {peer} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _shown(name: str) -> bool:
    return name in ("resnet32", "resnet50", "vit-b16", "one-25M")


def _title(name: str, case: dict[str, Any]) -> str:
    return f"{name}: {case['tensors']} tensors, {case['parameters'] / 1e6:.3g} M"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds < 0.1 else f"{seconds:.2f} s"
