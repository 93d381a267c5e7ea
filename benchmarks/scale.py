"""Predictions for large runs, from the measured CPU time of the workers and stated assumptions."""

from __future__ import annotations

from typing import Any

GPUS = 8
IMAGES_PER_SECOND = 3000
"""Assumed images per second of one H100: ResNet-50 at 224 pixels, bfloat16, one forward and backward pass."""
FLOP_PER_IMAGE = 3 * 2 * 4.1e9
"""4.1e9 multiply-adds of the forward pass (He et al. 2016), twice that for the backward pass."""
PEAK_FLOPS = 989e12
"""H100 SXM data sheet: bfloat16 without sparsity."""
RUNS = {"ImageNet-LT": (115_846, 90), "iNaturalist 2018": (437_513, 90)}
"""Training images, and epochs of the recipe."""
COSTS = {"SGD": 1.0, "SAM in the last third": 4 / 3, "SAM in every step": 2.0}
"""Forward and backward passes per image."""
READERS = {"fastsam": "files", "fastsam, packed": "packed copy", "script": "official-style script"}


def predictions(data_path: dict[str, Any]) -> str:
    """Return a table of images per second, cores and hours of runs on eight H100.

    Args:
        data_path: results of ``python -m benchmarks data-path``.
    """
    worker = data_path["worker"]["training"]
    share = IMAGES_PER_SECOND * FLOP_PER_IMAGE / PEAK_FLOPS
    lines = [
        f"| run on {GPUS} H100 | images/s | hours | cores: "
        + " | cores: ".join(READERS.values())
        + " |",
        "| --- " * (3 + len(READERS)) + "|",
    ]
    for data, (images, epochs) in RUNS.items():
        for optimizer, cost in COSTS.items():
            rate = GPUS * IMAGES_PER_SECOND / cost
            cores = [f"{rate * worker[reader]['median']:.0f}" for reader in READERS]
            hours = images * epochs / rate / 3600
            lines.append(
                f"| {data}, {epochs} epochs, {optimizer} | {rate:,.0f} | {hours:.2f} | "
                + " | ".join(cores)
                + " |"
            )
    lines += [
        "",
        "These numbers are predictions. Assumptions:",
        "",
        f"- *GPU.* {IMAGES_PER_SECOND:,} images per second on one H100, for one forward and backward pass of "
        f"a ResNet-50 in bfloat16 and channels-last. That is {share * 100:.0f} % of the peak arithmetic of "
        "an H100. We have not measured it.",
        "- *Processes.* Eight processes are eight times as fast as one: the gradients are summed during the "
        "backward pass.",
        "- *Cores.* Images per second times the CPU time of a worker per image, from the table above. A core "
        "of another processor differs.",
        "- *Optimizer.* Time is proportional to the number of forward and backward passes.",
        "- *Hours.* Training only: without evaluation, checkpoints and the first reading of the files.",
    ]
    return "\n".join(lines) + "\n"
