"""Work of the host in a step of the trainer, outside the network and the optimizer."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastsam
from benchmarks import host_step
from benchmarks.machine import commit_of, save


@dataclass(frozen=True, kw_only=True)
class HostWork:
    """Measure the time of a step outside the network's passes and the optimizer.

    The network has the modules of a ResNet-50 with few channels: 161 parameters and 159 buffers. Its passes
    read only the pixels and the head. The time of the network, of backward passes and of the optimizer's
    calls is subtracted; the calls of the clock are not. The clock counts the processor time of the thread, to
    which other processes add cache misses only.

    With ``--baseline``, a process for each checkout takes its samples in turn with the other.
    """

    baseline: Path | None = None
    """Checkout of an earlier commit, with its native module built in place."""
    rounds: int = 60
    """Samples of each optimizer."""
    steps: int = 5
    """Steps per sample."""
    save: bool = False
    """Write the results to benchmarks/results/."""
    out: Path | None = None
    """Write the results to this folder instead."""

    def run(self) -> None:
        """Measure SGD and SAM, print the results, and save them."""
        trees = {"this": Path(fastsam.__file__).parents[1]}
        if self.baseline is not None:
            trees["baseline"] = self.baseline.resolve()
        results: dict[str, Any] = {"baseline": self.baseline and commit_of(self.baseline)}
        for optimizer in ("sgd", "sam"):
            samples = self._samples(trees, optimizer)
            results[optimizer] = row = {label: _summary(taken) for label, taken in samples.items()}
            # Other processes add to the time, and never take from it: the smallest is the measure.
            smallest = {label: part["smallest"] for label, part in row.items()}
            text = f"{optimizer}: {smallest['this'] * 1e6:.0f} us a step"
            if "baseline" in samples:
                pairs = zip(samples["this"], samples["baseline"], strict=True)
                row["ratio"] = {
                    "of smallest": smallest["this"] / smallest["baseline"],
                    "median of pairs": statistics.median(new / old for new, old in pairs),
                }
                text += f", {smallest['baseline'] * 1e6:.0f} us at {results['baseline']}"
                text += "; ratio {of smallest:.2f}, median of pairs {median of pairs:.2f}".format(
                    **row["ratio"]
                )
            print(text)
        if self.save or self.out is not None:
            print(f"wrote {save('host_work', results, device='cpu', folder=self.out)}")

    def _samples(self, trees: dict[str, Path], optimizer: str) -> dict[str, list[float]]:
        samples: dict[str, list[float]] = {label: [] for label in trees}
        with ExitStack() as stack:
            samplers = {
                label: stack.enter_context(_sampler(tree, optimizer))
                for label, tree in trees.items()
            }
            for sample in samplers.values():
                sample(self.steps)  # allocates
            for _ in range(self.rounds):
                for label, sample in samplers.items():
                    samples[label].append(sample(self.steps))
        return samples


@contextmanager
def _sampler(tree: Path, optimizer: str) -> Iterator[Callable[[int], float]]:
    """Start a process with the ``fastsam`` of a tree. Its function returns the mean seconds of some steps."""
    script = Path(host_step.__file__).read_text(encoding="utf-8")
    with subprocess.Popen(
        [sys.executable, "-c", script, optimizer],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        cwd=tree,  # the first place where a script given by -c looks for modules
    ) as process:

        def sample(steps: int) -> float:
            assert process.stdin is not None
            assert process.stdout is not None
            print(steps, file=process.stdin)
            answer = process.stdout.readline()
            if not answer:
                raise RuntimeError(f"the measurement in {tree} failed; its error is printed above")
            return float(answer)

        yield sample


def _summary(samples: list[float]) -> dict[str, Any]:
    return {
        "median": statistics.median(samples),
        "smallest": min(samples),
        "samples": len(samples),
    }
