"""The native launches in PyTorch operations, for devices without kernels.

They compute the same formulas, keep the same state and skip the same steps as the kernels; results agree up
to rounding. They never read a device value on the host, and use float64 only for float64 tensors, because
some devices have none. Only the functions in ``fastsam.kernels`` call them.
"""
