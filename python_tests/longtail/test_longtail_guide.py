"""The pages on long-tailed classes list every part and option, and no option that does not exist."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from fastsam import cli
from fastsam.longtail.data import DATASETS
from fastsam.longtail.methods import LOSSES, RULES, Method
from fastsam.longtail.optimizers import OPTIMIZERS
from fastsam.longtail.published import FIGURES, TABLES

FOLDER = Path(__file__).parents[2] / "docs" / "longtail"
TEXT = re.sub(
    r"<!-- results:.*?<!-- end -->",
    "",
    "\n".join(path.read_text("utf-8") for path in sorted(FOLDER.glob("*.md"))),
    flags=re.DOTALL,
)


def test_everything_there_is_has_its_line() -> None:
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    quoted = re.findall(r"`([^`]+)`", prose)
    words = {word for text in quoted for word in re.split(r"[\s,]+", text)}
    for parts in (DATASETS, OPTIMIZERS, RULES):
        # Without those that a page of the guide has registered in this process.
        own = {name for name in parts if parts[name].package == "fastsam"}
        assert own
        assert own - {"none"} <= words
    methods = (FOLDER / "methods.md").read_text("utf-8")
    methods = methods[: methods.index("| rule | effect |")]
    rows = re.findall(r"^\|([^|]+)\|", methods, flags=re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`([a-z0-9]+)`", row)}
    assert {Method.parse(row.method).loss for t in TABLES.values() for row in t.rows} <= listed
    assert listed <= set(LOSSES), "the guide names a loss that does not exist"
    assert "fastsam recipes --names" in TEXT  # lists all parts, including those of plug-ins
    assert {*TABLES, *FIGURES} - {"figure2", "figure5", "figure6", "figure7"} <= words


def test_options_that_are_named_exist() -> None:
    options = {
        f"--{item.name.replace('_', '-')}"
        for command in (
            cli.parse(["train"]),
            cli.parse(["reproduce", "table1"]),
            cli.parse(["evaluate", "RUN"]),
            cli.parse(["sweep"]),
            cli.parse(["tune"]),
        )
        for item in fields(command)
    }
    options |= {f"--{item.name}" for item in fields(cli.parse(["train"]).tracking)}
    options |= {f"--{item.name}" for item in fields(cli.parse(["sweep"]).execution)}
    others = {
        "--root",
        "--decode",
        "--names",
        "--report",
        "--classes",
        "--steps",
        "--augment",
        "--nproc-per-node",
        "--no-python",
        "--dtype",
        "--max-restarts",
        "--shutdown-timeout",
        "--signals-to-handle",
        "--debug",
        "--help",
        "--from",
        "--force",
        *("--top", "--format"),
        *("--array", "--gpus", "--time", "--signal", "--requeue"),
    }
    named = set(re.findall(r"--[a-z][a-z0-9-]*", TEXT)) - {"--paco-"}
    assert named - others <= options
