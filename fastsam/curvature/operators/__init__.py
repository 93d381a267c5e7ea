"""Symmetric operators: the protocol, matrices, SciPy, and the curvature of a model."""
