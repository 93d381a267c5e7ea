"""Files are written atomically with the correct mode, and one process locks a folder."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch

from fastsam import files
from fastsam.files import (
    FolderBusyError,
    check_room,
    from_json,
    locked,
    remove_orphans,
    to_json,
    write_atomically,
    write_bytes,
    write_text,
)
from python_tests.limits import file_size_limit


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "a.txt"
    write_text(path, "old")

    def fail(file: IO[bytes]) -> None:
        file.write(b"half of the ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert names(path.parent) == ["a.txt"]


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_the_mode_follows_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_text(tmp_path / "a.txt", "new")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "a.txt").symlink_to(tmp_path / "precious")
    write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / "a.txt").read_text() == "new"
    assert not (tmp_path / "a.txt").is_symlink()


def test_file_and_folder_reach_the_disk_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        done.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        fsync(handle)

    def renamed(source: Path, target: Path) -> None:
        done.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_text(tmp_path / "a.txt", "new")
    assert done == ["file", "rename", "folder"]


def test_too_large_a_file_is_one_line_with_sizes(tmp_path: Path) -> None:
    """For all writers: a library in C++ (torch), one that seeks (NumPy), and plain Python."""
    path = tmp_path / "a.pt"
    write_text(path, "old")
    values = torch.zeros(500_000)
    writers = (
        lambda file: torch.save({"x": values}, file),
        lambda file: np.savez(file, x=values.numpy()),
        lambda file: file.write(values.numpy().tobytes()),
    )
    for write in writers:
        with file_size_limit(1_000_000), pytest.raises(OSError, match="File too large") as caught:
            write_atomically(path, write)
        message = str(caught.value)
        assert f"{path} needs 2.0 MB, the limit on files (ulimit -f) is 1.0 MB" in message
        assert "\n" not in message
        assert caught.value.errno == errno.EFBIG
        assert path.read_text() == "old"
        assert names(tmp_path) == ["a.pt"]


def test_check_room_finds_a_lack_of_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_room(tmp_path, 1000, 1000)
    with file_size_limit(10_000), pytest.raises(OSError, match=r"needs 0\.0 MB, the limit"):
        check_room(tmp_path, 20_000)
    # Other processes need the free space meanwhile: nothing is allocated if it does not suffice.
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    allocated: list[int] = []
    monkeypatch.setattr(os, "posix_fallocate", lambda handle, start, size: allocated.append(size))
    with pytest.raises(OSError, match=r"No space left on device.* MB free"):
        check_room(tmp_path, 1000, free + (1 << 40))
    assert allocated == [1000]
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=rf"{tmp_path}/file/a\.txt") as caught:
        write_text(tmp_path / "file" / "a.txt", "x")
    assert files.OWN_FILES not in str(caught.value)


KILLED_INSIDE_A_WRITE = """
import os, signal, sys
from pathlib import Path
from fastsam.files import write_atomically

def write(file):
    file.write(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

write_atomically(Path(sys.argv[1]), write)
"""

HOLDS = """
import sys, time
from pathlib import Path
from fastsam.files import locked, write_atomically

def write(file):
    file.write(b"half")
    print("ready", flush=True)
    sys.stdin.readline()

if sys.argv[2] == "lock":
    with locked(Path(sys.argv[1])):
        print("ready", flush=True)
        sys.stdin.readline()
else:
    write_atomically(Path(sys.argv[1]) / "a.txt", write)
"""


@contextmanager
def holder(folder: Path, what: str, program: str = HOLDS) -> Iterator[subprocess.Popen[str]]:
    """Start a process that locks a folder or writes a file in it, and kill it at the end."""
    command = [sys.executable, "-c", program, str(folder), what]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def test_only_files_of_killed_writers_are_removed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED_INSIDE_A_WRITE, str(tmp_path / "a.txt")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    (orphan,) = names(tmp_path)
    assert orphan.startswith(".fastsam-")
    foreign = [".a.txt.partial", ".fastsam-notes", "b.partial"]
    for name in foreign:
        (tmp_path / name).write_text("mine")
    with holder(tmp_path, "write") as process:
        before = names(tmp_path)
        remove_orphans(tmp_path)
        assert set(before) - set(names(tmp_path)) == {orphan}  # not the one being written
        process.communicate("go on\n", timeout=30)
    assert (tmp_path / "a.txt").read_bytes() == b"half"
    assert set(names(tmp_path)) == {"a.txt", *foreign}


def test_a_folder_is_locked_by_one_process(tmp_path: Path) -> None:
    with holder(tmp_path, "lock") as process:
        with pytest.raises(FolderBusyError) as caught, locked(tmp_path):
            pass
        assert f"{tmp_path} is in use by process {process.pid} on " in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
        assert names(tmp_path) == [".fastsam-lock"]
    assert names(tmp_path) == [".fastsam-lock"]  # a stale one
    with locked(tmp_path):
        assert (tmp_path / ".fastsam-lock").read_text().split()[1] == str(os.getpid())
    assert names(tmp_path) == []


def test_a_child_of_a_killed_process_does_not_keep_the_folder(tmp_path: Path) -> None:
    """Like DataLoader workers, which outlive their parent by some seconds."""
    program = "import os, time\n" + HOLDS.replace(
        "    with locked(Path(sys.argv[1])):\n",
        "    with locked(Path(sys.argv[1])):\n"
        "        child = os.fork()\n"
        "        if not child:\n"
        "            os.close(1)\n"
        "            time.sleep(60)\n"
        "            os._exit(0)\n"
        "        Path(sys.argv[1]).with_suffix('.child').write_text(str(child))\n",
    )
    folder = tmp_path / "run"
    with holder(folder, "lock", program):
        pass
    child = int(folder.with_suffix(".child").read_text())
    try:
        with locked(folder):
            pass
        os.kill(child, 0)  # it is still there
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_lock_on_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_try_lock", lambda handle, kind: None)
    with (
        holder(tmp_path, "lock"),
        pytest.raises(FolderBusyError, match="if that process is gone, remove"),
        locked(tmp_path),
    ):
        pass
    with locked(tmp_path):
        pass
    (tmp_path / ".fastsam-lock").write_text("elsewhere 1\n")
    with pytest.raises(FolderBusyError, match="process 1 on elsewhere"), locked(tmp_path):
        pass


@pytest.mark.slow
def test_many_processes_take_turns(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from fastsam.files import FolderBusyError, locked\n"
        "folder, had = Path(sys.argv[1]), 0\n"
        "while had < 30:\n"
        "    try:\n"
        "        with locked(folder):\n"
        "            number = int((folder / 'n').read_text())\n"
        "            (folder / 'n').write_text(str(number + 1))\n"
        "            had += 1\n"
        "    except FolderBusyError:\n"
        "        pass\n"
    )
    (tmp_path / "n").write_text("0")
    command = [sys.executable, "-c", program, str(tmp_path)]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    assert (tmp_path / "n").read_text() == "90"
    assert names(tmp_path) == ["n"]


def test_json_with_a_checksum() -> None:
    document = {"a": [1, 2.5, float("inf"), None], "b": {"c": "é", "d": (1, 2)}, "e": {3: True}}
    text = to_json(document)
    assert from_json(text) == {**document, "b": {"c": "é", "d": [1, 2]}, "e": {"3": True}}
    assert from_json(json.dumps({"old": 1})) == {"old": 1}
    for wrong in (text.replace("2.5", "2.6"), text.replace('"a"', '"f"')):
        with pytest.raises(ValueError, match="checksum is wrong"):
            from_json(wrong)
    for wrong in ("[1]", "", "{", "[" * 100_000, '{"a": ' * 100_000):
        with pytest.raises(ValueError, match=r"."):
            from_json(wrong)


def test_large_writes_are_whole(tmp_path: Path) -> None:
    content = np.random.default_rng(3).bytes(3_000_001)
    write_bytes(tmp_path / "a", content)
    assert (tmp_path / "a").read_bytes() == content
    began = time.time()
    assert abs((tmp_path / "a").stat().st_mtime - began) < 60
