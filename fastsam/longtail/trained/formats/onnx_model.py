"""The format ``onnx``: a graph for ONNX Runtime and other engines."""

from __future__ import annotations

from typing import Any

import torch

from fastsam.extras import requires_extra
from fastsam.longtail.errors import LongTailError
from fastsam.longtail.trained.export import ExportFormat, register_format
from fastsam.longtail.trained.metadata import metadata
from fastsam.longtail.trained.program import (
    BATCH,
    INPUT,
    OUTPUT,
    accepted,
    example_shape,
    exported_program,
)
from fastsam.longtail.trained.run import TrainedRun

FILE = "model.onnx"


def _build(run: TrainedRun) -> bytes:
    with requires_extra("export", "the export to ONNX"):
        import onnx
        import onnxscript  # noqa: F401 (required by torch.onnx)

    program = exported_program(run, "cpu")
    try:
        converted: Any = torch.onnx.export(
            program,
            (),
            dynamo=True,
            verbose=False,
            input_names=[INPUT],
            output_names=[OUTPUT],
        )
        model = converted.model_proto
        _name_batch(model)
        onnx.helper.set_model_props(model, metadata(run))
        content: bytes = model.SerializeToString()
        onnx.checker.check_model(content, full_check=True)
    except Exception as error:  # an operator that ONNX lacks can raise any of a dozen types
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise LongTailError(
            f"cannot convert the network {run.checkpoint.config.model} to ONNX ({reason}); use "
            "--format torch"
        ) from error
    return content


def _name_batch(model: Any) -> None:
    """Rename the dynamic dimension, which torch calls ``s77`` or similar, to ``batch``."""
    graph = model.graph
    free = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param == free:
                size.dim_param = BATCH


def _usage(run: TrainedRun) -> str:
    return f"""\
`{FILE}` is an ONNX graph; it requires onnxruntime or another engine. {accepted(run)}

```python
import json, numpy, onnxruntime, pathlib

session = onnxruntime.InferenceSession("{FILE}")
pixels = numpy.random.rand({example_shape(run)}).astype("float32")  # an image in [0, 1]
(logits,) = session.run(None, {{"{INPUT}": pixels}})
print(json.loads(pathlib.Path("labels.json").read_text())[logits[0].argmax()])
```
"""


register_format(
    ExportFormat(
        name="onnx",
        summary="ONNX graph",
        build=_build,
        file=FILE,
        usage=_usage,
    )
)
