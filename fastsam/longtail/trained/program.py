"""A trained run as one graph, from pixels to logits."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fastsam.longtail.data import Preprocessing
from fastsam.longtail.errors import LongTailError
from fastsam.longtail.trained.run import TrainedRun

INPUT, OUTPUT, BATCH = "pixels", "logits", "batch"
"""Names of the graph's input and output, and of the dimension whose size is free."""


class PixelClassifier(nn.Module):
    """A network with the normalization of its inputs.

    Args:
        network: maps normalized images ``[B, C, H, W]`` to logits ``[B, classes]``.
        preprocessing: has the mean and the standard deviation of each channel.
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
        """Pixels in [0, 1], float32 ``[B, C, H, W]``, to logits ``[B, classes]``."""
        logits: Tensor = self.network((pixels - self.mean) / self.std)
        return logits


def exported_program(run: TrainedRun, device: torch.device | str) -> ExportedProgram:
    """Capture normalization, network and head of a run as a graph with a free batch size.

    The graph's input ``pixels`` is float32 ``[B, C, H, W]`` in [0, 1] at the size of the run; its
    output is the logits, float32 ``[B, classes]``, whose softmax is the probability of each class.

    Args:
        run: the trained run.
        device: where the graph computes.

    Raises:
        DataError: the preprocessing of the run is unknown.
        LongTailError: the network cannot be captured.
    """
    preprocessing = run.known_preprocessing()
    # A copy: the run's own network keeps its gradients and its place.
    network = copy.deepcopy(run.network).requires_grad_(False).eval()
    classifier = PixelClassifier(network, preprocessing).to(device).eval()
    # Not one image: torch.export takes sizes of 1 for constants.
    example = torch.zeros(2, preprocessing.channels, *preprocessing.size, device=device)
    shapes = {INPUT: {0: Dim(BATCH, min=1)}}
    try:
        program = torch.export.export(classifier, (example,), dynamic_shapes=shapes)
    except Exception as error:  # what a network does in Python shows as any of a dozen types
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise LongTailError(
            f"torch.export cannot capture the network {run.checkpoint.config.model} ({reason}); use "
            "--format safetensors, which stores its weights alone"
        ) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names source files of this machine
    return program


def accepted(run: TrainedRun) -> str:
    """Describe the input and the output of :func:`exported_program` in Markdown."""
    preprocessing = run.known_preprocessing()
    shape = ", ".join(map(str, (preprocessing.channels, *preprocessing.size)))
    return (
        f"Input `{INPUT}`: float32 `[B, {shape}]` in [0, 1], with any batch size B. Output "
        f"`{OUTPUT}`: float32 `[B, {len(run.class_names)}]`; softmax gives the probability of each "
        "class. Normalization, logit scale and adjustment of the logits are inside."
    )


def example_shape(run: TrainedRun) -> str:
    """Return the shape of one image with its batch dimension, as text."""
    preprocessing = run.known_preprocessing()
    return ", ".join(map(str, (1, preprocessing.channels, *preprocessing.size)))
