"""The command ``fastsam reproduce``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional, arg

from fastsam.cli.execution import ExecutionOptions
from fastsam.cli.options import every_setting, given, with_settings
from fastsam.cli.output import show
from fastsam.distributed import TIMEOUT, torchrun_world
from fastsam.files import write_text
from fastsam.longtail.errors import unknown
from fastsam.longtail.landscape import ClassSpectrum
from fastsam.longtail.measured import Measured
from fastsam.longtail.published import FIGURES, MEASURES, TABLES, PublishedTable
from fastsam.longtail.reproduce import Panel, Row, reproduce_figure, reproduce_table
from fastsam.longtail.sweeps import Shard
from fastsam.stopping import StopRequest, stop_signals


@dataclass(frozen=True)
class ReproduceCommand:
    """Train the runs of a table or figure of Rangwani et al. on any data set, and compare with its numbers.

    Settings passed here override the recipe of every run. If one of them affects results, published numbers
    are not shown. Published eigenvalues are shown only for ``cifar10-lt`` with ``spectrum_augment``
    ``redrawn``.
    """

    name: Annotated[Positional[str], arg(help="table or figure", metavar="NAME")]
    data: Annotated[str, arg(help="data set", metavar="NAME")] = "cifar10-lt"
    out: Annotated[
        Path,
        arg(help="folder for the runs; finished runs in it are not trained again", metavar="DIR"),
    ] = Path("runs/reproduce")
    seeds: Annotated[int, arg(help="number of seeds of each row of a table")] = 3
    steps: Annotated[int, arg(help="Lanczos steps of a spectrum")] = 80
    probes: Annotated[int, arg(help="random start vectors of a spectrum")] = 1
    spectrum_augment: Annotated[
        str,
        arg(
            help="augmentation of the images of a spectrum: none (clean images), K (K fixed augmented "
            "copies of each image), or redrawn (a new augmentation at every product, as published; not "
            "a valid operator)",
            metavar="none|K|redrawn",
        ),
    ] = "none"
    execution: Annotated[ExecutionOptions, arg(name="execution"), OmitArgPrefixes] = (
        ExecutionOptions()  # noqa: RUF009 (frozen)
    )
    quiet: Annotated[bool, arg(help="hide progress bars")] = False

    def run(self) -> None:
        """Reproduce a table, printing each row when it is done, or a figure, written as SVG."""
        if self.name not in {*TABLES, *FIGURES}:
            raise unknown("table or figure", self.name, (*TABLES, *FIGURES))
        with stop_signals() as stop:
            if self.name in TABLES:
                self._table(stop)
            else:
                self._figure(stop)

    def _table(self, stop: StopRequest) -> None:
        from fastsam.report.figures import curves

        table = TABLES[self.name]
        rows: list[Row] = []
        overrides = given(self)
        execution = self.execution.execution()
        with torchrun_world(
            overrides.get("device", "cpu"),
            timeout=overrides.get("rank_timeout", TIMEOUT),
            errors=self.out,
            stop=stop,
        ) as world:
            for row in reproduce_table(
                self.name,
                self.data,
                self.out,
                seeds=self.seeds,
                execution=execution,
                world=world,
                stop=stop,
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
        if execution.shard.count > 1:
            _show_part(execution.shard, len(rows), len(table.rows), "rows")
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

    def _figure(self, stop: StopRequest) -> None:
        from fastsam.report import spectrum_table
        from fastsam.report.figures import curves, spectra_panels

        figure = FIGURES[self.name]
        execution = self.execution.execution()
        panels = list(
            reproduce_figure(
                self.name,
                self.data,
                self.out,
                augment=self.spectrum_augment,
                steps=self.steps,
                probes=self.probes,
                execution=execution,
                stop=stop,
                progress=not self.quiet,
                **given(self),
            )
        )
        if execution.shard.count > 1:
            _show_part(execution.shard, 0, len(figure.runs), "spectra of runs")
            return
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
        augmentation = f"augmentation {self.spectrum_augment}"
        title = f"{self.data}, {figure.title}, loss {figure.loss}, {augmentation}"
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


def _show_part(shard: Shard, complete: int, total: int, what: str) -> None:
    """Print what is left to do after a part of the runs."""
    print(
        f"part {shard.index} of {shard.count} is done, {complete} of {total} {what} are complete. When all "
        "parts are done, the same command without --shard prints the results"
    )


def _series(
    panels: Sequence[Panel], point: Callable[[ClassSpectrum], tuple[float, float]]
) -> dict[str, list[tuple[float, float]]]:
    """Collect the points of each run and class."""
    series: dict[str, list[tuple[float, float]]] = {}
    for panel in panels:
        name = f"{panel.variant.name}, {panel.item.subject.whose}"
        series.setdefault(name, []).append(point(panel.item))
    return series


def _heading(name: str, data: str, seeds: int) -> str:
    """Return the title of a table and the titles of its columns."""
    over = "one seed" if seeds == 1 else f"mean +- standard deviation over {seeds} seeds"
    table = TABLES[name]
    columns = "".join(f"  {measure:>13}" for measure in MEASURES)
    return (
        f"{name}: {table.title}, {data}\n"
        f"test accuracy in %, last epoch, {over}\n"
        f"{'':{_width(table)}}{columns}"
    )


def _width(table: PublishedTable) -> int:
    """Return the width of the first column in characters."""
    return max(len(variant.name) for variant in table.rows)


def _lines(row: Row, width: int) -> str:
    """Format a row of a table, followed by the published numbers if there are any."""
    lines = [f"{row.variant.name:{width}}{_cells(row.measured)}"]
    if row.published:
        lines.append(f"{'  published':{width}}{_cells(row.published)}")
    return "\n".join(lines)


def _cells(numbers: Mapping[str, Measured]) -> str:
    return "".join(f"  {_cell(numbers.get(measure)):>13}" for measure in MEASURES)


def _cell(number: Measured | None) -> str:
    return "-" if number is None else str(number) or "-"


def command(arguments: Sequence[str]) -> Any:
    """Return the command with an option for every setting, because rows differ in method and optimizer."""
    settings = every_setting(plugins="--help" in arguments or "-h" in arguments)
    del settings["seed"]
    made = with_settings(ReproduceCommand, settings)
    made.__doc__ = (
        "Train the runs behind a table or figure of Rangwani et al. (arXiv 2212.13827), on any data set, and "
        f"print the results with the published numbers. Accuracies: {', '.join(TABLES)}. Hessian spectra: "
        f"{', '.join(FIGURES)}. The recipe of a run overrides the defaults below. Settings passed here "
        "override it. If you change one that affects results, such as --lr or --epochs, the published "
        "numbers are not shown. They are still shown if you change only settings such as --device and "
        "--data-root. Published eigenvalues are shown only with --data cifar10-lt and "
        "--spectrum-augment redrawn, as in the paper."
    )
    return made
