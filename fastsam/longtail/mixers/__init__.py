"""Mixers: combine each image of a batch with a partner. Each file defines and registers one mixer."""

from fastsam.longtail.mixers.base import MIXERS, Mixer, MixerPart, check_mixing, register_mixer
from fastsam.longtail.mixers.box import PastedBox, random_box
from fastsam.longtail.mixers.pairs import Pairs

__all__ = [
    "MIXERS",
    "Mixer",
    "MixerPart",
    "Pairs",
    "PastedBox",
    "check_mixing",
    "random_box",
    "register_mixer",
]
