"""The demo: what helps the tail of a data set?"""

from fastsam.demo.program import run_demo

__all__ = ["run_demo"]
