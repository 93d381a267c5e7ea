"""The CUDA kernels on the host under sanitizers, and proof that planted faults are caught."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from python_tests.conftest import BASE_SEED
from python_tests.kernels.emulation import ROOT, cmake, compile_command

KERNEL = "csrc/cuda/lanczos.cu"


def build(sanitizer: str) -> Path:
    return cmake(
        ROOT / "build" / f"check-{sanitizer.partition(',')[0]}",
        f"-DFASTSAM_SANITIZE={sanitizer}",
        target="kernel_check",
        optimise="-O0",  # sanitizers at -O1 take four times as long to compile and find no more
    )


@pytest.fixture(scope="session")
def address_build() -> Path:
    return build("address,undefined")


@pytest.fixture(scope="session")
def thread_build() -> Path:
    return build("thread")


def run(program: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), str(BASE_SEED), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "UBSAN_OPTIONS": "print_stacktrace=1", **environment},
    )


@pytest.mark.parametrize(
    "small",
    [pytest.param(False, marks=pytest.mark.slow), True],
    ids=["32 KB arguments", "4 KB arguments"],
)
def test_address_and_undefined_behaviour_sanitizers_are_silent(
    address_build: Path, small: bool
) -> None:
    environment = {"FASTSAM_SIMT_SMALL_ARGUMENTS": "1"} if small else {}
    outcome = run(address_build / "kernel_check", **environment)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert outcome.stderr == ""
    assert "0 failed" in outcome.stdout


def test_every_source_is_compiled_with_warnings_as_errors(address_build: Path) -> None:
    commands = json.loads((address_build / "compile_commands.json").read_text())
    own = [entry for entry in commands if "/csrc/" in entry["file"]]
    assert {Path(entry["file"]).suffix for entry in own} == {".cpp", ".cu"}
    for entry in own:
        missing = {"-Wall", "-Wextra", "-Werror"} - set(shlex.split(entry["command"]))
        assert not missing, entry["file"]


@pytest.mark.slow
def test_thread_sanitizer_is_silent_with_several_blocks_alive(thread_build: Path) -> None:
    outcome = run(thread_build / "kernel_check", "few", FASTSAM_SIMT_LIVE_BLOCKS="3")
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert outcome.stderr == ""


def plant(
    build_folder: Path, folder: Path, original: str, fault: str, *, source: str = KERNEL
) -> Path:
    """Build a kernel_check with ``original`` in ``source`` replaced by ``fault``, for the Lanczos kernels."""
    text = (ROOT / source).read_text()
    assert text.count(original) == 1, f"{original!r} must name one place in {source}"
    mutant = folder / "lanczos.cu"
    mutant.write_text((ROOT / KERNEL).read_text())
    # If it is a header, this folder is searched first.
    (folder / Path(source).name).write_text(text.replace(original, fault))
    command = compile_command(build_folder, KERNEL)
    include = ["-I", str((ROOT / KERNEL).parent)]
    subprocess.run(
        [*command, *include, "-c", str(mutant), "-o", str(folder / "mutant.o")],
        check=True,
        capture_output=True,
        cwd=build_folder,
    )
    objects = [
        path
        for path in build_folder.glob("CMakeFiles/**/*.o")
        if path.name != "lanczos.cu.o" and "native" not in path.parts[-4:][0]
    ]
    sanitize = [word for word in command if word.startswith("-fsanitize")]
    program = folder / "kernel_check"
    subprocess.run(
        [command[0], *sanitize, str(folder / "mutant.o"), *map(str, objects), "-o", str(program)],
        check=True,
        capture_output=True,
    )
    return program


@pytest.mark.slow
def test_a_missing_barrier_is_caught(thread_build: Path, tmp_path: Path) -> None:
    barrier = "__syncthreads();\n    project_tile"
    program = plant(thread_build, tmp_path, barrier, "project_tile")
    outcome = run(program, "few", FASTSAM_SIMT_LIVE_BLOCKS="2")
    assert outcome.returncode != 0
    assert "data race" in outcome.stderr


@pytest.mark.slow
def test_a_missing_wait_for_the_last_block_is_caught(thread_build: Path, tmp_path: Path) -> None:
    """Every block adds up the partial sums without waiting for the others: a race between blocks."""
    wait = "if (!is_last_block(counters + probe, gridDim.x, flag)) return;\n  add_blocks"
    program = plant(
        thread_build,
        tmp_path,
        wait,
        "is_last_block(counters + probe, gridDim.x, flag);\n  add_blocks",
    )
    outcome = run(program, "few", FASTSAM_SIMT_LIVE_BLOCKS="2")
    assert outcome.returncode != 0
    assert "data race" in outcome.stderr


@pytest.mark.slow
def test_an_off_by_one_is_caught(address_build: Path, tmp_path: Path) -> None:
    program = plant(
        address_build,
        tmp_path,
        "value[c] = first + c < columns ?",
        "value[c] = first + c <= columns ?",
    )
    outcome = run(program, "few")
    assert outcome.returncode != 0
    assert "AddressSanitizer" in outcome.stderr or "runtime error" in outcome.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fence", "without"),
    [
        pytest.param("__threadfence();\n    const bool last", "const bool last", id="writers"),
        pytest.param("if (last) {\n      __threadfence();", "if (last) {", id="reader"),
    ],
)
def test_a_missing_fence_is_caught(
    fence: str, without: str, thread_build: Path, tmp_path: Path
) -> None:
    """Without a fence, partial sums of other blocks need not be visible to the last block.

    Both sides need a fence: the writers before they increment the counter, the reader after it has read the
    final count. Without the second, the reader may get stale values from the cache of its multiprocessor.
    """
    program = plant(thread_build, tmp_path, fence, without, source="csrc/cuda/launch.cuh")
    outcome = run(program, "few", FASTSAM_SIMT_LIVE_BLOCKS="3")
    assert outcome.returncode != 0
    assert "data race" in outcome.stderr
