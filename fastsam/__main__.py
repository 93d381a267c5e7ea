"""Entry point of the command ``fastsam``, which is the same as ``python -m fastsam``."""

from __future__ import annotations

import os
import sys


def main() -> int:
    """Import and run the command line, and report interrupts and import errors without a traceback.

    Importing takes seconds because of torch, so it happens inside the ``try``. A process that torchrun
    started ends here; see :func:`fastsam.distributed.end_process`.
    """
    try:
        # NumPy first: torch ignores an interrupt while it imports NumPy, which is then half imported.
        import numpy  # noqa: F401

        from fastsam.cli import main as run
        from fastsam.distributed import end_process

        code = run()
        if "RANK" in os.environ:
            end_process(code)
        return code
    except KeyboardInterrupt:
        print("fastsam: error: interrupted", file=sys.stderr)
        return 130
    except ImportError as error:  # a checkout without the native module, or a missing dependency
        if "--debug" in sys.argv:
            raise
        print(f"fastsam: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
