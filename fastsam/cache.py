"""The folder in which fastsam keeps what it can compute again."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "FASTSAM_CACHE"
"""Environment variable that names another folder than the user's cache folder."""


def cache_folder() -> Path:
    """Return ``$FASTSAM_CACHE``, or ``fastsam`` in the user's cache folder; it may not exist yet."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    import platformdirs

    return platformdirs.user_cache_path("fastsam", appauthor=False, opinion=False)
