"""Runs as tables, figures and one self-contained page."""

from fastsam.report.comparison import Arm, PairedComparison, PairedPanel
from fastsam.report.page import Runs, read_runs, render, write_report
from fastsam.report.tables import (
    TextTable,
    accuracy_table,
    class_table,
    confusion_table,
    score_table,
    settings_table,
    spectrum_table,
)

__all__ = [
    "Arm",
    "PairedComparison",
    "PairedPanel",
    "Runs",
    "TextTable",
    "accuracy_table",
    "class_table",
    "confusion_table",
    "read_runs",
    "render",
    "score_table",
    "settings_table",
    "spectrum_table",
    "write_report",
]
