"""Print the requirements of extras of the installed package: ``python .ci/extras.py EXTRA ...``.

Installing them by ``pip install --editable ".[EXTRA]"`` would build the package again.
"""

from __future__ import annotations

import sys
from importlib.metadata import requires

from packaging.requirements import Requirement


def main() -> None:
    """Print one requirement a line."""
    for text in requires("fastsam-torch") or ():
        requirement = Requirement(text)
        marker, requirement.marker = requirement.marker, None
        if marker is not None and any(marker.evaluate({"extra": name}) for name in sys.argv[1:]):
            print(requirement)


if __name__ == "__main__":
    main()
