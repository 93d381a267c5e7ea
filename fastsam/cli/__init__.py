"""The command line. Nothing else parses arguments; every command is one file in ``commands``."""

from fastsam.cli.main import main, parse

__all__ = ["main", "parse"]
