"""The folder in which fastsam keeps what it can compute again."""

from __future__ import annotations

import os
import sys
from pathlib import Path

CACHE_VARIABLE = "FASTSAM_CACHE"
"""Environment variable that names another folder than the user's cache."""


def cache_folder() -> Path:
    """Return ``$FASTSAM_CACHE``, or ``fastsam`` in the user's cache folder."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = str(Path.home() / "Library" / "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "fastsam"
