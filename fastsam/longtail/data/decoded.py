"""What all images that are already decoded have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from fastsam.longtail.data.preprocessing import Preprocessing
from fastsam.longtail.data.scan import Scan

_Decoded = TypeVar("_Decoded", bound="DecodedImages")


class DecodedImages:
    """Base class of :class:`~fastsam.longtail.data.Images` that are already decoded."""

    @property
    def unreadable(self) -> Mapping[str, int]:
        """Empty: all images can be read. See :meth:`Images.unreadable`."""
        return {}

    @property
    def left_out(self) -> Sequence[str]:
        """Empty: all images can be read. See :meth:`Images.left_out`."""
        return ()

    @property
    def preprocessing(self) -> Preprocessing | None:
        """None: the source of the images is unknown. See :meth:`Images.preprocessing`."""
        return None

    def name_of(self, place: int) -> str:
        """See :meth:`Images.name_of`."""
        return f"image {place}"

    def scan(self, *, progress: bool = False) -> Scan:
        """Return an empty scan, because there is nothing to decode. See :meth:`Images.scan`."""
        return Scan()

    def for_run(self: _Decoded) -> _Decoded:
        """Return this object, which has no state that runs could not share. See :meth:`Images.for_run`."""
        return self

    def close(self) -> None:
        """Do nothing, because there are no workers. See :meth:`Images.close`."""
