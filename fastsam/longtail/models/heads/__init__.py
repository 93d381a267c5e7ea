"""Heads of a classifier. Each file defines one head with its settings, and registers it."""

from fastsam.longtail.models.heads.affine import AffineHead
from fastsam.longtail.models.heads.base import HEADS, Head, register_head
from fastsam.longtail.models.heads.cosine import CosineHead
from fastsam.longtail.models.heads.disalign import DisAlignHead
from fastsam.longtail.models.heads.linear import HeadInit
from fastsam.longtail.models.heads.lws import ScaledHead
from fastsam.longtail.models.heads.scaled_cosine import ScaledCosineHead

__all__ = [
    "HEADS",
    "AffineHead",
    "CosineHead",
    "DisAlignHead",
    "Head",
    "HeadInit",
    "ScaledCosineHead",
    "ScaledHead",
    "register_head",
]
