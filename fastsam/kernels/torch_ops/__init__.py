"""Twins of the native launches in PyTorch operations, for devices without kernels.

They compute the same formulas, keep the same states and skip the same steps as the kernels, with results that
agree to rounding. They read nothing on the host, and use float64 for float64 tensors alone. The faces above
choose them; nothing else calls them.
"""
