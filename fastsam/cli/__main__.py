"""Entry point of ``python -m fastsam.cli``."""

import sys

from fastsam.cli import main

if __name__ == "__main__":
    sys.exit(main())
