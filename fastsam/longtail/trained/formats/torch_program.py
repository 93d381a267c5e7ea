"""The format ``torch``: a self-contained torch.export program, which loads without fastsam."""

from __future__ import annotations

import io
import json

import torch

from fastsam.longtail.trained.export import ExportFormat, register_format
from fastsam.longtail.trained.metadata import metadata
from fastsam.longtail.trained.program import accepted, example_shape, exported_program
from fastsam.longtail.trained.run import TrainedRun

FILE = "model.pt2"


def _build(run: TrainedRun) -> bytes:
    program = exported_program(run, run.device)
    file = io.BytesIO()  # torch.export.save needs a seekable file
    torch.export.save(
        program, file, extra_files={"metadata.json": json.dumps(metadata(run), indent=1)}
    )
    return file.getvalue()


def _usage(run: TrainedRun) -> str:
    place = (
        ""
        if run.device.type == "cpu"
        else f"\nThe program runs on `{run.device}`, the device it was exported on.\n"
    )
    return f"""\
`{FILE}` is a `torch.export` program; it requires only torch. {accepted(run)}
{place}
```python
import json, pathlib, torch

program = torch.export.load("{FILE}").module()
pixels = torch.rand({example_shape(run)}, device="{run.device}")  # an image in [0, 1]
probabilities = program(pixels).softmax(dim=1)
print(json.loads(pathlib.Path("labels.json").read_text())[int(probabilities.argmax())])
```
"""


register_format(
    ExportFormat(
        name="torch",
        summary="torch.export program, loads without fastsam",
        build=_build,
        file=FILE,
        usage=_usage,
    )
)
