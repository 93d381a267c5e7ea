"""The command line. Nothing else parses arguments; every command is a dataclass with a ``run``."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence
from dataclasses import Field, dataclass, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

try:
    import tyro
    from tyro.conf import Positional, arg, subcommand
except ImportError as error:
    raise SystemExit(
        "fastsam: error: the command line needs more packages: pip install 'fastsam[longtail]'"
    ) from error

import fastsam
from fastsam.longtail.checkpoint import Checkpoint
from fastsam.longtail.config import OPTIMIZERS, TrainConfig
from fastsam.longtail.data import DATASETS, DataOptions
from fastsam.longtail.data.check import check_dataset
from fastsam.longtail.data.lists import convert_inaturalist
from fastsam.longtail.errors import LongTailError, UsageError
from fastsam.longtail.landscape import landscape
from fastsam.longtail.methods import LOSSES, RULES
from fastsam.longtail.recipes import recipe
from fastsam.longtail.reproduce import MEASURES, reproduce
from fastsam.longtail.tracking import TRACKERS, check_tracker, tracker
from fastsam.longtail.trainer import Trainer, load_configured

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


@dataclass(frozen=True)
class TrainCommand:
    """Train one network and judge it on the test set after the last epoch.

    Settings that are not given come from the published recipe of data, method and optimizer.
    """

    data: str = "digits-lt"
    method: str = "ce-drw"
    optimizer: str = "sam"
    out: Annotated[Path | None, arg(help="folder for checkpoint and results")] = None
    resume: Annotated[bool, arg(help="go on with the run in --out")] = False
    overwrite: Annotated[bool, arg(help="replace the run in --out")] = False
    quiet: Annotated[bool, arg(help="no progress bar")] = False
    track: Annotated[str, arg(help=f"send epochs to: {', '.join(TRACKERS)}")] = "none"

    def run(self) -> None:
        """Train, print the accuracies, write the folder."""
        from fastsam.report import accuracy_table

        if self.out is None and (self.resume or self.overwrite):
            raise UsageError("--resume and --overwrite need --out DIR")
        check_tracker(self.track, out=self.out)
        names = {item.name for item in fields(TrainConfig)} - {"data", "method", "optimizer"}
        given = {name: getattr(self, name) for name in names}
        chosen = recipe(
            self.data,
            self.method,
            self.optimizer,
            **{name: value for name, value in given.items() if value is not None},
        )
        trainer = Trainer(
            chosen.config(),
            sources=chosen.sources,
            out=self.out,
            resume=self.resume,
            overwrite=self.overwrite,
            progress=not self.quiet,
        )
        if trainer.data.subset_hash is not None:
            print(f"training subset, SHA-256: {trainer.data.subset_hash}")
        with tracker(self.track, config=trainer.config, out=self.out) as trainer.on_epoch:
            result = trainer.fit()
        print(accuracy_table([result]))
        if self.out is not None:
            print(f"results: {self.out}")


def _setting(item: Field[Any], hint: Any) -> Any:
    """How the option of a setting is shown in the help."""
    kinds = {bool: "True|False", int: "INT", float: "FLOAT", str: "NAME"}
    used = [kind for kind in (hint, *get_args(hint)) for kind in (kind, *get_args(kind))]
    metavar = next((text for kind, text in kinds.items() if kind in used), None)
    many = any(get_origin(kind) is tuple for kind in used)
    return arg(
        help=item.metadata["help"],
        metavar=f"{metavar} ..." if many else metavar,
        help_behavior_hint="",
    )


def _with_settings() -> type[TrainCommand]:
    """:class:`TrainCommand` with an option for every setting, so that each is written only once."""
    hints = get_type_hints(TrainConfig)
    options = [
        (item.name, Annotated[hints[item.name] | None, _setting(item, hints[item.name])], None)
        for item in fields(TrainConfig)
        if item.name not in ("data", "method", "optimizer")
    ]
    command = make_dataclass("Train", options, bases=(TrainCommand,), frozen=True)
    command.__doc__ = TrainCommand.__doc__
    return command


@dataclass(frozen=True)
class SpectrumCommand:
    """Hessian spectrum of the loss of single classes at a trained network's weights."""

    checkpoint: Positional[Path]
    """checkpoint.pt, or the folder of the run."""
    classes: tuple[int, ...] = (0, 9)
    """Labels of the classes."""
    split: str = "train"
    """Whose images: train, validation or test."""
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
    out: Path | None = None
    """Folder for the spectra as JSON and a figure of them."""
    overwrite: bool = False
    """The folder may hold files already."""
    quiet: bool = False
    """No progress bar."""

    def run(self) -> None:
        """Compute, print and, if asked, write the spectra."""
        from fastsam.longtail.results import check_free
        from fastsam.report import spectrum_table
        from fastsam.report.figures import spectra_panels

        if self.out is not None:
            check_free(self.out, allowed=self.overwrite, flags="--overwrite")
        checkpoint = Checkpoint.load(self.checkpoint)
        spectra = landscape(
            checkpoint.build_model(),
            load_configured(checkpoint.config),
            checkpoint,
            self.classes,
            split=self.split,
            loss=self.loss,
            augment=self.augment,
            steps=self.steps,
            probes=self.probes,
            seed=self.seed,
            progress=not self.quiet,
        )
        for item in spectra:
            print(item.subject.title)
        print(spectrum_table(spectra))
        if self.out is not None:
            for item in spectra:
                item.save(self.out)
            (self.out / "spectra.svg").write_text(spectra_panels(spectra), "utf-8")
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
    """List the published recipes, or show one with the source of every value."""

    data: str | None = None
    """Data set of the recipe to show."""
    method: str = "ce-drw"
    """Its method."""
    optimizer: str = "sam"
    """Its optimizer."""

    def run(self) -> None:
        """Print the list, or one recipe."""
        from fastsam.report import Table

        if self.data is None:
            print(f"data: {', '.join(DATASETS)}")
            print("methods: loss or loss-rule, with")
            for name, text in (*LOSSES.items(), *RULES.items()):
                print(f"  {name}: {text}")
            print("optimizers:")
            for name, text in OPTIMIZERS.items():
                print(f"  {name}: {text}")
            print("show one with: fastsam recipes --data NAME --method NAME --optimizer NAME")
            return
        chosen = recipe(self.data, self.method, self.optimizer)
        rows = tuple(
            (name, str(entry.value), chosen.sources[name]) for name, entry in chosen.entries.items()
        )
        print(Table(("setting", "value", "source"), rows))


@dataclass(frozen=True)
class DataCheck:
    """Verify the files, labels and counts of a data set."""

    name: Positional[str]
    """Name of the data set."""
    root: Path = Path("data")
    """Folder with its files."""
    imbalance: float = 100.0
    """Imbalance factor of the sets made long-tailed here."""
    subset_seed: int = 0
    """Seed of that selection."""
    decode: bool = False
    """Also decode every image file."""

    def run(self) -> None:
        """Print what was found."""
        options = DataOptions(
            root=self.root, imbalance=self.imbalance, subset_seed=self.subset_seed
        )
        for line in check_dataset(self.name, options, decode=self.decode):
            print(line)


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
class Reproduce:
    """Train every row of a table of the paper for several seeds, and compare."""

    table: Positional[str]
    """table1 (CIFAR-LT), table3 (large data sets) or table4 (other optimizers)."""
    data: str = "cifar10-lt"
    """Data set."""
    seeds: int = 3
    """Number of seeds."""
    out: Path = Path("runs/reproduce")
    """Folder of the runs; finished ones are not trained again."""
    data_root: str | None = None
    """Folder with the data."""
    epochs: int | None = None
    """Another number of epochs than the recipes'."""
    device: str = "cpu"
    """Device: cpu, cuda, cuda:1, ..."""
    quiet: bool = False
    """No progress bars."""

    def run(self) -> None:
        """Run the table, printing every row when it is done."""
        options = {"data_root": self.data_root, "epochs": self.epochs, "device": self.device}
        given = {name: value for name, value in options.items() if value is not None}
        rows = reproduce(
            self.table, self.data, self.out, seeds=self.seeds, progress=not self.quiet, **given
        )
        for number, row in enumerate(rows):
            if number == 0:
                print(f"test accuracy, %, last epoch, {self.seeds} seed(s), +- std [published]")
            published = row.published or (None,) * len(MEASURES)
            cells = (
                f"{name} {mean:.1f} +- {std:.1f}" + ("" if known is None else f" [{known:.1f}]")
                for name, mean, std, known in zip(
                    MEASURES, row.mean, row.std, published, strict=True
                )
            )
            print(f"{row.method} {row.optimizer}: {', '.join(cells)}", flush=True)


def _commands() -> Any:
    train_help = (
        f"Train one network. Data: {', '.join(DATASETS)}. Methods are loss or loss-rule, with loss "
        f"one of {', '.join(LOSSES)} and rule one of {', '.join(RULES)}. "
        f"Optimizers: {', '.join(OPTIMIZERS)}. Settings that are not given come from the recipe."
    )
    return (
        Annotated[Demo, subcommand("demo")]
        | Annotated[_with_settings(), subcommand("train", description=train_help)]
        | Annotated[SpectrumCommand, subcommand("spectrum")]
        | Annotated[Report, subcommand("report")]
        | Annotated[Reproduce, subcommand("reproduce")]
        | Annotated[Recipes, subcommand("recipes")]
        | Annotated[
            Annotated[DataCheck, subcommand("check")]
            | Annotated[DataConvert, subcommand("convert")],
            subcommand("data", description="Check data sets, convert list files."),
        ]
        | Annotated[Doctor, subcommand("doctor")]
    )


def parse(argv: Sequence[str] | None = None) -> Any:
    """The command that ``argv`` names, with its options; ``run()`` makes it happen."""
    return tyro.cli(
        _commands(),
        prog="fastsam",
        description="Sharpness-aware training, Hessian spectra, long-tailed classes.",
        args=argv,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; None for those of the process.

    Returns:
        0 if it worked, 2 if the call was wrong, 1 if something else was, 130 if interrupted.

    Raises:
        SystemExit: for ``--help`` (0) and for options that cannot be parsed (2).
    """
    try:
        parse(argv).run()
    except UsageError as error:
        return _fail(error, EXIT_USAGE)
    except (LongTailError, OSError, ImportError, FloatingPointError) as error:
        return _fail(error, EXIT_FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)
    return 0


def _fail(message: object, code: int) -> int:
    """One line on standard error, and the exit code."""
    print(f"fastsam: error: {' '.join(str(message).split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
