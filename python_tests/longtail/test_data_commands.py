"""`fastsam data check` and `fastsam data convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from archives import write_inaturalist_json, write_listed

from fastsam.cli import main
from fastsam.longtail.data.lists import read_list


def failure(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
    """The one line of a command that must fail."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_data_check(tmp_path: Path, capsys: Any) -> None:
    assert main(["data", "check", "digits-lt", "--imbalance", "50"]) == 0
    output = capsys.readouterr().out
    assert "10 classes, 2 to 100 training images" in output
    assert "SHA-256" in output
    assert "Where to get cifar10-lt" in failure(
        capsys, 1, "data", "check", "cifar10-lt", "--root", tmp_path
    )
    assert "places2" in failure(capsys, 1, "data", "check", "places-lt", "--root", tmp_path)
    assert "valid: digits-lt" in failure(capsys, 2, "data", "check", "mnist")
    write_listed(tmp_path, {"train.txt": ("a", [2, 1]), "test.txt": ("b", [1, 1])})
    assert main(["data", "check", "list", "--root", str(tmp_path), "--decode"]) == 0
    assert "every image can be decoded" in capsys.readouterr().out
    broken = tmp_path / "b" / "n00000001" / "test_0.JPEG"
    broken.write_bytes(broken.read_bytes()[:300])
    assert main(["data", "check", "list", "--root", str(tmp_path)]) == 0
    assert "1 images cannot be decoded" in failure(
        capsys, 1, "data", "check", "list", "--root", tmp_path, "--decode"
    )


def test_data_convert(tmp_path: Path, capsys: Any) -> None:
    source, out = tmp_path / "train2018.json", tmp_path / "list.txt"
    assert "no file" in failure(capsys, 1, "data", "convert", source, out)
    write_inaturalist_json(source, [3, 1])
    assert main(["data", "convert", str(source), str(out)]) == 0
    assert len(read_list(out)) == 4
    assert "--overwrite" in failure(capsys, 2, "data", "convert", source, out)
