"""The command ``fastsam doctor``."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import fastsam
from fastsam.cli.output import show
from fastsam.extras import Extra, install_command
from fastsam.kernels.backends import cuda_version
from fastsam.longtail.registry import PLUGINS, load_plugins

_OPTIONAL_PACKAGES: dict[str, tuple[Extra, str]] = {
    "matplotlib": ("plots", "figures"),
    "scikit-learn": ("longtail", "digits-lt"),
    "joblib": ("longtail", "demo"),
    "pillow": ("longtail", "image files"),
    "jinja2": ("longtail", "reports"),
    "plotly": ("longtail", "reports"),
    "scipy": ("longtail", "distances between spectra"),
    "tqdm": ("longtail", "progress bars"),
    "torchvision": ("longtail", "CIFAR, image folders, ImageNet networks"),
    "pyyaml": ("longtail", "settings from a file"),
    "timm": ("longtail", "timm networks"),
    "torchcodec": ("decode", "faster decoding of JPEG files"),
    "onnx": ("export", "export to ONNX"),
    "onnxscript": ("export", "export to ONNX"),
    "safetensors": ("export", "export to safetensors"),
    "datasets": ("huggingface", "--data hf:NAME"),
    "optuna": ("optuna", "tune --sampler optuna"),
    "tensorboard": ("tensorboard", "--track tensorboard"),
    "wandb": ("wandb", "--track wandb"),
    "mlflow-skinny": ("mlflow", "--track mlflow"),
}
"""The extra that installs each optional package, and what the package is for."""


@dataclass(frozen=True)
class Doctor:
    """Show versions, native kernels, optional packages and plug-ins of this installation."""

    def run(self) -> None:
        """Print the native build, the optional packages and the plug-ins."""
        print(f"fastsam: {fastsam.__version__}")
        print(f"torch: {importlib.metadata.version('torch')}")
        native = fastsam.build_info()
        backends = native.pop("backends", {})
        for name, value in _native_build(native).items():
            print(f"{name}: {value}")
        for device, backend in backends.items():
            print(f"kernels on {device}: {backend}")
        for package, (extra, purpose) in _OPTIONAL_PACKAGES.items():
            try:
                print(f"{package}: {importlib.metadata.version(package)} ({purpose})")
            except importlib.metadata.PackageNotFoundError:
                print(f"{package}: not installed ({purpose}): {install_command(package, extra)}")
        failed = load_plugins()
        for point in importlib.metadata.entry_points(group=PLUGINS):
            show(f"plug-in {point.name}: {failed.get(point.name, 'loaded')} ({point.value})")


def _native_build(native: Mapping[str, Any]) -> dict[str, str]:
    """Describe the native module, and the GPUs that it finds, in words."""
    lines = {
        "compiler": native["compiler"],
        "OpenMP": "yes" if native["openmp"] else "no",
        "built with CUDA": "no",
    }
    if native["cuda"]:
        driver, devices = native["cuda_driver"], native["cuda_devices"]
        found = "no NVIDIA driver"
        if driver:
            found = f"the NVIDIA driver supports CUDA {cuda_version(driver)}"
        lines |= {
            "built with CUDA": f"{cuda_version(native['cuda_runtime'])}, for architectures "
            f"{native['cuda_architectures']}",
            "GPUs found": f"{devices or 'none'} ({found})",
        }
    return lines | {"FASTSAM_KERNELS": native["kernels"]}


def command(arguments: Sequence[str]) -> type[Doctor]:
    """Return the command; its options do not depend on ``arguments``."""
    return Doctor
