"""Train one run of a sweep: ``python -m fastsam.longtail.sweeps FOLDER``, with the task as standard input.

The folder is there for people who look at a list of processes.
"""

import sys
from pathlib import Path

from fastsam.longtail.sweeps.task import SweepTask
from fastsam.stopping import stop_signals, stop_with_parent

if __name__ == "__main__":
    stop_with_parent()
    task = SweepTask.from_json(sys.stdin.read())
    # The result records this command, which trains the run alone. The folder of the sweep may move.
    sys.argv = ["fastsam", "train", "--config", str(Path(task.name) / "run.yaml")]
    with stop_signals() as stop:
        code = task.run(stop)
    sys.exit(code)
