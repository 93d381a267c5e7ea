"""Backends of devices: native kernels, warnings and errors without them, and cases without a fallback."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastsam
from benchmarks.machine import refuse_fallback
from fastsam.curvature import MatrixOperator, operator_spectrum
from fastsam.kernels import backends, extension
from fastsam.optim.obstacles import obstacle

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture(autouse=True)
def _forget_warnings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    backends._warn_of_fallback.cache_clear()
    yield
    backends._warn_of_fallback.cache_clear()


def built(monkeypatch: pytest.MonkeyPatch, **info: Any) -> None:
    """Replace the native module by one with this build info, and CUDA kernels if it lists them.

    The GPU has compute capability 9.0.
    """
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    info = {"cuda_architectures": "90", **info}
    module = SimpleNamespace(cpu=object(), build_info=lambda: info)
    if info.get("cuda"):
        module.cuda = object()
    monkeypatch.setattr(extension, "_native", module)


def test_the_device_and_the_mode_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backends.backend_of(CPU) == "native"
    with pytest.warns(backends.FallbackWarning):
        assert backends.backend_of(META) == "torch"
    monkeypatch.setenv(backends.VARIABLE, "torch")
    assert backends.backend_of(CPU) == backends.backend_of(META) == "torch"
    monkeypatch.setenv(backends.VARIABLE, "native")
    assert backends.backend_of(CPU) == "native"
    with pytest.raises(RuntimeError, match="no kernels for 'meta' devices"):
        backends.backend_of(META)


def test_an_unknown_mode_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.VARIABLE, "Torch")
    for call in (lambda: backends.backend_of(CPU), fastsam.build_info, fastsam.require_native):
        with pytest.raises(ValueError, match=r"FASTSAM_KERNELS is 'Torch'; expected 'auto', "):
            call()


def test_the_warning_comes_once_for_each_reason() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            backends.backend_of(META)
            backends.backend_of(torch.device("mps"))
    texts = [str(each.message) for each in caught]
    assert len(texts) == 2
    assert "'meta'" in texts[0]
    assert "'mps'" in texts[1]
    for text in texts:
        assert "every tensor takes several launches" in text
        assert "To get the kernels: " in text


def test_only_rank_0_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert backends.backend_of(META) == "torch"  # pytest turns warnings into errors


@pytest.mark.parametrize(
    ("info", "reason", "advice"),
    [
        ({"cuda": False}, "built without CUDA kernels", "toolkitpath=$HOME/cuda"),
        (
            {"cuda": True, "cuda_runtime": 13000, "cuda_driver": 12080},
            "built with CUDA 13.0, but the NVIDIA driver supports only CUDA 12.8",
            "update the driver, or build with a toolkit that it supports",
        ),
        (
            {"cuda": True, "cuda_architectures": "75-real, 80-real, 100-real, 120"},
            "built for the CUDA architectures 75-real, 80-real, 100-real, 120, but cuda:0 has compute "
            "capability 9.0",
            "CUDAARCHS=90 pip install .",
        ),
        ({"cuda": True, "cuda_runtime": 12090, "cuda_driver": 12020}, None, None),
        ({"cuda": True, "cuda_runtime": 12090, "cuda_driver": 13000}, None, None),
    ],
)
def test_reasons_why_a_gpu_has_no_kernels(
    info: dict[str, Any], reason: str | None, advice: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(monkeypatch, **info)
    device = torch.device("cuda", 0)
    if reason is None or advice is None:
        assert backends.backend_of(device) == "native"
        fastsam.require_native(device)
        return
    with pytest.warns(backends.FallbackWarning) as caught:
        assert backends.backend_of(device) == "torch"
    with pytest.raises(RuntimeError) as refused:
        fastsam.require_native("cuda:0")
    for text in (str(caught[0].message), str(refused.value)):
        assert reason in text
        assert advice in text


@pytest.mark.parametrize(
    ("architectures", "runs", "fails"),
    [
        ("75-real", [(7, 5)], [(7, 0), (8, 0), (8, 6)]),
        ("80-real", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        ("86-real", [(8, 6), (8, 9)], [(8, 0)]),
        ("90", [(9, 0), (10, 0), (12, 1)], [(8, 9)]),
        ("120-virtual", [(12, 0), (12, 1), (13, 0)], [(10, 0)]),
        ("90a", [(9, 0)], [(8, 0), (10, 0)]),
        ("100f-real", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("100f", [(10, 0), (10, 3)], [(12, 0)]),
        ("75-real, 80-real 100-real, 120", [(7, 5), (8, 6), (12, 0), (13, 0)], [(7, 0), (9, 0)]),
        ("native", [(7, 0), (9, 0)], []),
    ],
)
def test_architectures(
    architectures: str, runs: list[tuple[int, int]], fails: list[tuple[int, int]]
) -> None:
    """The compatibility rules of the CUDA programming guide, for CMake's names."""
    assert all(backends.runs_on(architectures, capability) for capability in runs)
    assert not any(backends.runs_on(architectures, capability) for capability in fails)


def test_each_gpu_has_its_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    built(monkeypatch, cuda=True, cuda_architectures="80-real")
    capabilities = {0: (8, 0), 1: (7, 5)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: capabilities[d.index])
    assert backends.backend_of(torch.device("cuda", 0)) == "native"
    with pytest.warns(backends.FallbackWarning, match=r"cuda:1 has compute capability 7\.5"):
        assert backends.backend_of(torch.device("cuda", 1)) == "torch"


def test_the_reason_names_amd_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.raises(RuntimeError, match="AMD GPUs"):
        fastsam.require_native("cuda:0")


def test_require_native(monkeypatch: pytest.MonkeyPatch) -> None:
    fastsam.require_native("cpu")
    monkeypatch.setattr(backends, "present_device", lambda: "xpu")
    with pytest.raises(RuntimeError, match="'xpu' devices"):
        fastsam.require_native()
    monkeypatch.setenv(backends.VARIABLE, "torch")
    with pytest.raises(RuntimeError, match="FASTSAM_KERNELS=torch disables the native kernels"):
        fastsam.require_native("cpu")


def test_build_info_lists_the_backend_of_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "present_device", lambda: "mps")
    info = fastsam.build_info()
    assert info["kernels"] == "auto"
    assert info["backends"]["cpu"] == "native"
    assert info["backends"]["mps"].startswith("torch (fastsam has no kernels for 'mps'")
    monkeypatch.setenv(backends.VARIABLE, "torch")
    assert fastsam.build_info()["backends"]["cpu"] == "torch"


def test_the_explanation_names_the_folder_and_the_fix(tmp_path: Path) -> None:
    package, other = tmp_path / "checkout" / "fastsam", tmp_path / "site" / "fastsam"
    for folder in (package, other):
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
    path = ["", str(package.parent)]
    (package.parent / "pyproject.toml").touch()
    missing = ImportError("no module", path=str(package / "__init__.py"))
    alone = extension._explanation(package, path, missing)
    assert alone.startswith(f"{package.parent} is a checkout whose native module is not built: run")
    shadowing = extension._explanation(package, [*path, str(other.parent)], missing)
    assert "it hides the installed fastsam: start Python in another folder" in shadowing
    broken = ImportError("undefined symbol: omp_get_thread_num", path="/x/_native.so")
    for place in (package, other):
        text = extension._explanation(place, path, broken)
        assert re.search("undefined symbol.*force-reinstall", text)


def test_benchmarks_time_the_fallback_where_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_fallback("cpu")
    with pytest.raises(SystemExit, match=r"'meta' devices.*set FASTSAM_KERNELS=torch"):
        refuse_fallback("meta")
    monkeypatch.setenv(backends.VARIABLE, "torch")
    refuse_fallback("meta")


def test_a_step_on_pytorch_operations_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = fastsam.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    assert obstacle(model, optimizer) is None
    monkeypatch.setenv(backends.VARIABLE, "torch")
    assert "PyTorch operations, which are not captured" in (obstacle(model, optimizer) or "")


@pytest.mark.parametrize(("before", "after"), [("native", "torch"), ("torch", "native")])
def test_a_spectrum_is_not_resumed_on_the_other_backend(
    before: str, after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator = MatrixOperator(torch.diag(torch.arange(1.0, 21.0)))
    monkeypatch.setenv(backends.VARIABLE, before)
    first = operator_spectrum(operator, steps=5, checkpoint=tmp_path / "run", progress=False)
    assert first.settings["backend"] == before
    monkeypatch.setenv(backends.VARIABLE, after)
    with pytest.raises(ValueError, match=r"other settings \(backend\)"):
        operator_spectrum(operator, steps=5, checkpoint=tmp_path / "run", progress=False)
