"""The main job on real data in a minute or two: train, look at the landscape, report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fastsam.files import write_bytes
from fastsam.longtail import Checkpoint, Trainer, recipe
from fastsam.longtail.data import LongTailData
from fastsam.longtail.landscape import REDRAWN, landscape
from fastsam.longtail.results import Result
from fastsam.longtail.training import RunFolder, check_free
from fastsam.report import accuracy_table, read_runs, spectrum_table, write_report
from fastsam.report.figures import overview
from fastsam.report.timing import time_sam_step
from fastsam.threads import cpu_threads

DATA, METHOD, OPTIMIZERS = "digits-lt", "ce-drw", ("sgd", "sam")
HEAD_CLASS, TAIL_CLASS = 0, 9
STEPS, PROBES = 40, 2


def run_demo(
    out: Path,
    *,
    seed: int = 0,
    epochs: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> Path:
    """Train CE-DRW with SGD and with SAM on ``digits-lt`` and compare what they found.

    Args:
        out: folder for the two runs, their spectra and the report.
        seed: seed of the training.
        epochs: another number of epochs than the recipe's.
        overwrite: the files of an earlier demo may be replaced.
        progress: show progress: bars on a terminal, a line a minute elsewhere.
        say: receives each block of text for the reader.

    Returns:
        Path of the self-contained ``report.html``.

    Raises:
        UsageError: if ``out`` is not empty and ``overwrite`` is not set.
    """
    check_free(out, allowed=overwrite, flags="--overwrite")
    given = {"seed": seed} if epochs is None else {"seed": seed, "epochs": epochs}
    threads = recipe(DATA, METHOD, "sgd").config().threads
    for optimizer in OPTIMIZERS:
        chosen = recipe(DATA, METHOD, optimizer, **given)
        folder = out / optimizer
        trainer = Trainer(
            chosen.config(),
            sources=chosen.sources,
            out=folder,
            overwrite=overwrite,
            progress=progress,
        )
        say(f"training {METHOD} with {optimizer}")
        trainer.fit()
        say(f"spectra of class {HEAD_CLASS} (head) and class {TAIL_CLASS} (tail)")
        with cpu_threads(threads):
            _spectra(RunFolder(folder), trainer.data, progress=progress)
            if optimizer == "sam":
                time_sam_step(trainer.model, _batch_loss(trainer)).save(out)

    results, spectra, timing = read_runs(out)
    sound = [item for item in spectra if item.subject.augment != REDRAWN]
    mistaken = [item for item in spectra if item.subject.augment == REDRAWN]
    say(f"\n{accuracy_table(results)}")
    say(f"\n{spectrum_table(sound)}")
    say("An eigenvalue lies within +- of each extreme.")
    say(
        "\nThe same tail class with augmentation re-drawn at every product. This is a mistake, shown "
        f"as a warning:\nnoise drives the extremes towards symmetry.\n{spectrum_table(mistaken)}"
    )
    if timing is not None:
        say(f"\n{timing.sentence()}")
    say("\n" + _verdict(results))
    write_bytes(out / "overview.png", overview(results, sound))
    page = write_report(out)
    say(f"\nreport: {page}")
    return page


def _spectra(folder: RunFolder, data: LongTailData, *, progress: bool) -> None:
    checkpoint = Checkpoint.load(folder.checkpoint)
    model = checkpoint.build_model()
    for classes, augment in (((HEAD_CLASS, TAIL_CLASS), "none"), ((TAIL_CLASS,), REDRAWN)):
        for item in landscape(
            model,
            data,
            checkpoint,
            classes,
            augment=augment,
            steps=STEPS,
            probes=PROBES,
            progress=progress,
        ):
            item.save(folder.path / "spectra")


def _batch_loss(trainer: Trainer) -> Callable[[nn.Module], Tensor]:
    """The loss of one fixed training batch."""
    order = [trainer.sampler.order(1)[: trainer.config.batch_size]]
    device = trainer.device
    batch = next(iter(trainer.data.train.batches(order, None, device)))
    return lambda model: nn.functional.cross_entropy(model(batch.inputs), batch.targets)


def _verdict(results: Sequence[Result]) -> str:
    """What was measured, in one sentence, whichever way it went."""
    by_name = {result.config["optimizer"]: result.test for result in results}
    sgd, sam = by_name["sgd"], by_name["sam"]
    images = sam.images
    overall, tail = sam.accuracy - sgd.accuracy, sam.groups["tail"] - sgd.groups["tail"]
    # Standard error of a difference of two shares of the same number of images, not paired.
    shares = torch.tensor([sgd.accuracy, sam.accuracy], dtype=torch.float64) / 100
    noise = 100 * float((shares * (1 - shares)).sum().div(images).sqrt())
    return (
        f"SAM minus SGD: {overall:+.1f} points overall, {tail:+.1f} on the tail; one run each, and "
        f"{images} test images leave a standard error of {noise:.1f} points overall."
    )
