"""Run a benchmark: ``python -m benchmarks CASE``."""

from __future__ import annotations

import tyro

from benchmarks.data_path import DataPath
from benchmarks.demo import DemoRuns
from benchmarks.device_code import DeviceCode
from benchmarks.eigenpairs import EigenpairRuns
from benchmarks.epoch import EpochTime
from benchmarks.estimators import Estimators
from benchmarks.figures import Figures
from benchmarks.host_work import HostWork
from benchmarks.late_ascent.command import LateAscent
from benchmarks.late_phase import LatePhase
from benchmarks.longtail_methods.command import LongtailMethods
from benchmarks.machine import refuse_fallback
from benchmarks.readme import Readme
from benchmarks.sam_step import SamStep
from benchmarks.spectrum import Spectra
from benchmarks.startup import Startup
from benchmarks.torch_operations import TorchOperations
from benchmarks.tracking import Tracking
from benchmarks.train_step import TrainStep


def main() -> None:
    """Run the case on the command line."""
    case = tyro.extras.subcommand_cli_from_dict(
        {
            "sam-step": SamStep,
            "late-phase": LatePhase,
            "spectrum": Spectra,
            "estimators": Estimators,
            "eigenpairs": EigenpairRuns,
            "tracking": Tracking,
            "train-step": TrainStep,
            "host-work": HostWork,
            "epoch": EpochTime,
            "data-path": DataPath,
            "longtail-methods": LongtailMethods,
            "late-ascent": LateAscent,
            "demo": DemoRuns,
            "figures": Figures,
            "device-code": DeviceCode,
            "torch-operations": TorchOperations,
            "startup": Startup,
            "readme": Readme,
        },
        prog="python -m benchmarks",
        description=__doc__,
    )
    refuse_fallback(getattr(case, "device", "cpu"))
    case.run()


if __name__ == "__main__":
    main()
