"""fastsam doctor."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass

import fastsam
from fastsam.cli.output import show
from fastsam.longtail.registry import PLUGINS, load_plugins

_OPTIONAL_PACKAGES = {
    "scikit-learn": "digits-lt",
    "torchvision": "CIFAR, image folders, ImageNet networks",
    "matplotlib": "figures and reports",
    "pillow": "image files",
    "jinja2": "reports",
    "scipy": "distances between spectra",
    "tqdm": "progress bars",
    "pyyaml": "settings from a file",
    "timm": "its networks",
    "onnx": "export to ONNX",
    "onnxscript": "export to ONNX",
    "safetensors": "export to safetensors",
}


@dataclass(frozen=True)
class Doctor:
    """Show what this installation can do."""

    def run(self) -> None:
        """Print the native build, the optional packages and the plug-ins."""
        print(f"fastsam: {fastsam.__version__}")
        print(f"torch: {importlib.metadata.version('torch')}")
        for name, value in fastsam.build_info().items():
            print(f"{name}: {value}")
        for package, purpose in _OPTIONAL_PACKAGES.items():
            try:
                version = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                version = "not installed"
            print(f"{package}: {version} ({purpose})")
        failed = load_plugins()
        for point in importlib.metadata.entry_points(group=PLUGINS):
            show(f"plug-in {point.name}: {failed.get(point.name, 'loaded')} ({point.value})")


def command(arguments: Sequence[str]) -> type[Doctor]:
    """The command, which has the same options for all arguments."""
    return Doctor
