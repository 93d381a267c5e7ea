"""``python -m benchmarks CASE``: one command per case."""

from __future__ import annotations

import tyro

from benchmarks.readme import Readme
from benchmarks.sam_step import SamStep


def main() -> None:
    """Runs the case that the command line names."""
    case = tyro.extras.subcommand_cli_from_dict(
        {"sam-step": SamStep, "readme": Readme}, prog="python -m benchmarks", description=__doc__
    )
    case.run()


if __name__ == "__main__":
    main()
