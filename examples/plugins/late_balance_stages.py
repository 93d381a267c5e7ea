"""A list of stages: balanced softmax for a few epochs on all parameters, after any first stage.

``fastsam train --stages late-balance`` trains it.
"""

from fastsam.longtail.settings import layer
from fastsam.longtail.stages import BASE, Stage, StageList, register_stages

SOURCE = "a starting point, not tuned"

register_stages(
    StageList(
        name="late-balance",
        module=__name__,
        summary="balanced softmax for a few epochs on all parameters",
        stages=(
            Stage(name="representation"),
            Stage(
                name="balance",
                settings=layer(
                    SOURCE,
                    known=False,
                    method="bs",
                    optimizer=BASE,
                    epochs=5,
                    lr=0.01,
                    lr_schedule="cosine",
                    warmup_epochs=0,
                ),
                # Values for single data sets, by their name and imbalance factor.
                exact={("cifar*-lt", "100"): layer(SOURCE, known=False, epochs=10)},
            ),
        ),
    )
)
