"""Results about a set of image files that are kept in the cache."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fastsam.cache import CACHE_VARIABLE, cache_folder
from fastsam.extras import requires_extra
from fastsam.files import write_text

_VERSION = 1
_Result = TypeVar("_Result")


def cached(
    what: str,
    folder: str,
    content: str,
    key: Mapping[str, Any],
    make: Callable[[], _Result],
    *,
    to_json: Callable[[_Result], Any],
    from_json: Callable[[Any], _Result],
) -> _Result:
    """Return a result about files with a given content, from the cache if possible.

    The cache is ``folder`` in :func:`fastsam.cache.cache_folder`. A damaged cache file is replaced. If the
    folder cannot be written to, a warning is issued.

    Args:
        what: name of the result for the warning.
        folder: name of the folder.
        content: hash of the contents of the files, in order.
        key: what else the result depends on, as JSON values. The release of Pillow is added.
        make: function that computes the result.
        to_json: converts the result to a JSON value.
        from_json: converts a JSON value to the result. It may raise ValueError, TypeError, KeyError or
            AttributeError for a damaged value.
    """
    with requires_extra("longtail", f"a {what} of image files"):
        import PIL

    whole = {"version": _VERSION, "content": content, **key, "pillow": PIL.__version__}
    whole = json.loads(json.dumps(whole))
    path = cache_folder() / folder / f"{content}.json"
    try:
        kept = json.loads(path.read_text("utf-8"))
        if kept["key"] == whole:
            return from_json(kept["result"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass
    result = make()
    try:
        write_text(path, json.dumps({"key": whole, "result": to_json(result)}))
    except OSError as error:
        warnings.warn(
            f"cannot cache the {what} in {path.parent} ({error}), so it is repeated at the next start; "
            f"set {CACHE_VARIABLE} to a writable folder",
            stacklevel=3,
        )
    return result
