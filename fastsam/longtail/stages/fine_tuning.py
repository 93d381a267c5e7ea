"""Fine-tuning of a pretrained network: first the head alone, then all parameters."""

from fastsam.longtail.settings import layer
from fastsam.longtail.stages.base import Stage, StageList, register_stages
from fastsam.longtail.stages.linear_probe import PROBE

_SOURCE = "Kumar et al. 2022 (linear probing, then fine-tuning)"

register_stages(
    StageList(
        name="fine-tuning",
        module=__name__,
        summary="train the head of a pretrained network, then all parameters (Kumar et al. 2022)",
        needs_weights=True,
        stages=(
            Stage(name="probe", settings=PROBE),
            Stage(
                name="tuning",
                settings={
                    **layer(_SOURCE, freeze=(), batch_norm="train"),
                    **layer(
                        "starting point",
                        known=False,
                        epochs=10,
                        lr_scale=("features.*=0.1",),
                        warmup_epochs=1,
                        lr_schedule="cosine",
                    ),
                },
            ),
        ),
    )
)
