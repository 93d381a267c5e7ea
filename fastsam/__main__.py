"""The command ``fastsam``, from its first moment on: ``python -m fastsam`` is the same."""

from __future__ import annotations

import sys


def main() -> int:
    """Import the command line, which takes seconds because of torch, and run it."""
    try:
        # First: torch swallows an interrupt while it imports NumPy, of which half would be left.
        import numpy  # noqa: F401

        from fastsam.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("fastsam: error: interrupted", file=sys.stderr)
        return 130
    except ImportError as error:  # an unbuilt checkout, or a package of the base install is missing
        if "--debug" in sys.argv:
            raise
        print(f"fastsam: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
