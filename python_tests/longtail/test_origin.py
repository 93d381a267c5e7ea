"""Date, command, version and commit of a result."""

from __future__ import annotations

import shutil
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

import fastsam
from fastsam.longtail.origin import Origin, command_line, commit_of


def test_origin_says_when_and_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/bin/fastsam", "train", "--out", "a b", "\x1b"])
    origin = Origin.here()
    age = datetime.now(timezone.utc) - datetime.fromisoformat(origin.date)
    assert timedelta(seconds=-1) < age < timedelta(minutes=1)
    assert origin.command == r"fastsam train --out 'a b' '\x1b'"
    assert origin.version == fastsam.__version__


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["/x/fastsam/__main__.py", "demo"], "fastsam demo"),
        (["/x/other/__main__.py", "demo"], "python /x/other/__main__.py demo"),
        (["run.py"], "python run.py"),
    ],
)
def test_command_line_starts_with_the_program(arguments: list[str], expected: str) -> None:
    assert command_line(arguments) == expected


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_commit_says_whether_files_changed(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        person = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ["git", *person, *arguments]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.strip()

    assert commit_of(tmp_path) is None
    git("init", "--quiet")
    assert commit_of(tmp_path) is None  # no commit yet
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "--quiet", "-m", "first")
    git("tag", "-m", "release", "v1")
    commit = git("rev-parse", "HEAD")
    assert commit_of(tmp_path) == commit
    (tmp_path / "a").write_text("2")
    assert commit_of(tmp_path) == f"{commit}-dirty"
