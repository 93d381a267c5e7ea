"""Properties of the compiled CUDA kernels: sizes of parameters, float64 instructions, registers."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.device_code import inspect_tree, nvcc_flags, run, tool
from python_tests.kernels.emulation import ROOT

TABLES = ["sam.cu", "noise.cu"]
"""Sources of kernels with a table of tensors in their arguments."""


def has(name: str) -> bool:
    try:
        tool(name)
    except FileNotFoundError:
        return False
    return True


needs_nvcc = pytest.mark.skipif(not has("nvcc"), reason="no nvcc")
needs_nvdisasm = pytest.mark.skipif(not (has("nvcc") and has("nvdisasm")), reason="no nvdisasm")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
@pytest.mark.parametrize(("runtime", "limits"), [("11080", {"4096"}), ("12010", {"4096", "32764"})])
@pytest.mark.parametrize("source", TABLES)
def test_no_large_table_is_compiled_before_cuda_12_1(
    source: str, runtime: str, limits: set[str], tmp_path: Path
) -> None:
    """Older compilers reject a kernel with 32 KB of parameters even if it is never launched."""
    include = [f"-I{ROOT / 'csrc' / folder}" for folder in ("include", "math", "testing")]
    subprocess.run(
        [
            *("g++", "-std=c++20", "-O0", "-c", "-x", "c++", str(ROOT / "csrc" / "cuda" / source)),
            *("-DFASTSAM_SIMT", "-DFASTSAM_WITH_CUDA", f"-DCUDART_VERSION={runtime}"),
            *("-w", *include, "-o", str(tmp_path / "kernels.o")),
        ],
        check=True,
    )
    symbols = subprocess.run(
        ["nm", "-C", str(tmp_path / "kernels.o")], check=True, capture_output=True, text=True
    ).stdout
    assert set(re.findall(r"cuda::Arguments<(\d+)l", symbols)) == limits


def compile_on_host(source: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Compile a CUDA source against the emulation, and return the compiler's messages."""
    include = [f"-I{ROOT / 'csrc' / folder}" for folder in ("include", "math", "testing", "cuda")]
    return subprocess.run(
        [
            *("g++", "-std=c++20", "-O0", "-w", "-fsyntax-only", "-x", "c++", str(source)),
            *("-DFASTSAM_SIMT", "-DFASTSAM_WITH_CUDA", *options, *include),
        ],
        check=False,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("source", TABLES)
def test_parameters_beyond_the_limit_do_not_compile(source: str, tmp_path: Path) -> None:
    """Both if a table leaves too little room for other parameters, and if it is not trivially copyable."""
    original = (ROOT / "csrc" / "cuda" / "arguments.cuh").read_text()
    copy = tmp_path / source
    copy.write_text((ROOT / "csrc" / "cuda" / source).read_text())
    faults = [
        (
            "kOtherParameters = 256",
            "kOtherParameters = -300",
            "parameters exceed the limit of their table",
        ),
        (
            "int32_t group_and_flags[kCapacity];",
            "int32_t group_and_flags[kCapacity]; Arguments() {} Arguments(const Arguments&) {}",
            "copies the table byte by byte",
        ),
    ]
    (tmp_path / "arguments.cuh").write_text(original)
    assert compile_on_host(copy).returncode == 0
    for text, fault, message in faults:
        assert original.count(text) == 1
        (tmp_path / "arguments.cuh").write_text(original.replace(text, fault))
        outcome = compile_on_host(copy)
        assert outcome.returncode != 0
        assert message in outcome.stderr


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("source", TABLES)
def test_the_small_form_fits_4096_bytes_of_parameters(source: str, tmp_path: Path) -> None:
    """Every kernel, as laid out by the device compiler; CUDA 12.0 and older accept no more."""
    code = tmp_path / "kernels.ptx"
    flags = [*nvcc_flags("sm_75"), "-DFASTSAM_LARGE_ARGUMENTS=0", "-ptx"]
    run("nvcc", *flags, f"csrc/cuda/{source}", "-o", str(code), cwd=ROOT)
    entries = re.findall(r"\.entry \w+\(\n(.*?)\n\)", code.read_text(), re.DOTALL)
    assert len(entries) >= 4
    for entry in entries:
        end = 0
        for parameter in entry.split(",\n"):
            array = re.search(r"\.align (\d+) \.b8 \w+\[(\d+)\]", parameter)
            scalar = re.search(r"\.param \.[a-z](\d+)", parameter)
            assert array or scalar, parameter
            if array:
                alignment, size = int(array[1]), int(array[2])
            else:
                assert scalar is not None
                alignment = size = int(scalar[1]) // 8
            end = -(-end // alignment) * alignment + size
        assert 0 < end <= 4096


@needs_nvdisasm
@pytest.mark.slow
def test_no_thread_computes_settings_in_float64_and_no_register_spills() -> None:
    """On sm_86, with two float64 units per multiprocessor. An earlier version ran 75 to 213 such instructions
    in every thread of Adam before its first element, and two for each element of the norm.
    """
    kernels = inspect_tree(ROOT, "sm_86")
    assert len(kernels) == 4 * 7 + 2 * 3
    for name, row in kernels.items():
        assert row["spill_bytes"] == 0, name
        float64 = sum(row["body"].values())
        if name.endswith("float64"):
            continue
        if name.startswith(("perturb", "check", "restore")):
            assert float64 == 0, name
        if name.startswith("update"):
            assert float64 <= 1, name  # reads the loss scale
        if name.startswith("norm"):
            # Two a pack in eight places; the sums over a block and over all blocks.
            assert row["body"].get("F2F.F64.F32", 0) <= 8, name
            assert float64 <= 70, name
    assert kernels["update Adam bfloat16"]["occupancy"] >= 0.6
