"""Parse the command line, run one command, and turn errors into one line."""

from __future__ import annotations

import os
import pkgutil
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
from fastsam.distributed import LaunchError
from fastsam.longtail.errors import LongTailError, UsageError, unknown
from fastsam.text import one_line

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

_CONFIG = (tyro.conf.FlagCreatePairsOff,)
_DESCRIPTION = (
    "Sharpness-aware training, Hessian spectra, long-tailed classes. Every command takes "
    "--debug, which shows the traceback of an error."
)


def command_names() -> tuple[str, ...]:
    """The commands: the modules of :mod:`fastsam.cli.commands`."""
    return tuple(module.name for module in pkgutil.iter_modules(commands.__path__))


def parse(argv: Sequence[str] | None = None) -> Any:
    """The command that ``argv`` names, with its options; ``run()`` makes it happen.

    Raises:
        SystemExit: for ``--version`` and ``--help`` (0) and for options that cannot be parsed (2).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        print(f"fastsam {fastsam.__version__}")
        raise SystemExit(0)
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name in command_names():
        made = _command(name, rest)
        return flattened(tyro.cli(made, prog=f"fastsam {name}", args=rest, config=_CONFIG))
    every: Any = reduce(
        lambda union, one: union | one,
        (Annotated[_command(name, ()), subcommand(name)] for name in command_names()),
    )
    if name and not name.startswith("-"):
        raise unknown("command", name, command_names())
    return flattened(
        tyro.cli(every, prog="fastsam", description=_DESCRIPTION, args=arguments, config=_CONFIG)
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Whatever goes wrong is one line on standard error; ``--debug`` adds a traceback.

    Args:
        argv: arguments without the program's name; None for those of the process.

    Returns:
        0 if it worked, 2 if the call was wrong, 1 if something else was, 130 if interrupted.

    Raises:
        SystemExit: for ``--version`` and ``--help`` (0) and for options that cannot be parsed (2).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    command: Any = None
    try:
        command = parse([argument for argument in arguments if argument != "--debug"])
        command.run()
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader has seen enough, `fastsam recipes | head` for instance.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception as error:
        if debug:
            traceback.print_exc()
        code = EXIT_USAGE if isinstance(error, UsageError | LaunchError) else EXIT_FAILED
        return _fail(_in_one_line(error, command), code)
    return 0


def _command(name: str, arguments: Sequence[str]) -> Any:
    """The dataclass of a command, whose options may depend on its arguments."""
    return import_module(f"{commands.__name__}.{name}").command(arguments)


_EXPECTED = (LongTailError, LaunchError, OSError, ImportError, FloatingPointError)
"""Errors whose message says all that there is to say."""

_SAVES_MEMORY = {
    "batch_size": "lower --batch-size",
    "precision": "choose --precision bfloat16",
    "steps": "lower --steps",
}
"""What to do where memory runs out, by the option that a command must have for it."""


def _in_one_line(error: Exception, command: Any) -> str:
    """What went wrong, and where it helps what to do."""
    text = str(error)
    if isinstance(error, _EXPECTED):
        return text or type(error).__name__
    # torch appends its C++ stack to the first line or two.
    text = (text.split("Exception raised from")[0].strip().splitlines() or [""])[0]
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in text:
        remedies = [text for option, text in _SAVES_MEMORY.items() if hasattr(command, option)]
        advice = f"; {', or '.join(remedies)}" if remedies else ""
        return f"out of memory: {text or 'no more could be had'}{advice}"
    return f"{type(error).__name__}: {text} (--debug shows where)"


def _fail(message: object, code: int) -> int:
    """One line on standard error, and the exit code."""
    print(f"fastsam: error: {one_line(message)}", file=sys.stderr)
    return code
