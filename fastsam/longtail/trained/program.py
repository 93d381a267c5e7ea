"""A trained run as a torch.export program, from pixels to logits."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fastsam.longtail.data import Preprocessing
from fastsam.longtail.errors import LongTailError
from fastsam.longtail.trained.run import TrainedRun

INPUT, OUTPUT, BATCH = "pixels", "logits", "batch"
"""Names of the graph's input and output, and of its dynamic batch dimension."""


class PixelClassifier(nn.Module):
    """A network that normalizes its inputs first.

    Args:
        network: maps normalized images ``[B, C, H, W]`` to logits ``[B, classes]``.
        preprocessing: preprocessing with mean and standard deviation of each channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = network
        for name in ("mean", "std"):
            values = torch.tensor(getattr(preprocessing, name))
            self.register_buffer(name, values[:, None, None])

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels in [0, 1], float32 ``[B, C, H, W]``, to logits ``[B, classes]``."""
        logits: Tensor = self.network((pixels - self.mean) / self.std)
        return logits


def exported_program(run: TrainedRun, device: torch.device | str) -> ExportedProgram:
    """Export normalization, network and head of a run as a graph with dynamic batch size.

    The graph's input ``pixels`` is float32 ``[B, C, H, W]`` in [0, 1], with the image size of the run. Its
    output is the logits, float32 ``[B, classes]``; their softmax gives class probabilities.

    Args:
        run: the trained run.
        device: device of the graph.

    Raises:
        DataError: if the preprocessing of the run is unknown.
        LongTailError: if torch.export fails.
    """
    preprocessing = run.known_preprocessing()
    # Copy the network, because requires_grad_() and to() would change the network of the run.
    network = copy.deepcopy(run.network).requires_grad_(False).eval()
    classifier = PixelClassifier(network, preprocessing).to(device).eval()
    # Two images, because torch.export treats sizes of 1 as constants.
    example = torch.zeros(2, preprocessing.channels, *preprocessing.size, device=device)
    shapes = {INPUT: {0: Dim(BATCH, min=1)}}
    try:
        program = torch.export.export(classifier, (example,), dynamic_shapes=shapes)
    except Exception as error:  # torch.export can raise any of a dozen types
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise LongTailError(
            f"torch.export cannot export the network {run.checkpoint.config.model} ({reason}); use "
            "--format safetensors, which stores only the weights"
        ) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # contains paths of this machine
    return program


def accepted(run: TrainedRun) -> str:
    """Describe the input and the output of :func:`exported_program` in Markdown."""
    preprocessing = run.known_preprocessing()
    shape = ", ".join(map(str, (preprocessing.channels, *preprocessing.size)))
    return (
        f"Input `{INPUT}`: float32 `[B, {shape}]` in [0, 1], with any batch size B. Output "
        f"`{OUTPUT}`: float32 `[B, {len(run.class_names)}]`; softmax gives class probabilities. The model "
        "includes the normalization of inputs and the scale and adjustment of logits."
    )


def example_shape(run: TrainedRun) -> str:
    """Return the shape of a batch of one image, as text."""
    preprocessing = run.known_preprocessing()
    return ", ".join(map(str, (1, preprocessing.channels, *preprocessing.size)))
