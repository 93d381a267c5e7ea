"""The command ``fastsam report``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional


@dataclass(frozen=True)
class Report:
    """Write a self-contained report.html about all runs in a folder."""

    folder: Positional[Path]
    """Folder that is searched recursively for runs of `fastsam train`. The report is written there."""

    def run(self) -> None:
        """Write the report, replacing an earlier one."""
        from fastsam.report import write_report

        print(f"report: {write_report(self.folder)}")


def command(arguments: Sequence[str]) -> type[Report]:
    """Return the command; its options do not depend on ``arguments``."""
    return Report
