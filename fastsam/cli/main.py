"""Parse the command line, run one command, and print each error on one line."""

from __future__ import annotations

import os
import pkgutil
import re
import sys
import traceback
from collections.abc import Sequence
from functools import reduce
from importlib import import_module
from typing import Annotated, Any

import torch
import tyro
from tyro.conf import subcommand

import fastsam
from fastsam.cli import commands
from fastsam.cli.options import flattened
from fastsam.cli.usage import parsed
from fastsam.distributed import LaunchError
from fastsam.longtail.errors import LongTailError, UsageError, unknown
from fastsam.rank_errors import RankError
from fastsam.stopping import EXIT_INTERRUPTED, EXIT_STOPPED, Stopped, stop_with_parent
from fastsam.text import notice, one_line

EXIT_FAILED, EXIT_USAGE = 1, 2

_CONFIG = (tyro.conf.FlagCreatePairsOff,)
_DESCRIPTION = (
    "Sharpness-aware training, Hessian spectra and long-tailed classification. Begin with `fastsam demo`. "
    "`fastsam COMMAND --help` describes a command, `fastsam --version` prints the version. Every command "
    "accepts --debug, which prints the traceback of an error."
)


def command_names() -> tuple[str, ...]:
    """List the commands: the names of the modules in :mod:`fastsam.cli.commands`."""
    return tuple(module.name for module in pkgutil.iter_modules(commands.__path__))


def parse(argv: Sequence[str] | None = None) -> Any:
    """Parse the command line into a command with its options; its ``run()`` executes it.

    Args:
        argv: arguments without the program's name; ``sys.argv[1:]`` if None.

    Raises:
        UsageError: if the command or an option is unknown, or a value does not fit its option.
        SystemExit: for ``--version`` and ``--help`` (code 0).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        print(f"fastsam {fastsam.__version__}")
        raise SystemExit(0)
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name in command_names():
        made = _command(name, rest)
        options = {"description": _description(name, made), "config": _CONFIG}
        return flattened(parsed(made, rest, prog=f"fastsam {name}", **options))
    if name and not name.startswith("-"):
        raise unknown("command", name, command_names())
    if not {"--help", "-h"} & set(arguments):
        raise UsageError(
            f"a command must come first, one of {', '.join(command_names())}; see `fastsam --help`"
        )
    made_by_name = {name: _command(name, ()) for name in command_names()}
    every: Any = reduce(
        lambda union, one: union | one,
        (
            Annotated[
                made,
                subcommand(name, description=_summary(_description(name, made) or made.__doc__)),
            ]
            for name, made in made_by_name.items()
        ),
    )
    return tyro.cli(
        every, prog="fastsam", description=_DESCRIPTION, args=["--help"], config=_CONFIG
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Errors are printed to standard error on one line; ``--debug`` adds a traceback.

    Args:
        argv: arguments without the program's name; ``sys.argv[1:]`` if None.

    Returns:
        Exit code: 0 on success, 2 for wrong usage, 1 for any other error, 75 if a signal stopped the command
        and the same command continues, 130 if interrupted.

    Raises:
        SystemExit: for ``--version`` and ``--help`` (code 0).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    command: Any = None
    if "TORCHELASTIC_RUN_ID" in os.environ:
        stop_with_parent()
    try:
        command = parse([argument for argument in arguments if argument != "--debug"])
        command.run()
    except Stopped as stop:
        notice(stop)
        return EXIT_STOPPED
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of the pipe closed it, as in `fastsam recipes | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        out = getattr(command, "out", None)
        if out is not None:
            notice(f"standard output was closed before the end; what was finished is in {out}")
        return EXIT_FAILED
    except Exception as error:
        if debug:
            traceback.print_exc()
        code = EXIT_USAGE if isinstance(error, UsageError | LaunchError) else EXIT_FAILED
        return _fail(_in_one_line(error, command), code)
    return 0


def _command(name: str, arguments: Sequence[str]) -> Any:
    """Return the dataclass of a command; its options may depend on ``arguments``."""
    return import_module(f"{commands.__name__}.{name}").command(arguments)


def _description(name: str, made: Any) -> str | None:
    """Return the help of a command with subcommands, its module's docstring; None for other commands.

    tyro takes the help of a dataclass from its docstring. A command with subcommands is a union of
    dataclasses, and tyro would show the docstring of :class:`typing.Union`.
    """
    return None if isinstance(made, type) else sys.modules[f"{commands.__name__}.{name}"].__doc__


def _summary(text: str) -> str:
    """Return the first sentence of a help text."""
    return re.split(r"(?<=\.)\s+(?=[A-Z])", " ".join(text.split()), maxsplit=1)[0]


_EXPECTED = (LongTailError, LaunchError, RankError, OSError, ImportError, FloatingPointError)
"""Errors whose message is complete without the name of their class."""

_SAVES_MEMORY = {
    "batch_size": "lower --batch-size",
    "precision": "choose --precision bfloat16",
    "steps": "lower --steps",
}
"""Remedies when memory runs out. Each is offered by commands that have the option it is keyed by."""


def _in_one_line(error: Exception, command: Any) -> str:
    """Return the message of an error as one line, with a remedy if memory ran out."""
    text = str(error)
    if isinstance(error, _EXPECTED):
        return text or type(error).__name__
    # torch appends its C++ stack to the first line or two.
    text = (text.split("Exception raised from")[0].strip().splitlines() or [""])[0]
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in text:
        remedies = [text for option, text in _SAVES_MEMORY.items() if hasattr(command, option)]
        advice = f"; {', or '.join(remedies)}" if remedies else ""
        return f"out of memory: {text or 'allocation failed'}{advice}"
    return f"{type(error).__name__}: {text} (pass --debug for the traceback)"


def _fail(message: object, code: int) -> int:
    """Print one line to standard error and return the exit code."""
    print(f"fastsam: error: {one_line(message)}", file=sys.stderr)
    return code
