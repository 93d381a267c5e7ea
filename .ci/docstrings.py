"""Render the docstrings of fastsam on the site: doctests as code, and references of Sphinx as names."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|attr|mod|data):`~?\.?([^`]+)`")
_SECTION = re.compile(r"^(\s*)Example:$", re.MULTILINE)


class FastsamDocstrings(griffe.Extension):
    """Rewrite docstrings as they are collected."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rename the section ``Example``, whose doctests only ``Examples`` has, and resolve roles."""
        if obj.docstring is not None:
            text = _SECTION.sub(r"\1Examples:", obj.docstring.value)
            obj.docstring.value = _ROLE.sub(r"`\1`", text)
