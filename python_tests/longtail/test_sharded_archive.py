"""Archives of sharded networks: what is read when only the settings of a run are needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastsam.files import to_json, write_text
from fastsam.longtail.archive import write_archive
from fastsam.longtail.errors import DamagedError
from fastsam.longtail.sharded_archive import (
    MANIFEST,
    _sha256,
    read_sharded_archive,
    read_sharded_outline,
)


def test_an_outline_reads_and_verifies_one_small_file(tmp_path: Path) -> None:
    content = {
        "epoch": 3,
        "buffer": torch.arange(4),
        "weight": torch.empty(5, 2, device="meta"),  # in the place of a sharded one
    }
    whole = tmp_path / "whole.pt"
    write_archive(whole, content)
    # Another file of the archive, which an outline does not even open.
    sums = {"whole.pt": _sha256(whole), "__0_0.distcp": "0" * 64}
    write_text(tmp_path / MANIFEST, to_json({"files": sums}))
    outline = read_sharded_outline(tmp_path)
    assert outline["epoch"] == 3
    assert {outline[name].device.type for name in ("buffer", "weight")} == {"meta"}
    assert (outline["buffer"].shape, outline["weight"].shape) == ((4,), (5, 2))
    with pytest.raises(DamagedError, match="__0_0"):
        read_sharded_archive(tmp_path)
    damaged = bytearray(whole.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    whole.write_bytes(damaged)
    with pytest.raises(DamagedError, match=r"the SHA-256 of whole\.pt is wrong"):
        read_sharded_outline(tmp_path)
