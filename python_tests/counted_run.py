"""Run a ``fastsam`` command and append each step of its training to ``steps-RANK.txt`` beside ``--out``.

Tests that kill the command read from it which steps were repeated. In a run in stages, the last stage has the
folder ``--out``, and an earlier one its folder in it. A checkpoint is written after every epoch, also in the
first seconds. ``FASTSAM_STEP_SECONDS`` is a pause after each step.
"""

from __future__ import annotations

import os
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from fastsam.cli.main import main
from fastsam.longtail import Trainer
from fastsam.longtail.training import Step


class CountedTrainer(Trainer):
    """A trainer that records its steps."""

    def __init__(self, *args: Any, **options: Any) -> None:
        out = Path(options["out"])
        name = f"{out.name}-steps-{os.environ.get('RANK', '0')}.txt"
        with (out.parent / name).open("a") as file:
            file.write("start\n")

        def on_step(step: Step) -> None:
            with (out.parent / name).open("a") as file:
                file.write(f"{step.epoch} {step.batch}\n")
            time.sleep(float(os.environ.get("FASTSAM_STEP_SECONDS", "0")))

        super().__init__(*args, on_step=on_step, **options)


if __name__ == "__main__":
    stages: Any = import_module("fastsam.longtail.training.stages")
    stages.Trainer = CountedTrainer
    saving: Any = import_module("fastsam.longtail.training.saving")
    saving.EPOCH_SECONDS = 0.0
    sys.exit(main())
