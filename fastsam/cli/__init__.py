"""The command line: the only place that parses arguments. Each file in ``commands`` holds one command."""

from fastsam.cli.main import main, parse

__all__ = ["main", "parse"]
