"""Optimizers that wrap a base optimizer to find flat minima or escape saddle points."""

from fastsam.optim.variants.entropy_sgd import EntropySGD
from fastsam.optim.variants.looksam import LookSAM
from fastsam.optim.variants.lpf_sgd import LPFSGD
from fastsam.optim.variants.pgd import PGD

__all__ = ["LPFSGD", "PGD", "EntropySGD", "LookSAM"]
