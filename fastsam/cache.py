"""The folder for files that fastsam can compute again."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "FASTSAM_CACHE"
"""Environment variable that sets the cache folder."""


def cache_folder() -> Path:
    """Return ``$FASTSAM_CACHE``, or by default ``fastsam`` in the user's cache folder.

    The folder is not created.
    """
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    import platformdirs

    return platformdirs.user_cache_path("fastsam", appauthor=False, opinion=False)
