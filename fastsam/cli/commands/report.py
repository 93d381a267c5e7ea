"""fastsam report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional


@dataclass(frozen=True)
class Report:
    """Write one self-contained report.html about all runs in a folder."""

    folder: Positional[Path]
    """Folder with runs of `fastsam train` in it or below it."""

    def run(self) -> None:
        """Write the page, replacing an earlier one."""
        from fastsam.report import write_report

        print(f"report: {write_report(self.folder)}")


def command(arguments: Sequence[str]) -> type[Report]:
    """The command, which has the same options for all arguments."""
    return Report
