"""The backends of every kernel test: cpu, PyTorch operations, the CUDA kernels on the host, and a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from fastsam.kernels import extension
from fastsam.kernels.backends import VARIABLE
from python_tests.kernels.emulation import ROOT, cmake


@pytest.fixture(scope="session")
def emulated() -> ModuleType:
    """Return the native module whose ``cuda`` backend runs on the host."""
    build = cmake(ROOT / "build" / "simt", target="_native_simt")
    path = next(build.glob("_native_simt*.so"))
    spec = importlib.util.spec_from_file_location("_native_simt", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(
    params=["cpu", "torch", "cuda-on-host", pytest.param("cuda", marks=pytest.mark.gpu)],
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Return the device for tensors: for ``cuda-on-host`` the CPU, with the emulated CUDA kernels.

    For ``torch`` it is the CPU, with PyTorch operations.
    """
    monkeypatch.setenv(VARIABLE, "torch" if request.param == "torch" else "native")
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no NVIDIA GPU")
        return torch.device("cuda")
    if request.param == "cuda-on-host":
        module: ModuleType = request.getfixturevalue("emulated")
        monkeypatch.setattr(extension, "_native", module)
        monkeypatch.setattr(extension, "backend", lambda _: module.cuda)
    return torch.device("cpu")


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    """Return the generator of this test's random data."""
    return torch.Generator().manual_seed(seed)


Draw = Callable[..., torch.Tensor]


@pytest.fixture
def draw(generator: torch.Generator, device: torch.device) -> Draw:
    """Return ``draw(*shape, dtype=...)``, which draws standard normal numbers on the device under test."""

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.to(dtype).to(device)

    return normal
