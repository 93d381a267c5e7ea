"""Benchmarks: ``python -m benchmarks CASE``. Results, with their machine and command, are in ``results/``."""
