"""The demo's comparison and its figure, for the README."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.machine import save
from fastsam.demo import run_demo
from fastsam.files import write_bytes
from fastsam.report import PairedComparison
from fastsam.report.figures import comparison_png

FIGURE = Path(__file__).parents[1] / "docs" / "demo.png"


@dataclass(frozen=True)
class DemoRuns:
    """Run the demo. With --save, write its comparison to benchmarks/results/ and its figure to docs/."""

    save: bool = False
    """Replace the committed comparison and figure."""

    def run(self) -> None:
        """Run the demo in a temporary folder."""
        with tempfile.TemporaryDirectory() as folder:
            run_demo(Path(folder) / "demo")
            comparison = PairedComparison.load(Path(folder) / "demo" / PairedComparison.FILE)
        if self.save:
            save("demo", asdict(comparison))
            write_bytes(FIGURE, comparison_png(comparison))
