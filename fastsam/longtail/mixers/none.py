"""No mixing."""

from fastsam.longtail.mixers.base import MixerPart, register_mixer

register_mixer(
    MixerPart(
        name="none", build=lambda settings, counts, run: None, summary="leave batches as they are"
    )
)
