"""The format ``safetensors``: the weights, with a header from which the network is rebuilt."""

from __future__ import annotations

from fastsam.extras import requires_extra
from fastsam.longtail.trained.export import ExportFormat, register_format
from fastsam.longtail.trained.metadata import metadata
from fastsam.longtail.trained.run import TrainedRun
from fastsam.longtail.trained.weights import OFFSET, SCALE, named_weights

FILE = "model.safetensors"


def _build(run: TrainedRun) -> bytes:
    with requires_extra("export", "the export to safetensors"):
        from safetensors.torch import save

    content: bytes = save(named_weights(run), {"format": "pt", **metadata(run)})
    return content


def _usage(run: TrainedRun) -> str:
    channels = run.checkpoint.channels
    given = (
        f"torch.rand(1, {channels}, H, W)  # an image prepared as in training"
        if run.preprocessing is None
        else 'preprocessing.apply(Path("image.png"))[None]'
    )
    return f"""\
`{FILE}` contains the weights under the names of the network, `features.*` and `head.*`. Logits are
`{SCALE} * head(features) + {OFFSET}`; softmax gives class probabilities. The header contains
`architecture`, `head`, `channels`, and as JSON `classes`, `counts`, `preprocessing` and `config`. Inputs are
normalized images `[B, {channels}, H, W]`.

```python
from pathlib import Path
from fastsam.longtail.trained import load_weights

network, class_names, preprocessing = load_weights("{FILE}")
inputs = {given}
logits = network(inputs)
print(class_names[int(logits.argmax())])
```

Without fastsam: for a timm or torchvision network, remove the prefix `features.network.` and load the weights
into `timm.create_model(NAME, num_classes=0, in_chans={channels})`, or into
`torchvision.models.get_model(NAME)` without its last layer.
"""


register_format(
    ExportFormat(
        name="safetensors",
        summary="weights, with a description of the network in the header",
        build=_build,
        file=FILE,
        usage=_usage,
    )
)
