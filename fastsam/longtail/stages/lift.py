"""LIFT: adapters and a cosine head on a pretrained vision transformer."""

from fastsam.longtail.settings import layer
from fastsam.longtail.stages.base import Stage, StageList, register_stages

_CODE = "code of Shi et al. 2024 (shijxcs/LIFT)"

register_stages(
    StageList(
        name="lift",
        module=__name__,
        summary="train adapters and a cosine head of a pretrained vision transformer (Shi et al. 2024)",
        needs_weights=True,
        stages=(
            Stage(
                name="tuning",
                settings=layer(
                    _CODE,
                    tune="adapters",
                    adapter_scale=1.0,
                    head="scaled-cosine",
                    cosine_scale=25.0,
                    head_from="class-means",
                    epochs=10,
                    batch_size=128,
                    lr=0.01,
                    momentum=0.9,
                    nesterov=False,
                    weight_decay=5e-4,
                    warmup_epochs=0,
                    lr_schedule="cosine",
                ),
                exact={("inaturalist18", "*"): layer(_CODE, epochs=20)},
            ),
        ),
    )
)
