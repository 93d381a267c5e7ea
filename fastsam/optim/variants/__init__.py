"""Optimizers around a base optimizer that look for flat minima or leave saddle points."""

from fastsam.optim.variants.entropy_sgd import EntropySGD
from fastsam.optim.variants.looksam import LookSAM
from fastsam.optim.variants.lpf_sgd import LPFSGD
from fastsam.optim.variants.pgd import PGD

__all__ = ["LPFSGD", "PGD", "EntropySGD", "LookSAM"]
