"""The comparison of late phases on a larger network and data set, for one seed on a GPU."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.late_ascent import choice
from benchmarks.late_ascent.arms import BASE
from benchmarks.late_ascent.curvature import class_spectra
from benchmarks.late_ascent.plan import Setup
from benchmarks.late_ascent.runs import place_of, train_arm
from benchmarks.machine import save
from fastsam.longtail.trained import TrainedRun

METHOD = "ce-drw"


@dataclass(frozen=True, kw_only=True)
class FullSize:
    """Train SGD and SAM in the late phase with the settings chosen on the 600-image set, and compare classes.

    Both continue one early phase. Records are written after each arm and each set of class spectra; a
    repeated command continues from the last checkpoint.
    """

    out: Path
    """Folder for the record and the runs."""
    data_root: Path | None = None
    """Folder of the archives of Fashion-MNIST; None for those that are installed."""
    n_max: int = 5000
    """Images of the largest class."""
    model: str = "resnet32"
    """Network."""
    epochs: int = 60
    """Epochs; the late phase is the last fifth."""
    seed: int = 0
    """Seed of subset, class order, weights and batches."""
    device: str = "cuda"
    """Device."""

    def run(self) -> None:
        """Train the arms, measure class spectra, and write the record."""
        settings: dict[str, Any] = {
            "device": self.device,
            "model": self.model,
            "n_max": self.n_max,
            "validation_per_class": 100,
            "validate_every": 1000,
        }
        if self.data_root is not None:
            settings["data_root"] = str(self.data_root)
        setup = Setup(
            "full-size",
            "fashion-mnist-lt",
            tuple(settings.items()),
            epochs=self.epochs,
            defer=self.epochs - self.epochs // 5,
            seeds=1,
            methods=(METHOD,),
            gpu=True,
        )
        chosen = choice.chosen_late(METHOD)
        arms = {"base": BASE, **chosen}
        record: dict[str, Any] = {
            "chosen": {name: arm.name for name, arm in arms.items()},
            "arms": {},
            "spectra": {},
        }
        folder = self.out / "runs"
        base = choice.chosen_base(METHOD)
        for name, arm in arms.items():
            found = train_arm(setup, METHOD, arm, self.seed, base, folder, tested=True)
            record["arms"][name] = found
            save("full_size", record, device=self.device, folder=self.out)
            scores = {key: found["test"][key]["balanced"] for key in ("raw", "tau", "tau, few")}
            print(f"{arm.name}: {found['seconds']} s, balanced accuracy {scores}", flush=True)
        places = {"switch": folder / "base" / f"epoch-{setup.defer}.pt"}
        places |= {name: place_of(arm, folder) for name, arm in chosen.items()}
        for name, place in places.items():
            began = time.perf_counter()
            record["spectra"][name] = class_spectra(TrainedRun.load(place))
            save("full_size", record, device=self.device, folder=self.out)
            print(f"class spectra of {name}: {time.perf_counter() - began:.1f} s", flush=True)
