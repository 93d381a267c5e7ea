"""Builds the CUDA kernels for the host, with or without sanitizers."""

from __future__ import annotations

import fcntl
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pybind11

ROOT = Path(__file__).parents[2]


def cmake(build: Path, *options: str, target: str, optimise: str = "-O1") -> Path:
    """Configure and build ``target`` with the emulated CUDA kernels. Repeated calls are cheap."""
    configure = [
        *("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DFASTSAM_SIMT=ON"),
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        "-DCMAKE_BUILD_TYPE=RelWithDebInfo",
        "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON",
        f"-DCMAKE_CXX_FLAGS_RELWITHDEBINFO={optimise} -g",
        *options,
    ]
    build.parent.mkdir(exist_ok=True)
    with build.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes share the folder
        for command in (configure, ["cmake", "--build", str(build), "--target", target]):
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    return build


def compile_command(build: Path, source: str) -> list[str]:
    """Return the command that compiled ``source`` in ``build``, without its input and output."""
    entries = json.loads((build / "compile_commands.json").read_text())
    command = shlex.split(next(e["command"] for e in entries if e["file"].endswith(source)))
    start = command.index("-o")
    return [word for word in command[:start] if word != "-c"]
