"""Benchmarks: ``python -m benchmarks CASE``, one module per case, results with their machine in results/."""
