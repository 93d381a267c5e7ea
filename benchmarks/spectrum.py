"""Hessian spectra of a ResNet, compared with PyHessian, curvlinops and hessian-eigenthings.

Peers are imported from the folder in ``--peers`` (``pip install --target FOLDER pyhessian
curvlinops-for-pytorch hessian-eigenthings``). Every contestant gets the same model, loss and batches, and
their results must agree. PyHessian calls ``torch.eig``, which PyTorch has removed; it is replaced by
``torch.linalg.eigh``.

    python -m benchmarks spectrum --peers .peers --part density --batch-size 16 --only pyhessian
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import io
import statistics
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.machine import copy_bandwidth, save
from benchmarks.timing import Ratio, interleaved
from fastsam.curvature import (
    MatrixOperator,
    Spectrum,
    class_spectra,
    operator_spectrum,
    spectral_density,
)
from fastsam.curvature.data import read_batches
from fastsam.curvature.isolation import undisturbed
from fastsam.curvature.operators.model import ModelOperator
from fastsam.kernels.lanczos import Recurrence, orthogonalize
from fastsam.longtail.models import build_model
from fastsam.threads import cpu_threads

Batches = list[tuple[Tensor, Tensor]]


@dataclass
class Spectra:
    """Time Hessian spectra of a ResNet against PyHessian, curvlinops and hessian-eigenthings.

    Attributes:
        peers: folder of the installed peers; without it only fastsam is measured.
        part: products: single Hessian-vector products, finely interleaved; density: one Lanczos run;
            everything: extremes, trace and density; classes: everything for each class; sweeps:
            re-orthogonalization only; correctness: known spectra; all: all parts.
        model: network: resnet32 of the CIFAR experiments, one of torchvision, or resnet8 for quick tests.
        pixels: height and width of the images in pixels.
        steps: Lanczos steps.
        batch_size: samples per batch.
        batches: number of batches.
        rounds: runs of each contestant; they alternate, see :func:`in_turn`.
        threads: number of CPU threads.
        device: cpu or cuda.
        only: prefixes of the names of peers to measure; empty for all.
        probes: number of start vectors per run.
        counts: number of images of each class in the part classes; empty for one batch each.
    """

    peers: Path | None = None
    part: Literal[
        "products", "density", "everything", "classes", "sweeps", "correctness", "all"
    ] = "all"
    model: Literal["resnet32", "resnet18", "resnet50", "resnet8"] = "resnet32"
    pixels: int = 32
    steps: int = 100
    batch_size: int = 32
    batches: int = 2
    rounds: int = 3
    threads: int = 2
    device: str = "cpu"
    out: Path | None = None
    """Write the results to this folder instead of benchmarks/results/."""
    only: tuple[str, ...] = ()
    probes: int = 1
    counts: tuple[int, ...] = ()
    sweep_parameters: int = 1_000_000
    """Number of parameters in the part sweeps; use 10 million or more on a GPU."""

    def run(self) -> None:
        """Run the case and write its results."""
        if self.peers is not None:
            sys.path.insert(0, str(self.peers))
        with cpu_threads(self.threads):
            self._run_parts()

    def _run_parts(self) -> None:
        settings = {name: value for name, value in asdict(self).items() if name != "out"}
        settings["peers"] = peer_versions() if self.peers is not None else {}
        parts = PARTS if self.part == "all" else (self.part,)
        model, batches = self._problem()
        for part in parts:
            if part == "correctness":
                found = correctness(peers=self.has("pyhessian"))
            else:
                found = PARTS_OF_A_MODEL[part](model, batches, self)
            results = {"settings": settings | {"part": part}, part: found}
            case = f"spectrum-{part}" + (f"-{self.probes}-probes" if self.probes > 1 else "")
            print(save(case, results, device=self.device, folder=self.out))
            rows = {name: row for name, row in found.items() if isinstance(row, dict)}
            if differing := [name for name, row in rows.items() if "disagrees_on" in row]:
                raise AssertionError(f"{', '.join(differing)}: other extremes than fastsam")

    def has(self, peer: str) -> bool:
        """Return whether a peer is selected and installed; print a line if it is only selected."""
        if self.peers is None or (self.only and not peer.startswith(self.only)):
            return False
        there = importlib.util.find_spec(peer.replace("-", "_")) is not None
        if not there:
            print(f"{peer}: skipped, because it is not installed")
        return there

    def _problem(self) -> tuple[nn.Module, Batches]:
        generator = torch.Generator().manual_seed(0)

        def images(count: int) -> Tensor:
            shape = (count, 3, self.pixels, self.pixels)
            return torch.randn(shape, generator=generator).to(self.device)

        model = build_model(self.model, 10).to(self.device).train()
        with torch.no_grad():  # give BatchNorm realistic running statistics
            for _ in range(30):
                model(images(32))
        batches = [
            (
                images(self.batch_size),
                torch.randint(10, (self.batch_size,), generator=generator).to(self.device),
            )
            for _ in range(self.batches)
        ]
        return model.eval(), batches


def peer_versions() -> dict[str, str]:
    """Return the versions of the installed peers."""
    names = ("pyhessian", "curvlinops-for-pytorch", "hessian-eigenthings")
    found = {distribution.name.lower(): distribution.version for distribution in distributions()}
    found = {name.replace("_", "-"): version for name, version in found.items()}
    return {name: found[name] for name in names if name in found}


def compare_products(model: nn.Module, batches: Batches, options: Spectra) -> dict[str, Any]:
    """Time single products over all data, and the re-orthogonalization of a Lanczos step.

    Products are short, so contestants alternate about every second, which makes ratios robust on a noisy
    machine.
    """
    criterion = nn.CrossEntropyLoss()
    whole = (torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))
    parameters = list(model.parameters())
    flat = torch.randn(1, sum(value.numel() for value in parameters), device=options.device)
    vectors = [
        piece.view_as(value)
        for piece, value in zip(
            torch.split(flat[0], [value.numel() for value in parameters]), parameters, strict=True
        )
    ]
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    last_batches = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in batches]
    answers: dict[str, Callable[[], Any]] = {}
    with undisturbed(model), undisturbed(last):
        answers["fastsam"] = fastsam_product(model, batches, flat, options)
        answers["fastsam, channels-last"] = fastsam_product(last, last_batches, flat, options)
        if options.has("pyhessian"):
            peer = importlib.import_module("pyhessian")
            product = importlib.import_module("pyhessian.utils").hessian_vector_product
            cuda = on_gpu(model)
            loader = peer.hessian(model, criterion, dataloader=batches, cuda=cuda)
            single = peer.hessian(model, criterion, data=whole, cuda=cuda)
            images = whole[0].contiguous(memory_format=torch.channels_last)
            single_last = peer.hessian(last, criterion, data=(images, whole[1]), cuda=cuda)
            answers["pyhessian, loader"] = lambda: joined(loader.dataloader_hv_product(vectors)[1])
            answers["pyhessian, one batch"] = lambda: joined(
                product(single.gradsH, single.params, vectors)
            )
            answers["pyhessian, one batch, channels-last"] = lambda: joined(
                product(single_last.gradsH, single_last.params, vectors)
            )
        if options.has("hessian-eigenthings"):
            peer = importlib.import_module("hessian_eigenthings")
            things = peer.HessianOperator(model, batches, peer.supervised_loss(criterion))
            answers["hessian-eigenthings"] = lambda: things.matvec(flat[0])
        if options.has("curvlinops"):
            peer = importlib.import_module("curvlinops")
            linear = peer.HessianLinearOperator(
                model, criterion, parameters, batches, check_deterministic=False
            )
            answers["curvlinops"] = lambda: linear @ flat[0]
        expected = answers["fastsam"]()
        for name, answer in answers.items():
            difference = float((answer() - expected).norm() / expected.norm())
            print(f"{name}: relative difference {difference:.1e}", flush=True)
            # The tolerance is large because rounding can move an activation across a ReLU's kink.
            if difference > 0.02:
                raise AssertionError(f"{name} computes a different product: {difference}")
        basis = torch.randn(1, options.steps // 2, flat.shape[1], device=options.device)
        recurrence = Recurrence.start(1, options.steps, device=options.device)
        extras: dict[str, Callable[[], Any]] = {
            "gradient": lambda: torch.autograd.grad(
                criterion(model(whole[0]), whole[1]), parameters
            ),
            "re-orthogonalisation at half the steps": lambda: orthogonalize(
                basis, flat.clone(), None, recurrence, step=options.steps // 2 - 1, eps=1e-7
            ),
        }
        timings = interleaved(
            answers | extras, rounds=options.rounds, device=torch.device(options.device)
        )
    unit = timings["gradient"].median
    found = {}
    for name, timing in timings.items():
        ratio = Ratio.of(timing.wall, timings["fastsam"].wall)
        found[name] = {
            **timing.as_dict(),
            "gradients": timing.median / unit,
            "times_fastsam": ratio.as_dict(),
        }
        print(
            f"{name}: {timing.median:.4f} s, {timing.median / unit:.2f} gradients, "
            f"{ratio.median:.2f} times fastsam",
            flush=True,
        )
    return found


def fastsam_product(
    model: nn.Module, batches: Batches, vectors: Tensor, options: Spectra
) -> Callable[[], Tensor]:
    """Return a function that computes the product of fastsam with one vector, ``[1, n]``."""
    operator = ModelOperator(model, nn.CrossEntropyLoss(), read_batches(batches))
    operator.prepare(probes=1, steps=options.steps)
    return lambda: operator.matmat(vectors)[0]


def joined(pieces: Iterable[Tensor]) -> Tensor:
    """Concatenate tensors of any shapes to one vector."""
    return torch.cat([piece.reshape(-1) for piece in pieces])


def compare_density(model: nn.Module, batches: Batches, options: Spectra) -> dict[str, Any]:
    """Time one Lanczos run of each contestant: seconds, products per second and extremes."""
    contestants: dict[str, Callable[[], Any]] = {
        "fastsam": lambda: extremes_of(ours(copy.deepcopy(model), batches, options))
    }
    if options.has("pyhessian"):
        whole = (torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))
        contestants["pyhessian, loader"] = lambda: pyhessian_density(
            copy.deepcopy(model), options, dataloader=batches
        )
        contestants["pyhessian, one batch"] = lambda: pyhessian_density(
            copy.deepcopy(model), options, data=whole
        )
    # These two libraries run one probe at a time.
    if options.has("hessian-eigenthings"):
        contestants["hessian-eigenthings"] = lambda: outermost(
            eigenthings_density(copy.deepcopy(model), batches, options.steps)
            for _ in range(options.probes)
        )
    if options.has("curvlinops"):
        contestants["curvlinops"] = lambda: outermost(
            curvlinops_density(copy.deepcopy(model), batches, options.steps)
            for _ in range(options.probes)
        )
    found = race(contestants, options, runs=options.probes)
    sweeps = sweep_seconds(model, options)
    found["fastsam"]["share_of_time_in_sweeps"] = sweeps / found["fastsam"]["median_seconds"]
    if options.device != "cpu":
        found["fastsam"]["host_waits"] = host_waits(contestants["fastsam"])
    for name, row in found.items():
        print(f"{name}: {row['times_fastsam']:.2f} times fastsam", flush=True)
    return found


def compare_everything(model: nn.Module, batches: Batches, options: Spectra) -> dict[str, Any]:
    """Time extremes, trace and density: one call of fastsam, three calls of PyHessian with its defaults."""

    def one_run() -> dict[str, float]:
        spectrum = ours(copy.deepcopy(model), batches, options)
        spectrum.density(spectrum.grid(10_000))
        return {**extremes_of(spectrum), "trace": spectrum.trace, "stderr": spectrum.trace_stderr}

    contestants: dict[str, Callable[[], Any]] = {"fastsam": one_run}
    if options.has("pyhessian"):
        contestants["pyhessian, loader"] = lambda: pyhessian_everything(
            copy.deepcopy(model), batches, options
        )
    return race(contestants, options)


def compare_classes(model: nn.Module, batches: Batches, options: Spectra) -> dict[str, Any]:
    """Time extremes, trace and density of every class, on random images: ``counts`` or a batch of each."""
    counts = options.counts or tuple(len(images) for images, _ in batches)
    shape = batches[0][0].shape[1:]
    generator = torch.Generator().manual_seed(1)
    classes = {
        label: torch.randn(count, *shape, generator=generator).to(options.device)
        for label, count in enumerate(counts)
    }
    inputs = torch.cat(list(classes.values()))
    targets = torch.cat([torch.full((len(x),), c, device=x.device) for c, x in classes.items()])

    def ours_by_class() -> dict[str, float]:
        spectra = class_spectra(
            copy.deepcopy(model),
            nn.CrossEntropyLoss(),
            (inputs, targets),
            batch_size=options.batch_size,
            steps=options.steps,
            progress=False,
        )
        return {
            "lambda_max": spectra[0].lambda_max,
            **{f"lambda_max of {c}": spectrum.lambda_max for c, spectrum in spectra.items()},
        }

    def theirs_by_class() -> dict[str, float]:
        found = {
            c: pyhessian_everything(
                copy.deepcopy(model),
                [
                    (part, torch.full((len(part),), c, device=part.device))
                    for part in torch.split(images, options.batch_size)
                ],
                options,
            )["lambda_max"]
            for c, images in classes.items()
        }
        return {"lambda_max": found[0], **{f"lambda_max of {c}": x for c, x in found.items()}}

    contestants: dict[str, Callable[[], Any]] = {"fastsam": ours_by_class}
    if options.has("pyhessian"):
        contestants["pyhessian, loader"] = theirs_by_class
    return race(contestants, options, runs=len(classes))


def measure_sweeps(model: nn.Module, batches: Batches, options: Spectra) -> dict[str, Any]:
    """Measure the bandwidth of the re-orthogonalization of one step, relative to that of a copy."""
    size, device = options.sweep_parameters, torch.device(options.device)
    basis = torch.randn(1, max(SWEEP_ROWS), size, device=device) / size**0.5
    vector = torch.randn(1, size, device=device)
    recurrence = Recurrence.start(1, max(SWEEP_ROWS), device=device)

    def sweep(rows: int) -> Callable[[], None]:
        return lambda: orthogonalize(
            basis[:, :rows], vector, None, recurrence, step=rows - 1, eps=2.0**-23
        )

    contestants = {f"{rows} rows": sweep(rows) for rows in SWEEP_ROWS}
    timings = interleaved(contestants, rounds=9, device=device)
    bandwidth = copy_bandwidth(device)
    found: dict[str, Any] = {"copy_bytes_per_second": bandwidth, "parameters": size}
    for rows, timing in zip(SWEEP_ROWS, timings.values(), strict=True):
        # Reads Q three times; reads w three times and writes it twice.
        speed = 4 * (3 * rows + 5) * size / timing.median
        found[f"{rows} rows"] = {**timing.as_dict(), "share_of_copy_bandwidth": speed / bandwidth}
        print(f"{rows} rows: {timing.median * 1e3:.2f} ms, {speed / bandwidth:.0%}", flush=True)
    return found


SWEEP_ROWS = (20, 60, 100)
"""Numbers of basis rows for which the re-orthogonalization is measured."""


def race(
    contestants: dict[str, Callable[[], Any]], options: Spectra, *, runs: int = 1
) -> dict[str, Any]:
    """Time every contestant, and compare their results.

    A contestant with other extremes than fastsam has the entry ``disagrees_on``.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    answers: dict[str, Any] = {}
    peaks: dict[str, int] = {}
    for round_ in range(options.rounds):
        torch.manual_seed(round_)
        with torch_eig():
            # On a GPU runs do not alternate, because a product may be inside a CUDA graph capture.
            if options.device == "cpu":
                taken, answers = in_turn(contestants, options.device)
            else:
                taken, answers, peaks = one_by_one(contestants, options.device)
        for name in contestants:
            seconds[name].append(taken[name])
            print(f"{name}: {taken[name]:.2f} s {answers[name]}", flush=True)
    reference = answers["fastsam"]
    differing = {
        name: [
            extreme
            for extreme in sorted(EXTREMES & answer.keys() & reference.keys())
            if not abs(answer[extreme] - reference[extreme]) <= 0.02 * abs(reference["lambda_max"])
        ]
        for name, answer in answers.items()
    }
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        name: {
            "median_seconds": median[name],
            "seconds": values,
            "times_fastsam": median[name] / median["fastsam"],
            "products_per_second": runs * options.steps / median[name],
            "answers": answers[name],
            **({"peak_bytes": peaks[name]} if name in peaks else {}),
            **({"disagrees_on": differing[name]} if differing[name] else {}),
        }
        for name, values in seconds.items()
    }


EXTREMES = {"lambda_min", "lambda_max"}
"""Results on which all contestants must agree, to 2 % of lambda_max."""


def outermost(runs: Iterable[dict[str, float]]) -> dict[str, float]:
    """Return the extremes over several runs."""
    found = list(runs)
    return {
        "lambda_min": min(run["lambda_min"] for run in found),
        "lambda_max": max(run["lambda_max"] for run in found),
    }


def one_by_one(
    contestants: dict[str, Callable[[], Any]], device: str
) -> tuple[dict[str, float], dict[str, Any], dict[str, int]]:
    """Run contestants one after the other on a GPU; return seconds, results and peak memory of each."""
    seconds: dict[str, float] = {}
    answers: dict[str, Any] = {}
    peaks: dict[str, int] = {}
    for name, run in contestants.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        began = now(device)
        answers[name] = run()
        seconds[name] = now(device) - began
        peaks[name] = torch.cuda.max_memory_allocated()
    return seconds, answers, peaks


def host_waits(run: Callable[[], Any]) -> int:
    """Count the host synchronizations of one run on a GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def sweep_seconds(model: nn.Module, options: Spectra) -> float:
    """Time the re-orthogonalization of a whole run: that at half the steps, times the steps."""
    size, device = sum(p.numel() for p in model.parameters()), torch.device(options.device)
    rows = max(1, options.steps // 2)
    basis = torch.randn(options.probes, rows, size, device=device) / size**0.5
    vector = torch.randn(options.probes, size, device=device)
    recurrence = Recurrence.start(options.probes, options.steps, device=device)
    sweeps = {
        "sweeps": lambda: orthogonalize(
            basis, vector, None, recurrence, step=rows - 1, eps=2.0**-23
        )
    }
    timing = interleaved(sweeps, rounds=7, device=device)["sweeps"]
    return timing.median * options.steps


def in_turn(
    contestants: dict[str, Callable[[], Any]], device: str
) -> tuple[dict[str, float], dict[str, Any]]:
    """Run contestants in alternation, and return the seconds and the results of each.

    A run takes minutes, during which the speed of the machine may change. Therefore each contestant has its
    own thread and random state, and only one thread runs at a time: every call of ``torch.autograd.grad``
    passes the turn to the next contestant. The time of a contestant is the sum of its turns.
    """
    order = deque(contestants)
    turn = threading.Condition()
    seconds = dict.fromkeys(contestants, 0.0)
    outcomes: dict[str, Any] = {}
    own = threading.local()
    gradient = torch.autograd.grad

    def take(name: str) -> None:
        turn.wait_for(lambda: order[0] == name)
        torch.set_rng_state(own.random_state)
        own.began = now(device)

    def leave(name: str) -> None:
        seconds[name] += now(device) - own.began
        own.random_state = torch.get_rng_state()
        order.rotate(-1)
        turn.notify_all()

    def gradient_and_next(*arguments: Any, **keywords: Any) -> Any:
        result = gradient(*arguments, **keywords)
        name = getattr(own, "name", None)
        if name is not None:
            with turn:
                leave(name)
                take(name)
        return result

    def work(name: str, run: Callable[[], Any]) -> None:
        own.name, own.random_state = name, random_state
        with turn:
            take(name)
        try:
            outcomes[name] = run()
        except BaseException as error:
            outcomes[name] = error
        with turn:
            leave(name)
            order.remove(name)

    random_state = torch.get_rng_state()
    torch.autograd.grad = gradient_and_next
    try:
        workers = [threading.Thread(target=work, args=item) for item in contestants.items()]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        torch.autograd.grad = gradient
    for outcome in outcomes.values():
        if isinstance(outcome, BaseException):
            raise outcome
    return seconds, outcomes


def now(device: str) -> float:
    """Return the time in seconds after synchronizing with the device."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def extremes_of(spectrum: Spectrum) -> dict[str, float]:
    """Return both extremes of a spectrum."""
    return {"lambda_min": spectrum.lambda_min, "lambda_max": spectrum.lambda_max}


def ours(model: nn.Module, batches: Batches, options: Spectra) -> Spectrum:
    """Compute a spectrum as users do, including reading the data and choosing a strategy."""
    return spectral_density(
        model,
        nn.CrossEntropyLoss(),
        batches,
        steps=options.steps,
        probes=options.probes,
        progress=False,
    )


@contextlib.contextmanager
def torch_eig() -> Iterator[None]:
    """Provide ``torch.eig``, which PyHessian calls, inside the context."""

    def eig(matrix: Tensor, eigenvectors: bool = False) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrix)
        return torch.stack([values, torch.zeros_like(values)], dim=1), vectors

    library: Any = torch
    before = library.eig
    library.eig = eig
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        library.eig = before


def on_gpu(model: nn.Module) -> bool:
    """Return whether the model is on a GPU."""
    return next(model.parameters()).is_cuda


def pyhessian_density(model: nn.Module, options: Spectra, **data: Any) -> dict[str, float]:
    """Run PyHessian's stochastic Lanczos quadrature."""
    hessian = importlib.import_module("pyhessian").hessian
    tool = hessian(model, nn.CrossEntropyLoss(), cuda=on_gpu(model), **data)
    nodes, _ = tool.density(iter=options.steps, n_v=options.probes)
    return {"lambda_min": float(min(map(min, nodes))), "lambda_max": float(max(map(max, nodes)))}


def pyhessian_everything(model: nn.Module, batches: Batches, options: Spectra) -> dict[str, float]:
    """Run PyHessian's power iteration, Hutchinson and Lanczos with its defaults."""
    hessian = importlib.import_module("pyhessian").hessian
    tool = hessian(model, nn.CrossEntropyLoss(), dataloader=batches, cuda=on_gpu(model))
    largest, _ = tool.eigenvalues()
    draws = tool.trace()
    nodes, _ = tool.density(iter=options.steps, n_v=options.probes)
    return {
        "lambda_min": float(min(map(min, nodes))),
        "lambda_max": float(max(map(max, nodes))),
        "lambda_max_by_power_iteration": float(largest[0]),
        "trace": float(np.mean(draws)),
        "trace_draws": len(draws),
    }


def eigenthings_density(model: nn.Module, batches: Batches, steps: int) -> dict[str, float]:
    """Run hessian-eigenthings' Lanczos."""
    peer = importlib.import_module("hessian_eigenthings")
    operator = peer.HessianOperator(model, batches, peer.supervised_loss(nn.CrossEntropyLoss()))
    start = torch.randn(operator.size, device=next(model.parameters()).device)
    run = peer.lanczos_tridiagonal(operator, start / start.norm(), steps)
    alpha, beta = np.asarray(run.alphas, dtype=float), np.asarray(run.betas, dtype=float)
    off = beta[: len(alpha) - 1]
    nodes = np.linalg.eigvalsh(np.diag(alpha) + np.diag(off, 1) + np.diag(off, -1))
    return {"lambda_min": float(nodes[0]), "lambda_max": float(nodes[-1])}


def curvlinops_density(model: nn.Module, batches: Batches, steps: int) -> dict[str, float]:
    """Run curvlinops' Lanczos on its own Hessian-vector products."""
    peer = importlib.import_module("curvlinops")
    spectrum = importlib.import_module("curvlinops.papyan2020traces.spectrum")
    parameters = [value for value in model.parameters() if value.requires_grad]
    operator = peer.HessianLinearOperator(
        model, nn.CrossEntropyLoss(), parameters, batches, check_deterministic=False
    )
    nodes, _ = spectrum.fast_lanczos(operator, steps)
    return {"lambda_min": float(nodes.min()), "lambda_max": float(nodes.max())}


class Quadratic(nn.Module):
    """A model whose output is the loss ``w'Aw / 2``, with Hessian A."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix, requires_grad=False)
        self.vector = nn.Parameter(torch.ones(len(matrix), dtype=matrix.dtype))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the loss; ``inputs`` are ignored."""
        loss: Tensor = self.vector @ self.matrix @ self.vector / 2
        return loss


def correctness(*, peers: bool) -> dict[str, Any]:
    """Compare the extremes reported by each library for operators with known spectra."""
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(200, 200, generator=generator, dtype=torch.float64))

    def rotated(values: Tensor) -> Tensor:
        matrix: Tensor = (basis * values) @ basis.T
        return ((matrix + matrix.T) / 2).float()

    inner = torch.linspace(-0.5, 0.5, 198, dtype=torch.float64)
    factor = torch.randn(200, 9, generator=generator, dtype=torch.float64)
    cases = {
        "two values 1 and 50": (rotated(torch.tensor([1.0] * 100 + [50.0] * 100).double()), 60),
        "opposite extremes -7 and 7": (
            rotated(torch.cat([inner, torch.tensor([-7.0, 7.0]).double()])),
            40,
        ),
        "positive, rank 9": ((factor @ factor.T).float(), 25),
    }
    found: dict[str, Any] = {}
    for name, (matrix, steps) in cases.items():
        exact = torch.linalg.eigvalsh(matrix.double())
        found[name] = {
            "exact": {"lambda_min": float(exact[0]), "lambda_max": float(exact[-1])},
            "fastsam": extremes_of(operator_spectrum(MatrixOperator(matrix), steps=steps)),
        }
        if peers:
            hessian = importlib.import_module("pyhessian").hessian
            with torch_eig():
                torch.manual_seed(0)
                tool = hessian(
                    Quadratic(matrix),
                    lambda outputs, targets: outputs,
                    data=(torch.zeros(1), torch.zeros(1)),
                    cuda=False,
                )
                nodes, _ = tool.density(iter=steps, n_v=1)
                power, _ = tool.eigenvalues()
            found[name]["pyhessian"] = {
                "lambda_min": float(min(nodes[0])),
                "lambda_max": float(max(nodes[0])),
                "lambda_max_by_power_iteration": float(power[0]),
            }
        print(name, found[name], flush=True)
    return found


PARTS_OF_A_MODEL: dict[str, Callable[[nn.Module, Batches, Spectra], dict[str, Any]]] = {
    "products": compare_products,
    "density": compare_density,
    "everything": compare_everything,
    "classes": compare_classes,
    "sweeps": measure_sweeps,
}
PARTS = ("correctness", *PARTS_OF_A_MODEL)
