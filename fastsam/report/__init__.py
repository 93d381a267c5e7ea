"""Runs as tables, figures and one self-contained page."""

from fastsam.report.collect import Run, Runs, read_runs
from fastsam.report.comparison import Arm, PairedComparison, PairedPanel
from fastsam.report.content import write_tables
from fastsam.report.groups import Group, by_settings
from fastsam.report.page import render, write_page, write_report
from fastsam.report.printed import write_figures
from fastsam.report.tables import (
    accuracy_table,
    class_table,
    confusion_table,
    score_table,
    spectrum_table,
)
from fastsam.report.text_table import TextTable

__all__ = [
    "Arm",
    "Group",
    "PairedComparison",
    "PairedPanel",
    "Run",
    "Runs",
    "TextTable",
    "accuracy_table",
    "by_settings",
    "class_table",
    "confusion_table",
    "read_runs",
    "render",
    "score_table",
    "spectrum_table",
    "write_figures",
    "write_page",
    "write_report",
    "write_tables",
]
