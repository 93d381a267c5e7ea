"""The command line. Nothing else parses arguments; every command is a dataclass with a ``run``."""

from __future__ import annotations

import importlib.metadata
import os
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import Field, dataclass, fields, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

try:
    import tyro
    from tyro.conf import Positional, arg, subcommand
    from tyro.constructors import PrimitiveConstructorSpec
except ImportError as error:
    raise SystemExit(
        "fastsam: error: the command line needs more packages: pip install 'fastsam[longtail]'"
    ) from error

import torch

import fastsam
from fastsam.files import locked, write_text
from fastsam.longtail.checkpoint import Checkpoint
from fastsam.longtail.config import OPTIMIZERS, TrainConfig
from fastsam.longtail.data import DATASETS, DataOptions, ImbalanceKind, load_dataset
from fastsam.longtail.data.check import check_dataset
from fastsam.longtail.data.lists import convert_inaturalist
from fastsam.longtail.data.pixels import Exif
from fastsam.longtail.errors import LongTailError, UsageError, unknown
from fastsam.longtail.landscape import ClassSpectrum, landscape
from fastsam.longtail.methods import LOSSES, RULES
from fastsam.longtail.published import FIGURES, MEASURES, TABLES, combinations
from fastsam.longtail.ranks import ranks_of_torchrun
from fastsam.longtail.recipes import Recipe, default_imbalance, recipe
from fastsam.longtail.reproduce import Panel, Row, reproduce_figure, reproduce_table
from fastsam.longtail.results import Result, RunFolder, check_free
from fastsam.longtail.runtime import chosen_device
from fastsam.longtail.tracking import TRACKERS, check_tracker, tracker
from fastsam.longtail.trainer import Trainer, load_configured
from fastsam.text import one_line, printable

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

_OPTIONAL_PACKAGES = {
    "scikit-learn": "digits-lt",
    "torchvision": "CIFAR, image folders, ImageNet networks",
    "matplotlib": "figures and reports",
    "torchmetrics": "calibration error",
    "tqdm": "progress bars",
    "timm": "its networks",
}


@dataclass(frozen=True)
class Demo:
    """Train with SGD and with SAM on handwritten digits, compare, write report.html.

    Takes a minute or two on one CPU core and downloads nothing.
    """

    out: Path = Path("demo")
    """Folder for runs, spectra and report."""
    seed: int = 0
    """Seed of the training."""
    epochs: int | None = None
    """Epochs of each training; by default those of the recipe."""
    overwrite: bool = False
    """Replace an earlier demo."""
    quiet: bool = False
    """No progress bars."""

    def run(self) -> None:
        """Run the demo."""
        from fastsam.demo import run_demo

        run_demo(
            self.out,
            seed=self.seed,
            epochs=self.epochs,
            overwrite=self.overwrite,
            progress=not self.quiet,
        )


_FIRST_RUN = {"data": "digits-lt", "method": "ce-drw", "optimizer": "sam"}
"""What `fastsam train` trains if nothing is named."""


def _named(name: str) -> Any:
    """How one of them is shown in the help."""
    item = next(item for item in fields(TrainConfig) if item.name == name)
    default = f"(default: {_FIRST_RUN[name]})"
    return arg(help=item.metadata["help"], metavar="NAME", help_behavior_hint=default)


@dataclass(frozen=True)
class TrainCommand:
    """Train one network and judge it on the test set after the last epoch.

    Settings that are not given come from the published recipe of data, method and optimizer; of a
    run that is resumed, from the run itself.
    """

    data: Annotated[str | None, _named("data")] = None
    method: Annotated[str | None, _named("method")] = None
    optimizer: Annotated[str | None, _named("optimizer")] = None
    out: Annotated[Path | None, arg(help="folder for checkpoint and results")] = None
    resume: Annotated[bool, arg(help="go on with the run in --out, with its settings")] = False
    overwrite: Annotated[bool, arg(help="replace the run in --out")] = False
    keep: Annotated[
        tuple[int, ...],
        arg(help="epochs whose checkpoint is kept as epoch-K.pt", metavar="INT ..."),
    ] = ()
    quiet: Annotated[bool, arg(help="no progress bar")] = False
    track: Annotated[str, arg(help=f"send epochs to: {', '.join(TRACKERS)}")] = "none"

    def run(self) -> None:
        """Train, print the accuracies, write the folder."""
        if self.out is None and (self.resume or self.overwrite or self.keep):
            raise UsageError("--resume, --overwrite and --keep need --out DIR")
        check_tracker(self.track, out=self.out)
        config, sources = self._settings()
        with ranks_of_torchrun(config.device) as ranks:
            trainer = Trainer(
                config,
                sources=sources,
                out=self.out,
                resume=self.resume,
                overwrite=self.overwrite,
                keep=self.keep,
                ranks=ranks,
                progress=not self.quiet,
            )
            writes = ranks.rank == 0
            if writes and self.out is None:
                print("Results are not saved. Pass --out DIR to keep them.")
            if writes and config.device == "cpu" and torch.cuda.is_available():
                print("Training on CPU although a GPU is available; pass --device cuda.")
            if writes:
                for note in trainer.data.notes:
                    print(note)
                print(f"training set, SHA-256: {trainer.data.subset_hash}", flush=True)
                trainer.on_result = self._show
            track = self.track if writes else "none"
            with tracker(track, config=trainer.config, out=self.out) as trainer.on_epoch:
                trainer.fit()
        if writes and self.out is not None:
            print(f"results: {self.out}")

    def _settings(self) -> tuple[TrainConfig, dict[str, str]]:
        """Settings, and where each comes from."""
        named = {
            name: getattr(self, name) for name in _FIRST_RUN if getattr(self, name) is not None
        }
        if self.resume and self.out is not None:
            found = RunFolder(self.out).checkpoints()
            stored = Checkpoint.load(found[0] if found else self.out)
            return replace(stored.config, **named, **_given(self)), stored.sources
        chosen = recipe(**{**_FIRST_RUN, **named}, **_given(self))
        return chosen.config(), chosen.sources

    def _show(self, result: Result) -> None:
        from fastsam.report import accuracy_table

        _show(accuracy_table([result]))
        skipped = sum(record.skipped for record in result.history)
        if skipped:
            print(f"skipped {skipped} updates whose gradients were infinite or NaN")
        if result.unseen is not None:
            print(f"second test set, images of other kinds: {result.unseen.accuracy:.1f} %")
        if result.unreadable:
            first = next(iter(result.unreadable))
            _show(
                f"skipped {len(result.unreadable)} images that cannot be read, the first is {first}"
            )


def _setting(item: Field[Any], hint: Any) -> Any:
    """How the option of a setting is shown in the help."""
    kinds = {bool: "[True|False]", int: "INT", float: "FLOAT", str: "NAME"}
    used = [kind for kind in (hint, *get_args(hint)) for kind in (kind, *get_args(kind))]
    metavar = next((text for kind, text in kinds.items() if kind in used), None)
    many = any(get_origin(kind) is tuple for kind in used)
    return arg(
        help=item.metadata["help"],
        metavar=f"{metavar} ..." if many else metavar,
        help_behavior_hint="",
    )


def _switched(values: list[str]) -> bool:
    """The value of a setting that is on or off: on if nothing follows its name."""
    if len(values) > 1:
        raise ValueError("it takes True or False, or nothing for True")
    return values != ["False"]


_SWITCH = PrimitiveConstructorSpec(
    nargs=(0, 1),
    metavar="[True|False]",
    choices=("True", "False"),
    instance_from_str=_switched,
    is_instance=lambda value: isinstance(value, bool),
    str_from_instance=lambda value: [str(value)],
)

_SETTINGS = [
    item for item in fields(TrainConfig) if item.name not in ("data", "method", "optimizer")
]


def _with_settings(base: type[Any], *, leave_out: Collection[str] = ()) -> Any:
    """``base`` with an option for every setting of a run, so that each is written only once."""
    hints = get_type_hints(TrainConfig)
    options = []
    for item in _SETTINGS:
        if item.name not in leave_out:
            hint = hints[item.name] | None
            if hint == bool | None:
                hint = Annotated[hint, _SWITCH]
            options.append((item.name, Annotated[hint, _setting(item, hints[item.name])], None))
    command = make_dataclass(base.__name__, options, bases=(base,), frozen=True)
    command.__doc__ = base.__doc__
    return command


def _given(command: object) -> dict[str, Any]:
    """The settings that the command line names."""
    values = {item.name: getattr(command, item.name, None) for item in _SETTINGS}
    return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class SpectrumCommand:
    """Hessian spectrum of the loss of single classes at a trained network's weights."""

    checkpoint: Positional[Path]
    """checkpoint.pt, or the folder of the run."""
    classes: tuple[int | Literal["all"], ...] = (0, 9)
    """Labels of the classes; `all` for the images of every class together."""
    split: str = "train"
    """Whose images: train, validation or test; unseen for glyphs in other faces."""
    loss: str = "ce"
    """Cross-entropy without weights (ce), or the loss of the last epoch (as-trained)."""
    augment: str = "none"
    """Plain images (none), K fixed draws of each (a number), or the mistake to draw anew at every
    product (redrawn)."""
    steps: int = 80
    """Lanczos steps."""
    probes: int = 1
    """Random start vectors."""
    seed: int = 0
    """Seed of probes and draws."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of weights, images and products; a class that is fitted perfectly needs float64."""
    device: str = "cpu"
    """Device: cpu, cuda, cuda:1, ..."""
    data_root: str | None = None
    """Folder with the data, if it is not where it was at the training."""
    out: Path | None = None
    """Folder for the spectra as JSON and a figure of them."""
    overwrite: bool = False
    """The folder may hold files already."""
    quiet: bool = False
    """No progress bar."""

    def run(self) -> None:
        """Compute, print and, if asked, write the spectra."""
        if self.out is not None:
            check_free(self.out, allowed=self.overwrite, flags="--overwrite")
        with nullcontext() if self.out is None else locked(self.out):
            self._compute()

    def _compute(self) -> None:
        from fastsam.report import spectrum_table
        from fastsam.report.figures import spectra_panels

        device = chosen_device(self.device)
        checkpoint = Checkpoint.load(self.checkpoint)
        config = checkpoint.config
        if self.data_root is not None:
            config = replace(config, data_root=self.data_root)
        spectra = landscape(
            checkpoint.build_model().to(device),
            load_configured(config, progress=not self.quiet),
            checkpoint,
            self.classes,
            split=self.split,
            loss=self.loss,
            augment=self.augment,
            steps=self.steps,
            probes=self.probes,
            seed=self.seed,
            dtype=getattr(torch, self.dtype),
            progress=not self.quiet,
        )
        for item in spectra:
            _show(item.subject.title)
        _show(spectrum_table(spectra))
        if self.out is not None:
            for item in spectra:
                item.save(self.out)
            write_text(self.out / "spectra.svg", spectra_panels(spectra))
            print(f"spectra: {self.out}")


@dataclass(frozen=True)
class Report:
    """Write one self-contained report.html about all runs in a folder."""

    folder: Positional[Path]
    """Folder with runs of `fastsam train` in it or below it."""

    def run(self) -> None:
        """Write the page, replacing an earlier one."""
        from fastsam.report import write_report

        print(f"report: {write_report(self.folder)}")


@dataclass(frozen=True)
class Doctor:
    """Show what this installation can do."""

    def run(self) -> None:
        """Print the native build and the optional packages."""
        print(f"fastsam: {fastsam.__version__}")
        print(f"torch: {importlib.metadata.version('torch')}")
        for name, value in fastsam.build_info().items():
            print(f"{name}: {value}")
        for package, purpose in _OPTIONAL_PACKAGES.items():
            try:
                version = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                version = "not installed"
            print(f"{package}: {version} ({purpose})")


@dataclass(frozen=True)
class Recipes:
    """List the recipes of the paper, or show one with the source of every value.

    Any other combination of data, method and optimizer has a recipe as well; --names lists them.
    """

    data: str | None = None
    """Only this data set; with --method and --optimizer one recipe is shown in full."""
    method: str | None = None
    """Only this method."""
    optimizer: str | None = None
    """Only this optimizer."""
    names: bool = False
    """List every data set, loss, rule and optimizer."""

    def run(self) -> None:
        """Print the list, or one recipe."""
        if self.names:
            _print_names()
        elif self.data is None or self.method is None or self.optimizer is None:
            self._list()
        else:
            chosen = recipe(self.data, self.method, self.optimizer)
            rows = tuple(
                (name, _value(entry.value), chosen.sources[name])
                for name, entry in chosen.entries.items()
            )
            print(_table(("setting", "value", "source"), rows))

    def _list(self) -> None:
        asked = (self.data, self.method, self.optimizer)
        listed = {
            key: tables
            for key, tables in combinations().items()
            if all(want in (None, have) for want, have in zip(asked, key, strict=True))
        }
        if not listed:
            raise UsageError(
                f"the paper has no recipe for {' '.join(name for name in asked if name)}; name data, "
                "method and optimizer to see what fastsam takes instead"
            )
        rows = tuple(_summary(recipe(*key), listed[key]) for key in sorted(listed, key=_by_data))
        header = ("data", "method", "optimizer", *_SUMMARY, "in", "other values not known")
        print(_table(header, rows))
        print("? not a published value; show one with --data NAME --method NAME --optimizer NAME")


_SUMMARY = ("model", "epochs", "batch_size", "lr", "weight_decay", "defer_epoch", "rho")


def _by_data(key: tuple[str, str, str]) -> int:
    """Sorts recipes by data set alone."""
    return list(DATASETS).index(key[0])


def _summary(chosen: Recipe, tables: Sequence[str]) -> tuple[str, ...]:
    """The main settings of a recipe, marked where no source states them, and the tables it is of."""
    shown = {name: chosen.entries[name] for name in _SUMMARY if name in chosen.entries}
    guessed = (
        name for name, entry in chosen.entries.items() if not entry.known and name not in shown
    )
    return (
        chosen.data,
        chosen.method,
        chosen.optimizer,
        *(
            _value(shown[name].value) + ("" if shown[name].known else "?") if name in shown else "-"
            for name in _SUMMARY
        ),
        " ".join(tables),
        " ".join(guessed) or "-",
    )


def _value(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _table(header: tuple[str, ...], rows: tuple[tuple[str, ...], ...]) -> str:
    from fastsam.report import TextTable

    return str(TextTable(header, rows))


def _print_names() -> None:
    print(f"data: {', '.join(DATASETS)}")
    print("methods: loss or loss-rule, with")
    for name, text in (*LOSSES.items(), *RULES.items()):
        print(f"  {name}: {text}")
    print("optimizers:")
    for name, text in OPTIMIZERS.items():
        print(f"  {name}: {text}")


@dataclass(frozen=True)
class _DataCommand:
    """What commands about one data set have in common."""

    name: Positional[str]
    """Name of the data set."""
    root: Path = Path("data")
    """Folder with its files."""
    imbalance: float | None = None
    """Imbalance factor of the sets made long-tailed here; by default that of the recipe."""
    subset_seed: int = 0
    """Seed of that selection."""
    exif: Exif = "transpose"
    """EXIF orientation of the user's own images: transpose (turn them by it) or ignore."""
    value_range: tuple[float, float] | None = None
    """Values that become black and white in the user's own images of more than 8 bits."""
    kind: ImbalanceKind = "exp"
    """Shape of the imbalance."""
    download: bool = False
    """Fetch CIFAR if it is not there."""

    @property
    def options(self) -> DataOptions:
        """What is asked of the data set."""
        return DataOptions(
            root=self.root,
            imbalance=self.imbalance or default_imbalance(self.name),
            kind=self.kind,
            subset_seed=self.subset_seed,
            download=self.download,
            exif=self.exif,
            value_range=self.value_range,
        )


@dataclass(frozen=True)
class DataCheck(_DataCommand):
    """Verify the files, labels and counts of a data set."""

    decode: bool = False
    """Also decode every image file."""
    workers: int | None = None
    """Processes that decode; by default as many as in training."""

    def run(self) -> None:
        """Print what was found."""
        options = self.options
        if self.workers is not None:
            if not self.decode:
                raise UsageError("--workers are those of --decode")
            options = replace(options, workers=self.workers)
        for line in check_dataset(self.name, options, decode=self.decode):
            _show(line)


@dataclass(frozen=True)
class DataShow(_DataCommand):
    """Write a contact sheet of each of up to --classes classes, head to tail, and one of them all."""

    out: Path = Path("sheets")
    """Folder for the sheets."""
    split: str = "train"
    """Whose images: train, validation, test or unseen."""
    columns: int = 16
    """Images in a row."""
    rows: int = 8
    """Rows of the sheet of one class."""
    classes: int = 100
    """At most how many classes; of more, so many are taken evenly from head to tail."""
    overwrite: bool = False
    """The folder may hold files already."""

    def run(self) -> None:
        """Write the sheets."""
        from fastsam.longtail.data.sheet import write_sheets

        check_free(self.out, allowed=self.overwrite, flags="--overwrite")
        data = load_dataset(self.name, self.options)
        for path in write_sheets(
            data,
            self.out,
            split=self.split,
            columns=self.columns,
            rows=self.rows,
            classes=self.classes,
        ):
            _show(path)
        if data.num_classes > self.classes:
            print(f"{self.classes} of {data.num_classes} classes are shown; see --classes")


@dataclass(frozen=True)
class DataConvert:
    """Make a list file from an official iNaturalist JSON."""

    source: Positional[Path]
    """train2018.json or val2018.json."""
    destination: Positional[Path]
    """List file to write, for instance data/iNaturalist18_train.txt."""
    overwrite: bool = False
    """Replace the list file."""

    def run(self) -> None:
        """Convert."""
        if self.destination.exists() and not self.overwrite:
            raise UsageError(f"{self.destination} exists; choose another name, or --overwrite")
        count = convert_inaturalist(self.source, self.destination)
        print(f"{self.destination}: {count} images")


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
        given = _given(self)
        with ranks_of_torchrun(given.get("device", "cpu")) as ranks:
            for row in reproduce_table(
                self.name,
                self.data,
                self.out,
                seeds=self.seeds,
                ranks=ranks,
                progress=not self.quiet,
                **given,
            ):
                rows.append(row)
                if ranks.rank == 0:
                    if len(rows) == 1:
                        print(f"{self.name}: {table.title}, {self.data}")
                        seeds = f"{self.seeds} seed(s), +- std [published]"
                        print(f"test accuracy, %, last epoch, {seeds}")
                    print(_measured(row), flush=True)
        if ranks.rank:
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
                **_given(self),
            )
        )
        print(f"{self.name}: {figure.title}, {self.data}")
        for panel in panels:
            _show(f"{panel.variant.name}: {panel.item.subject.title}")
        _show(spectrum_table([panel.item for panel in panels]))
        for panel in panels:
            if panel.published is not None:
                low, high = panel.published
                _show(f"published, {panel.variant.name}, {panel.item.subject.whose}: {low} {high}")
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


def _measured(row: Row) -> str:
    """A row of a table as text."""
    cells = []
    for name in MEASURES:
        mean, std = row.measured[name]
        known = row.published.get(name)
        cell = f"{name} {mean:.1f} +- {std:.1f}"
        if known is not None:
            cell += f" [{known[0]:.1f}" + ("]" if known[1] is None else f" +- {known[1]:.1f}]")
        cells.append(cell)
    return f"{row.variant.name}: {', '.join(cells)}"


def _commands() -> Any:
    train_help = (
        f"Train one network. Data: {', '.join(DATASETS)}. Methods are loss or loss-rule, with loss "
        f"one of {', '.join(LOSSES)} and rule one of {', '.join(RULES)}. "
        f"Optimizers: {', '.join(OPTIMIZERS)}. Settings that are not given come from the recipe; "
        "of a run that is resumed, from the run."
    )
    reproduce_help = (
        f"Train what a table ({', '.join(TABLES)}) or a figure of spectra ({', '.join(FIGURES)}) of "
        "the paper compares, on any data set, and print it beside the published numbers. Settings "
        "that are given replace those of every recipe; published numbers are then left out."
    )
    return (
        Annotated[Demo, subcommand("demo")]
        | Annotated[_with_settings(TrainCommand), subcommand("train", description=train_help)]
        | Annotated[SpectrumCommand, subcommand("spectrum")]
        | Annotated[Report, subcommand("report")]
        | Annotated[
            _with_settings(ReproduceCommand, leave_out=("seed",)),
            subcommand("reproduce", description=reproduce_help),
        ]
        | Annotated[Recipes, subcommand("recipes")]
        | Annotated[
            Annotated[DataCheck, subcommand("check")]
            | Annotated[DataShow, subcommand("show")]
            | Annotated[DataConvert, subcommand("convert")],
            subcommand("data", description="Check and show data sets, convert list files."),
        ]
        | Annotated[Doctor, subcommand("doctor")]
    )


def parse(argv: Sequence[str] | None = None) -> Any:
    """The command that ``argv`` names, with its options; ``run()`` makes it happen.

    Raises:
        SystemExit: for ``--version`` and ``--help`` (0) and for options that cannot be parsed (2).
    """
    if list(sys.argv[1:] if argv is None else argv) == ["--version"]:
        print(f"fastsam {fastsam.__version__}")
        raise SystemExit(0)
    return tyro.cli(
        _commands(),
        prog="fastsam",
        description=(
            "Sharpness-aware training, Hessian spectra, long-tailed classes. Every command takes "
            "--debug, which shows the traceback of an error."
        ),
        args=argv,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Whatever goes wrong is one line on standard error; ``--debug`` adds a traceback.

    Args:
        argv: arguments without the program's name; None for those of the process.

    Returns:
        0 if it worked, 2 if the call was wrong, 1 if something else was, 130 if interrupted.

    Raises:
        SystemExit: for ``--version`` and ``--help`` (0) and for options that cannot be parsed (2).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    command: Any = None
    try:
        command = parse([argument for argument in arguments if argument != "--debug"])
        command.run()
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader has seen enough, `fastsam recipes | head` for instance.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception as error:
        if debug:
            traceback.print_exc()
        code = EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED
        return _fail(_in_one_line(error, trains=hasattr(command, "batch_size")), code)
    return 0


_EXPECTED = (LongTailError, OSError, ImportError, FloatingPointError)
"""Errors whose message says all that there is to say."""


def _in_one_line(error: Exception, *, trains: bool) -> str:
    """What went wrong, and where it helps what to do."""
    text = str(error)
    if isinstance(error, _EXPECTED):
        return text or type(error).__name__
    # torch appends its C++ stack to the first line or two.
    text = (text.split("Exception raised from")[0].strip().splitlines() or [""])[0]
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in text:
        advice = "lower --batch-size, or choose --precision bfloat16" if trains else "lower --steps"
        return f"out of memory: {text or 'no more could be had'}; {advice}"
    return f"{type(error).__name__}: {text} (--debug shows where)"


def _fail(message: object, code: int) -> int:
    """One line on standard error, and the exit code."""
    print(f"fastsam: error: {one_line(message)}", file=sys.stderr)
    return code


def _show(text: object) -> None:
    """Print text that may hold names from data or files."""
    print(printable(str(text)))


if __name__ == "__main__":
    sys.exit(main())
