"""Tests that need a GPU: the host never waits, a phase is one launch, devices share one norm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import peers
from benchmarks.shapes import resnet50
from fastsam import SAM
from fastsam.optim import capture_step
from python_tests.optim.trajectories import (
    TOLERANCE,
    OracleSAM,
    Problem,
    assert_close,
    assert_same_bits,
)

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:the ascent left")]

SHAPES = [(3, 5), (7,), (), (0,), (20_003,)]
BASES = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    (torch.optim.Adam, {"lr": 0.05, "amsgrad": True, "eps": 1e-3}),
    (torch.optim.AdamW, {"lr": 0.05, "eps": 1e-3}),
]


@pytest.fixture(params=BASES, ids=lambda case: case[0].__name__)
def base(request):
    return request.param


@contextmanager
def nothing_waits() -> Iterator[None]:
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_gpu(problem: Problem, dtypes: list[torch.dtype] | None = None) -> list[nn.Parameter]:
    dtypes = dtypes or [problem.dtype] * len(problem.start)
    return [nn.Parameter(w.to("cuda", t)) for w, t in zip(problem.start, dtypes, strict=True)]


def gradients(problem: Problem, parameters: list[nn.Parameter], which: int) -> list[torch.Tensor]:
    """Compute all gradients in advance, because the test problem's arithmetic may wait."""
    return [
        problem.gradient(i, p.detach().cpu(), 0, which).to(p.device, p.dtype)
        for i, p in enumerate(parameters)
    ]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_dtype_equals_the_oracle(base, dtype, seed):
    problem = Problem(SHAPES, dtype=dtype, seed=seed)
    found, expected = on_gpu(problem), problem.parameters()
    optimizer = SAM(found, base[0], rho=0.5, **base[1])
    oracle = OracleSAM([{"params": expected}], base[0], rho=0.5, **base[1])
    for step in range(6):
        for which, name in enumerate(("first_step", "second_step")):
            twins = [nn.Parameter(p.detach().cpu()) for p in found]
            problem.set_gradients(twins, step, which)
            for p, twin in zip(found, twins, strict=True):
                p.grad = twin.grad.cuda()
            problem.set_gradients(expected, step, which)
            getattr(optimizer, name)()
            getattr(oracle, name)()
    assert_close(
        [p.detach().cpu() for p in found], [p.detach() for p in expected], TOLERANCE[dtype]
    )


@pytest.mark.parametrize("stochastic", [False, True])
def test_no_step_waits(base, stochastic, seed):
    """With settings that change, mixed dtypes, a gradient that is not finite, and a restore."""
    problem = Problem([(64,), (33,), (5, 7)], seed=seed)
    parameters = on_gpu(problem, [torch.float32, torch.bfloat16, torch.float64])
    optimizer = SAM(parameters, base[0], stochastic_rounding=stochastic, **base[1])
    passes = [gradients(problem, parameters, which) for which in range(2)]
    broken = [g.clone() for g in passes[1]]
    broken[0][3] = float("nan")

    def step(second: list[torch.Tensor]) -> None:
        for given, finish in zip(
            (passes[0], second), (optimizer.first_step, optimizer.second_step), strict=True
        ):
            for p, g in zip(parameters, given, strict=True):
                p.grad = g
            finish(zero_grad=True)

    step(passes[1])
    with nothing_waits():
        for i in range(20):
            optimizer.param_groups[0].update(lr=0.1 / (1 + i), rho=0.05 * (1 + i % 3))
            step(broken if i == 7 else passes[1])
        for p, g in zip(parameters, passes[0], strict=True):
            p.grad = g
        optimizer.first_step()
        optimizer.restore()
    assert int(optimizer.skipped_steps) == 1


def test_no_scaled_step_waits(base, seed):
    problem = Problem([(64,), (5, 7)], seed=seed)
    parameters = on_gpu(problem)
    optimizer = SAM(parameters, base[0], **base[1])
    scaler = GradScaler("cuda", init_scale=256.0)
    passes = [gradients(problem, parameters, which) for which in range(2)]
    one = torch.ones((), device="cuda")
    scaled = [[g * 256.0 for g in given] for given in passes]
    before = [p.detach().clone() for p in parameters]

    def step(overflow: bool) -> None:
        for given, half in zip(scaled, (optimizer.ascent, optimizer), strict=True):
            scaler.scale(one)
            for p, g in zip(parameters, given, strict=True):
                p.grad = g * float("inf") if overflow else g.clone()
            scaler.step(half)
            half.zero_grad()
        scaler.update()

    step(overflow=True)
    assert_same_bits([p.detach().cpu() for p in parameters], [w.cpu() for w in before])
    assert scaler.get_scale() == 128.0
    scaler.update(256.0)
    with nothing_waits():
        for _ in range(3):
            step(overflow=False)
    assert int(optimizer.skipped_steps) == 1


def test_settings_on_the_device_are_read_there(seed):
    problem = Problem(SHAPES, seed=seed)
    results = []
    for place in ("cuda", "cpu"):
        parameters = [nn.Parameter(w.to(place)) for w in problem.start]
        lr, rho = (torch.tensor(value, device=place) for value in (0.1, 0.3))
        optimizer = SAM(parameters, torch.optim.SGD, rho=rho, lr=lr)
        for i in range(3):
            lr.fill_(0.1 / (1 + i))
            rho.fill_(0.3 * (1 + i))
            passes = [gradients(problem, parameters, which) for which in range(2)]
            for given, finish in zip(
                passes, (optimizer.first_step, optimizer.second_step), strict=True
            ):
                for p, g in zip(parameters, given, strict=True):
                    p.grad = g
                with nothing_waits():
                    finish()
        results.append([p.detach().cpu() for p in parameters])
    assert_close(*results, 1e-5)


WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def test_a_phase_is_one_launch_and_nothing_else_happens(seed):
    """ResNet-50, as a profiler sees it: native calls included."""
    parameters = [nn.Parameter(torch.randn(shape, device="cuda")) for shape in resnet50()]
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer = SAM(parameters, torch.optim.SGD, lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.first_step()
        optimizer.second_step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        with record_function("one step"):
            optimizer.first_step()
            optimizer.second_step()
        torch.cuda.synchronize()
    events = recorded.events()
    span = next(e for e in events if e.name == "one step" and e.device_type == DeviceType.CPU)
    inside = [
        e.name
        for e in events
        if e.device_type == DeviceType.CPU
        and span.time_range.start <= e.time_range.start < span.time_range.end
    ]
    assert not [name for name in inside if name in WAITS]
    launched = [
        e.name
        for e in events
        if e.device_type == DeviceType.CUDA and not e.name.startswith(("one step", "Optimizer."))
    ]
    phases = ("norm_kernel", "perturb_kernel", "check_kernel", "update_kernel")
    assert Counter(next((p for p in phases if p in name), name) for name in launched) == Counter(
        phases
    )


@pytest.mark.parametrize("spoiled", [None, "cpu", "cuda"])
def test_a_model_over_two_devices_has_one_norm(base, spoiled, seed):
    """It also skips on both if one of them has a gradient that is not finite."""
    problem = Problem([(40,), (3, 5), (17,), (6,)], seed=seed)
    results = []
    for places in (("cpu", "cuda", "cuda", "cpu"), ("cpu",) * 4):
        parameters = [nn.Parameter(w.to(d)) for w, d in zip(problem.start, places, strict=True)]
        optimizer = SAM(parameters, base[0], rho=0.5, **base[1])
        for step in range(4):
            for which, finish in enumerate((optimizer.first_step, optimizer.second_step)):
                for i, p in enumerate(parameters):
                    p.grad = problem.gradient(i, p.detach().cpu(), step, which).to(p.device)
                if step == 2 and which == 1 and spoiled is not None:
                    parameters[0 if spoiled == "cpu" else 1].grad.view(-1)[0] = float("inf")
                finish()
        results.append([p.detach().cpu() for p in parameters])
        assert int(optimizer.skipped_steps) == (spoiled is not None)
    assert_close(*results, 1e-5)


def test_steps_follow_the_current_stream(seed):
    problem = Problem(SHAPES, seed=seed)
    results = []
    for stream in (torch.cuda.Stream(), torch.cuda.current_stream()):
        parameters = on_gpu(problem)
        optimizer = SAM(parameters, torch.optim.SGD, lr=0.1, momentum=0.9)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(4):
                for finish in (optimizer.first_step, optimizer.second_step):
                    for p in parameters:
                        p.grad = p.detach().sin() + 0.1
                    finish()
        torch.cuda.synchronize()
        results.append([p.detach().cpu() for p in parameters])
    assert_same_bits(*results)


def test_optimizers_on_several_streams_do_not_disturb_each_other(base, seed):
    """Each has the bits that it has alone, also on a second run."""
    problems = [Problem([(300_001,), (64, 5)], seed=seed + i) for i in range(4)]
    streams = [torch.cuda.Stream() for _ in problems]

    def run(streams: list[torch.cuda.Stream]) -> list[torch.Tensor]:
        found = [on_gpu(problem) for problem in problems]
        optimizers = [SAM(parameters, base[0], rho=0.5, **base[1]) for parameters in found]
        for problem, parameters in zip(problems, found, strict=True):
            for p, g in zip(parameters, gradients(problem, parameters, 0), strict=True):
                p.grad = g
        torch.cuda.synchronize()
        for _ in range(6):
            for optimizer, stream in zip(optimizers, streams, strict=True):
                with torch.cuda.stream(stream):
                    optimizer.first_step()
                    optimizer.second_step()
        torch.cuda.synchronize()
        return [p.detach().cpu() for parameters in found for p in parameters]

    alone = run([torch.cuda.current_stream()] * len(problems))
    for _ in range(2):
        assert_same_bits(run(streams), alone)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_replays_have_the_bits_of_eager_steps(name, seed):
    """The benchmark's captured step, with all fixed gradients."""
    problem = Problem(SHAPES, seed=seed)
    results = []
    for make in (peers.fused, peers.captured):
        parameters = on_gpu(problem)
        for p, g in zip(parameters, gradients(problem, parameters, 0), strict=True):
            p.grad = g
        step = make(parameters, peers.BASES[name])
        for _ in range(5):
            step()
        results.append([p.detach().cpu() for p in parameters])
    assert_same_bits(*results)


def test_a_step_that_waits_is_refused_before_its_capture(seed):
    torch.manual_seed(seed)
    model = nn.Linear(4, 2).cuda()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    batch = torch.randn(8, 4, device="cuda"), torch.randint(2, (8,), device="cuda")
    before = [p.detach().clone() for p in model.parameters()]

    def loss(outputs, targets):
        value = nn.functional.cross_entropy(outputs, targets)
        return value * (1.0 if value.item() > 0 else 2.0)

    with pytest.raises(RuntimeError, match="waits for the GPU, for example in"):
        capture_step(model, loss, optimizer, batch)
    assert_same_bits(list(model.parameters()), before)
    assert optimizer.attempted_steps == 0
    torch.cuda.empty_cache()  # fails in a process whose allocator is in the middle of a capture
    step = capture_step(model, nn.functional.cross_entropy, optimizer, batch)
    assert step(batch) > step(batch)


def test_a_capture_that_fails_midway_leaves_no_open_step(seed, monkeypatch):
    torch.manual_seed(seed)
    model = nn.Linear(4, 2).cuda()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    batch = torch.randn(8, 4, device="cuda"), torch.randint(2, (8,), device="cuda")
    before = [p.detach().clone() for p in model.parameters()]
    passes = iter(range(10_000))

    def loss(outputs, targets):
        if torch.cuda.is_current_stream_capturing() and next(passes) == 1:
            raise RuntimeError("in the second pass")
        return nn.functional.cross_entropy(outputs, targets)

    with pytest.raises(RuntimeError):
        capture_step(model, loss, optimizer, batch)
    optimizer.restore()
    assert_same_bits(list(model.parameters()), before)
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.first_step(zero_grad=True)
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.second_step()


def test_memory_beyond_weights_gradients_and_momentum():
    # A multiple of 2 MiB, to which the allocator rounds large blocks.
    parameter = nn.Parameter(torch.randn(5 * 2**20, device="cuda"))
    parameter.grad = torch.randn_like(parameter)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer = SAM([parameter], torch.optim.SGD, lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.first_step()
        optimizer.second_step()
    extra = torch.cuda.max_memory_allocated() - before - parameter.nbytes
    assert extra == pytest.approx(parameter.nbytes, abs=100_000)


def test_16_bit_weights_with_cuda_as_the_default_device():
    torch.set_default_device("cuda")
    try:
        weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        optimizer = SAM([weight], torch.optim.SGD, rho=2.0, lr=0.25)
        weight.grad = torch.ones_like(weight)
        for _ in range(2):  # the second ascent reads the count that the first has sent
            optimizer.first_step()
            optimizer.second_step()
    finally:
        torch.set_default_device(None)
    assert weight.tolist() == [0.5] * 4
