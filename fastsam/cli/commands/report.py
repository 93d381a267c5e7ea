"""The command ``fastsam report``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Report:
    """Write one self-contained, interactive report.html about all runs in a folder.

    It shows accuracy overall and by class, confusion, calibration, training curves, Hessian spectra, paired
    differences with a verdict, and the settings in which runs differ. It works offline.
    """

    folder: Positional[Path]
    """Folder that is searched recursively for runs of `fastsam train`. The page is written there."""
    figures: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """Folder for the figures as PDF files, for print."""
    tables: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """Folder for the tables as CSV, Markdown and LaTeX (booktabs) files."""

    def run(self) -> None:
        """Write the page, replacing an earlier one, and the requested figures and tables."""
        from fastsam.report import read_runs, write_figures, write_page, write_tables

        runs = read_runs(self.folder)
        print(f"report: {write_page(runs, self.folder)}")
        if self.figures is not None:
            print(f"figures: {len(write_figures(runs, self.figures))} files in {self.figures}")
        if self.tables is not None:
            print(f"tables: {len(write_tables(runs, self.tables))} files in {self.tables}")


def command(arguments: Sequence[str]) -> type[Report]:
    """Return the command; its options do not depend on ``arguments``."""
    return Report
