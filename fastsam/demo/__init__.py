"""The demo: compares training methods on long-tailed digits."""

from fastsam.demo.program import run_demo

__all__ = ["run_demo"]
