"""Linear probe: a head on the fixed features of a pretrained network."""

from fastsam.longtail.settings import Layer, layer
from fastsam.longtail.stages.base import Stage, StageList, register_stages

PROBE: Layer = {
    **layer(
        "definition of a linear probe", freeze=("features.*",), batch_norm="frozen", lr_scale=()
    ),
    **layer("starting point", known=False, epochs=10, warmup_epochs=0, lr_schedule="cosine"),
}

register_stages(
    StageList(
        name="linear-probe",
        module=__name__,
        summary="train the head on the fixed features of a pretrained network",
        needs_weights=True,
        stages=(Stage(name="probe", settings=PROBE),),
    )
)
