"""Tunings: which part of a network is trained. Each file defines and registers one tuning."""

from fastsam.longtail.tunings.base import TUNINGS, NetworkTuning, register_tuning
from fastsam.longtail.tunings.transformer_blocks import TransformerBlock, transformer_blocks

__all__ = ["TUNINGS", "NetworkTuning", "TransformerBlock", "register_tuning", "transformer_blocks"]
