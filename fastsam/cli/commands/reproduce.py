"""fastsam reproduce."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from fastsam.cli.options import every_setting, given, with_settings
from fastsam.cli.output import show
from fastsam.distributed import torchrun_world
from fastsam.files import write_text
from fastsam.longtail.errors import unknown
from fastsam.longtail.landscape import ClassSpectrum
from fastsam.longtail.published import FIGURES, MEASURES, TABLES, Measured, PublishedTable
from fastsam.longtail.reproduce import Panel, Row, reproduce_figure, reproduce_table


@dataclass(frozen=True)
class ReproduceCommand:
    """Train what a table or a figure of the paper compares, on any data set, beside its numbers.

    Settings that are given replace those of every recipe; numbers are then no longer compared.
    """

    name: Positional[str]
    data: str = "cifar10-lt"
    out: Annotated[Path, arg(help="folder of the runs; finished ones are not trained again")] = (
        Path("runs/reproduce")
    )
    seeds: Annotated[int, arg(help="number of seeds behind a table")] = 3
    steps: Annotated[int, arg(help="Lanczos steps of a spectrum")] = 80
    probes: Annotated[int, arg(help="random start vectors of a spectrum")] = 1
    draws: Annotated[
        str, arg(help="augmentation under a spectrum: none, K fixed draws, or redrawn as published")
    ] = "none"
    quiet: Annotated[bool, arg(help="no progress bars")] = False

    def run(self) -> None:
        """Run it; a table's rows are printed as they are done, a figure is written."""
        if self.name in TABLES:
            self._table()
        elif self.name in FIGURES:
            self._figure()
        else:
            raise unknown("table or figure", self.name, (*TABLES, *FIGURES))

    def _table(self) -> None:
        from fastsam.report.figures import curves

        table = TABLES[self.name]
        rows: list[Row] = []
        overrides = given(self)
        with torchrun_world(overrides.get("device", "cpu")) as world:
            for row in reproduce_table(
                self.name,
                self.data,
                self.out,
                seeds=self.seeds,
                world=world,
                progress=not self.quiet,
                **overrides,
            ):
                rows.append(row)
                if world.rank == 0:
                    if len(rows) == 1:
                        print(_heading(self.name, self.data, self.seeds))
                    print(_lines(row, _width(table)), flush=True)
        if world.rank:
            return
        if table.note:
            print(f"note: {table.note}")
        if self.name.startswith("figure"):
            series = {
                measure: [
                    (row.variant.settings["rho"][0], row.measured[measure][0]) for row in rows
                ]
                for measure in ("all", "tail")
            }
            title = f"{self.data}, {table.title}"
            self._write(curves(series, x="rho", y="test accuracy, %", title=title))

    def _figure(self) -> None:
        from fastsam.report import spectrum_table
        from fastsam.report.figures import curves, spectra_panels

        figure = FIGURES[self.name]
        panels = list(
            reproduce_figure(
                self.name,
                self.data,
                self.out,
                augment=self.draws,
                steps=self.steps,
                probes=self.probes,
                progress=not self.quiet,
                **given(self),
            )
        )
        print(f"{self.name}: {figure.title}, {self.data}")
        for panel in panels:
            show(f"{panel.variant.name}: {panel.item.subject.title}")
        show(spectrum_table([panel.item for panel in panels]))
        for panel in panels:
            if panel.published is not None:
                low, high = panel.published
                show(f"published, {panel.variant.name}, {panel.item.subject.whose}: {low} {high}")
        if figure.note:
            print(f"note: {figure.note}")
        title = f"{self.data}, {figure.title}, loss {figure.loss}, augmentation {self.draws}"
        if figure.epochs:
            series = _series(panels, lambda item: (item.subject.epoch, item.spectrum.ratio))
            svg = curves(series, x="epoch", y="|lambda_min / lambda_max|", title=title)
        elif all("rho" in panel.variant.settings for panel in panels):
            points = [
                (panel.variant.settings["rho"][0], panel.item.spectrum.lambda_min)
                for panel in panels
            ]
            svg = curves({"lambda_min": points}, x="rho", y="lambda_min", title=title)
        else:
            svg = spectra_panels([panel.item for panel in panels])
        self._write(svg)

    def _write(self, svg: str) -> None:
        path = self.out / f"{self.name}.svg"
        write_text(path, svg)
        print(f"figure: {path}")


def _series(
    panels: Sequence[Panel], point: Callable[[ClassSpectrum], tuple[float, float]]
) -> dict[str, list[tuple[float, float]]]:
    """Points of each run and class."""
    series: dict[str, list[tuple[float, float]]] = {}
    for panel in panels:
        name = f"{panel.variant.name}, {panel.item.subject.whose}"
        series.setdefault(name, []).append(point(panel.item))
    return series


def _heading(name: str, data: str, seeds: int) -> str:
    """The title of a table and of its columns."""
    over = "one seed" if seeds == 1 else f"mean +- standard deviation over {seeds} seeds"
    table = TABLES[name]
    columns = "".join(f"  {measure:>13}" for measure in MEASURES)
    return (
        f"{name}: {table.title}, {data}\n"
        f"test accuracy in %, last epoch, {over}\n"
        f"{'':{_width(table)}}{columns}"
    )


def _width(table: PublishedTable) -> int:
    """Width of the first column."""
    return max(len(variant.name) for variant in table.rows)


def _lines(row: Row, width: int) -> str:
    """A row of a table, and below it the published numbers if there are any."""
    lines = [f"{row.variant.name:{width}}{_cells(row.measured)}"]
    if row.published:
        lines.append(f"{'  published':{width}}{_cells(row.published)}")
    return "\n".join(lines)


def _cells(numbers: Mapping[str, Measured]) -> str:
    return "".join(f"  {_cell(numbers.get(measure)):>13}" for measure in MEASURES)


def _cell(number: Measured | None) -> str:
    if number is None or math.isnan(number[0]):
        return "-"
    mean, deviation = number
    return f"{mean:.1f}" if deviation is None else f"{mean:.1f} +- {deviation:.1f}"


def command(arguments: Sequence[str]) -> Any:
    """The command with an option for every setting: rows may be of any method and optimizer."""
    settings = every_setting(plugins="--help" in arguments or "-h" in arguments)
    del settings["seed"]
    made = with_settings(ReproduceCommand, settings)
    made.__doc__ = (
        f"Train what a table ({', '.join(TABLES)}) or a figure of spectra ({', '.join(FIGURES)}) of "
        "the paper compares, on any data set, and print it beside the published numbers. Settings "
        "that are given replace those of every recipe; published numbers are then left out."
    )
    return made
