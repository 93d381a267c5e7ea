"""Compiled code of the CUDA kernels: float64 instructions, registers and occupancy. Needs no GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import save

ROOT = Path(__file__).parents[1]
FLOAT64 = re.compile(
    r"\b(DADD|DMUL|DFMA|DSETP|DMNMX|MUFU\.\w+64H|[FI]2F[.\w]*F64[.\w]*|F2I[.\w]*F64[.\w]*)"
)
"""Instructions of the float64 units, including conversions."""
THREADS, REGISTERS = 256, 65536
"""Threads per block, and 32-bit registers per multiprocessor on every architecture since sm_50."""
RESIDENT = {"sm_75": 1024, "sm_86": 1536, "sm_89": 1536, "sm_120": 1536}
"""Largest number of resident threads per multiprocessor; 2048 on other architectures."""


@dataclass(frozen=True, kw_only=True)
class DeviceCode:
    """Count float64 instructions, registers and occupancy of every kernel, with nvcc and nvdisasm.

    Float64 instructions are counted separately for the body of a kernel, which all threads execute, and for
    each function that it calls. With --baseline, the rows of two source trees are shown together.
    """

    arch: str = "sm_86"
    """Architecture to compile for."""
    baseline: Path | None = None
    """Checkout of another version to compare with."""
    save: bool = False
    """Write the results to benchmarks/results/."""
    out: Path | None = None
    """Write the results to this folder instead."""

    def run(self) -> None:
        """Compile the kernels, print the counts, and save them."""
        trees = (
            {"after": ROOT} if self.baseline is None else {"before": self.baseline, "after": ROOT}
        )
        kernels: dict[str, dict[str, Any]] = {}
        for label, tree in trees.items():
            for name, row in inspect_tree(tree, self.arch).items():
                kernels.setdefault(name, {})[label] = row
        for name, rows in sorted(kernels.items()):
            print(name)
            for label, row in rows.items():
                called = ", ".join(f"{key} {sum(n.values())}" for key, n in row["called"].items())
                print(
                    f"  {label:6s} float64 {sum(row['body'].values()):4d} in the body, called: "
                    f"{called or 'none'}; {row['registers']} registers, {row['spill_bytes']} bytes "
                    f"spilled, occupancy {row['occupancy']:.0%}"
                )
        if self.save or self.out:
            compiler = run("nvcc", "--version").strip().splitlines()[-1]
            flags = " ".join(nvcc_flags(self.arch))
            results = {"arch": self.arch, "compiler": compiler, "flags": flags, "kernels": kernels}
            save("device_code", results, folder=self.out)


def tool(name: str) -> str:
    """Return the path of a CUDA tool, from PATH, CUDA_HOME or triton's copy."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    spec = importlib.util.find_spec("triton")
    places = [shutil.which(name), f"{home}/bin/{name}"]
    if spec is not None and spec.origin is not None:
        places.append(str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name))
    for place in places:
        if place is not None and Path(place).is_file():
            return place
    raise FileNotFoundError(f"{name} not found; add the CUDA toolkit's bin folder to PATH")


def run(name: str, *arguments: str, cwd: Path | None = None) -> str:
    """Run a CUDA tool and return its output."""
    done = subprocess.run(
        [tool(name), *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{name} {' '.join(arguments)} failed:\n{done.stderr[-4000:]}")
    return done.stdout + done.stderr


def nvcc_flags(arch: str) -> list[str]:
    """Return the compiler flags of a release build."""
    return ["-std=c++17", "-O3", f"-arch={arch}", "-Icsrc/include", "-Icsrc/math"]


def inspect_tree(tree: Path, arch: str) -> dict[str, dict[str, Any]]:
    """Return one row per kernel and dtype of a source tree."""
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted((tree / "csrc" / "cuda").glob("*.cu")):
            binary = Path(folder) / f"{source.stem}.cubin"
            flags = [*nvcc_flags(arch), "-cubin", "-Xptxas", "-v"]
            log = run("nvcc", *flags, f"csrc/cuda/{source.name}", "-o", str(binary), cwd=tree)
            code = float64_of(run("nvdisasm", str(binary)))
            for mangled, registers, spill in resources_of(log):
                name = readable(mangled)
                if name is None:
                    continue
                counts = dict(code[mangled])
                rows[name] = {
                    "body": dict(counts.pop("body", Counter())),
                    "called": {key: dict(value) for key, value in counts.items()},
                    "registers": registers,
                    "spill_bytes": spill,
                    "occupancy": occupancy(registers, arch),
                }
    return rows


def resources_of(log: str) -> list[tuple[str, int, int]]:
    """Parse the log of ``ptxas -v``: mangled name, registers and spilled bytes of every kernel."""
    pattern = r"Compiling entry function '(\S+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
    found = re.findall(pattern, log, re.DOTALL)
    return [(name, int(registers), int(spill)) for name, spill, registers in found]


def float64_of(assembly: str) -> dict[str, dict[str, Counter[str]]]:
    """Count the float64 instructions in the body of every kernel, and in each function it calls."""
    kernels: dict[str, dict[str, Counter[str]]] = {}
    kernel = part = ""
    for line in assembly.splitlines():
        if section := re.match(r"\.text\.(\S+):", line):
            kernel, part = section[1], "body"
            kernels[kernel] = {"body": Counter()}
        elif label := re.match(r"(\$\S+):", line):
            part = called_name(label[1])
        elif kernel and (instruction := FLOAT64.search(line)):
            kernels[kernel].setdefault(part, Counter())[instruction[1]] += 1
    return kernels


def called_name(label: str) -> str:
    """Return a readable name of a function inside a kernel's code."""
    last = label.rsplit("$", 1)[-1]
    if last.startswith("__"):
        return last.strip("_")
    names = re.findall(
        r"(?<=\d)(ascent_settings|squares_in_float64|quotient_in_float64|settings)", last
    )
    return names[-1] if names else last


def readable(mangled: str) -> str | None:
    """Return kernel and dtype; None for the variant with 32 KB of arguments, whose code is the same."""
    table = re.search(r"ArgumentsILl(\d+)E", mangled)
    if table is not None and int(table[1]) > 10_000:
        return None
    found = re.search(
        r"\d(norm|perturb|check|restore|update|noise|project|finish|divide)_kernelI(.*)", mangled
    )
    if found is None:
        return None
    rule = re.match(r"N\w*?\d(Adam|Sgd)E", found[2])
    rest = found[2][rule.end() :] if rule else found[2]
    dtypes = {"f": "float32", "d": "float64"}
    wide = re.match(r"NS_\d+(BFloat16|Float16)E", rest)
    dtype = wide[1].lower() if wide else dtypes[rest[0]]
    return f"{found[1]}{f' {rule[1]}' if rule else ''} {dtype}"


def occupancy(registers: int, arch: str) -> float:
    """Return the occupancy in blocks of 256 threads that the number of registers allows."""
    resident = RESIDENT.get(arch, 2048)
    warp = -(-registers * 32 // 256) * 256
    blocks = min(resident // THREADS, REGISTERS // (warp * THREADS // 32))
    return blocks * THREADS / resident
