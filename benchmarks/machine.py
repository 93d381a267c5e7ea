"""Machine and versions of a result, and the files of results."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fastsam
from fastsam.files import write_text
from fastsam.kernels.backends import VARIABLE, kernels_mode

RESULTS = Path(__file__).parent / "results"


def environment(device: torch.device, packages: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return processor, timed GPU, versions, threads and command, without the name of the host."""
    info: dict[str, Any] = {
        "command": shlex.join(["python", "-m", _module(), *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastsam": fastsam.__version__,
        "commit": commit_of(Path(__file__).parent),
        "native": fastsam.build_info(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        info["gpu"] = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "torch_cuda": torch.version.cuda,
        }
    for package in packages:
        info[package] = metadata.version(package)
    return info


def commit_of(tree: Path) -> str | None:
    """Return the short commit of a checkout, with ``+`` if files of it were changed.

    New results are no changes. Outside a checkout, and without git, it is None.
    """
    if shutil.which("git") is None:
        return None
    git = ["git", "-C", str(tree)]
    found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if found.returncode:
        return None
    sources = [":(top)", ":(top,exclude)benchmarks/results"]
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *sources]).returncode
    return found.stdout.strip() + ("+" if changed else "")


def refuse_fallback(device: str) -> None:
    """Exit if PyTorch operations would be timed instead of native kernels.

    ``FASTSAM_KERNELS=torch`` allows it.
    """
    if kernels_mode() == "torch":
        return
    try:
        fastsam.require_native(device)
    except RuntimeError as error:
        raise SystemExit(
            f"{error}. To time fastsam on PyTorch operations instead, set {VARIABLE}=torch"
        ) from error


def save(
    case: str, results: dict[str, Any], *, device: str = "cpu", folder: Path | None = None
) -> Path:
    """Write the results of a case and their environment to ``CASE-DEVICE.json``, and return its path."""
    timed = torch.device(device)
    path = (folder or RESULTS) / f"{case}-{timed.type}.json"
    content = {"environment": environment(timed), **results}
    write_text(path, json.dumps(content, indent=2) + "\n")
    return path


def copy_bandwidth(device: torch.device, *, elements: int = 1 << 25) -> float:
    """Measure the bandwidth of a large float32 copy (read plus write) in bytes/s: the kernels' limit."""
    from benchmarks.timing import interleaved

    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    timing = interleaved({"copy": lambda: target.copy_(source)}, rounds=9, device=device)["copy"]
    return 2 * source.nbytes / timing.median


def _module() -> str:
    """Return the module name that was passed to ``python -m``."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return "benchmarks" if spec is None else spec.name.removesuffix(".__main__")


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
