"""Check, show, pack or convert a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg, subcommand

from fastsam.cli.options import given, recipe_of_data, settings_of_data, with_settings
from fastsam.cli.output import show
from fastsam.longtail.data import load_dataset
from fastsam.longtail.data.check import check_dataset
from fastsam.longtail.data.files import FileImages
from fastsam.longtail.data.lists import convert_inaturalist
from fastsam.longtail.data.pack import FOLDER, MANIFEST, write_pack
from fastsam.longtail.errors import UsageError
from fastsam.longtail.training import check_free


@dataclass(frozen=True)
class DataCheck:
    """Verify the files, labels and counts of a data set."""

    name: Annotated[Positional[str], arg(metavar="NAME")]
    """Name of the data set."""
    decode: bool = False
    """Also decode every image file."""

    def run(self) -> None:
        """Check the data set and print the result."""
        settings = given(self)
        if settings.get("workers") is not None and not self.decode:
            raise UsageError("--workers requires --decode")
        for line in check_dataset(self.name, decode=self.decode, **settings):
            show(line)


@dataclass(frozen=True)
class DataShow:
    """Write a contact sheet for each class, and one that shows all classes from head to tail."""

    name: Annotated[Positional[str], arg(metavar="NAME")]
    """Name of the data set."""
    out: Path = Path("sheets")
    """Output folder."""
    split: str = "train"
    """Dataset split: train, validation or test."""
    columns: int = 16
    """Images per row."""
    rows: int = 8
    """Rows in the sheet of one class."""
    classes: int = 100
    """Maximum number of classes to show; if there are more, they are chosen evenly from head to tail."""
    overwrite: bool = False
    """Allow an output folder that is not empty."""

    def run(self) -> None:
        """Write the sheets."""
        from fastsam.longtail.data.sheet import write_sheets

        check_free(self.out, allowed=self.overwrite, flags="--overwrite")
        data = load_dataset(self.name, **given(self))
        for path in write_sheets(
            data,
            self.out,
            split=self.split,
            columns=self.columns,
            rows=self.rows,
            classes=self.classes,
        ):
            show(path)
        if data.num_classes > self.classes:
            print(f"showing {self.classes} of {data.num_classes} classes; raise --classes for more")


@dataclass(frozen=True)
class DataPack:
    """Write a packed copy of a data set's image files, which `--packed` reads without decoding."""

    name: Annotated[Positional[str], arg(metavar="NAME")]
    """Name of the data set."""
    short_side: int = 256
    """Largest length of the shorter side of an image, in pixels. Larger images are reduced."""
    overwrite: bool = False
    """Replace an existing packed copy."""

    def run(self) -> None:
        """Write the copy and print its size."""
        settings = given(self)
        if self.short_side < 1:
            raise UsageError(f"--short-side must be at least 1, got {self.short_side}")
        skip = settings.pop("corrupt", None) == "skip"
        data = load_dataset(self.name, **settings)
        source = data.train
        if not isinstance(source, FileImages) or source.location is not None:
            raise UsageError(
                f"the images of {self.name} are not files in a folder; train without a packed copy"
            )
        folder = source.root / FOLDER
        if (folder / MANIFEST).exists() and not self.overwrite:
            raise UsageError(f"{folder} exists; pass --overwrite to replace it")
        splits = (images for images in data.splits.values() if isinstance(images, FileImages))
        pack = write_pack(
            source.root,
            [path for images in splits for path in images.images.paths],
            source.reading,
            short_side=self.short_side,
            workers=source.workers,
            skip=skip,
            progress=True,
        )
        print(f"{folder}: {len(pack.rows)} images, {pack.size / 1e6:,.1f} MB")


@dataclass(frozen=True)
class DataConvert:
    """Convert an official iNaturalist JSON file to a list file."""

    source: Annotated[Positional[Path], arg(metavar="SOURCE")]
    """Path of train2018.json or val2018.json."""
    destination: Annotated[Positional[Path], arg(metavar="DESTINATION")]
    """Path of the list file to write, for instance data/iNaturalist18_train.txt."""
    overwrite: bool = False
    """Overwrite an existing list file."""

    def run(self) -> None:
        """Convert the file and print the number of images."""
        if self.destination.exists() and not self.overwrite:
            raise UsageError(f"{self.destination} exists; choose another name or pass --overwrite")
        count = convert_inaturalist(self.source, self.destination)
        print(f"{self.destination}: {count} images")


_RECIPE_NOTE = (
    "The recipe of the data set overrides the defaults below. To see the recipe's values, and only the "
    "settings that apply, pass NAME before --help."
)


def command(arguments: Sequence[str]) -> Any:
    """Return the subcommands, with options for the settings of the data set in ``arguments``."""
    settings, values = settings_of_data(arguments), recipe_of_data(arguments)
    of_files = {name: value for name, value in settings.items() if name != "packed"}
    note = "" if values else _RECIPE_NOTE
    check, sheet, pack = (
        with_settings(cls, chosen, shorter={"data_root": "root"}, recipe=values, note=note)
        for cls, chosen in ((DataCheck, settings), (DataShow, settings), (DataPack, of_files))
    )
    return (
        Annotated[check, subcommand("check")]
        | Annotated[sheet, subcommand("show")]
        | Annotated[pack, subcommand("pack")]
        | Annotated[DataConvert, subcommand("convert")]
    )
