"""Train one run of a sweep: ``python -m fastsam.longtail.sweeps FOLDER``, with the task as standard input.

The folder is there for people who look at a list of processes.
"""

import sys

from fastsam.longtail.sweeps.task import SweepTask
from fastsam.stopping import stop_signals, stop_with_parent

if __name__ == "__main__":
    stop_with_parent()
    with stop_signals() as stop:
        code = SweepTask.from_json(sys.stdin.read()).run(stop)
    sys.exit(code)
