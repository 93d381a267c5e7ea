"""Whole trajectories against plain PyTorch and against a float64 oracle."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from fastsam import SAM
from fastsam.optim.plain import PlainSAM
from python_tests.optim.trajectories import (
    TOLERANCE,
    OracleSAM,
    Problem,
    assert_close,
    assert_same_bits,
    make,
)

pytestmark = pytest.mark.filterwarnings("ignore:the ascent left")

SHAPES = [(3, 5), (7,), (1,), (), (0,), (2, 3, 4), (131,)]

SGD = [
    {"lr": 0.1},
    {"lr": 0.1, "momentum": 0.9},
    {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2},
    {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.5},
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 1e-2},
    {"lr": 0.01, "momentum": 0.5, "maximize": True},
    {"lr": 0.1, "weight_decay": 1e-2},
    {"lr": 0.1, "momentum": 0.9, "foreach": True},
]
ADAM = [
    {"lr": 0.05},
    {"lr": 0.05, "weight_decay": 0.1},
    {"lr": 0.05, "amsgrad": True},
    {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-4},
    {"lr": 0.05, "maximize": True, "weight_decay": 0.1, "amsgrad": True},
]
CONFIGURATIONS = [
    *((torch.optim.SGD, options) for options in SGD),
    *((torch.optim.Adam, options) for options in ADAM),
    (torch.optim.Adam, {"lr": 0.05, "decoupled_weight_decay": True, "weight_decay": 0.1}),
    *((torch.optim.AdamW, options) for options in ADAM),
    (torch.optim.RMSprop, {"lr": 0.02, "momentum": 0.9}),
    (torch.optim.NAdam, {"lr": 0.02}),
]


def name(value: Any) -> str | None:
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, dict):
        return "-".join(f"{key}={option}" for key, option in value.items())
    return None


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(("base", "options"), CONFIGURATIONS, ids=name)
def test_float32_equals_plain_sam_and_the_oracle(base, options, adaptive, seed):
    problem = Problem(SHAPES, seed=seed)
    found, plain, oracle = (
        problem.run(*make(kind, problem, base, rho=0.1, adaptive=adaptive, **options), 12)
        for kind in (SAM, PlainSAM, OracleSAM)
    )
    assert_close(found, plain, TOLERANCE[torch.float32])
    assert_close(found, oracle, TOLERANCE[torch.float32])
    assert any(not torch.equal(f, s) for f, s in zip(found, problem.start, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("base", "options"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
        (torch.optim.Adam, {"lr": 0.05, "eps": 1e-3}),
        (torch.optim.AdamW, {"lr": 0.05, "amsgrad": True, "eps": 1e-3}),
        # A large eps: otherwise rounding in 16 bits determines its step where a gradient is nearly 0.
        (torch.optim.RMSprop, {"lr": 0.1, "eps": 1.0}),
    ],
    ids=name,
)
def test_every_dtype_equals_the_oracle(base, options, dtype, seed):
    problem = Problem(SHAPES, dtype=dtype, seed=seed)
    found, oracle = (
        problem.run(*make(kind, problem, base, rho=0.5, **options), 8) for kind in (SAM, OracleSAM)
    )
    assert_close(found, oracle, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_rmsprop_at_a_small_eps(dtype, seed):
    """In 16 bits compared with plain PyTorch, which rounds intermediate results at the same places.

    The float64 oracle does not round them. Where a gradient is nearly 0, rounding then determines a whole
    step: 4 of 400 runs in 16 bits differ from the oracle by up to 3 tolerances, and so does plain PyTorch.
    fastsam and plain PyTorch differ by at most a third of the tolerance.
    """
    problem = Problem(SHAPES, dtype=dtype, seed=seed)
    other = OracleSAM if dtype == torch.float64 else PlainSAM
    found, expected = (
        problem.run(*make(kind, problem, torch.optim.RMSprop, rho=0.5, lr=0.02, eps=1e-3), 8)
        for kind in (SAM, other)
    )
    assert_close(found, expected, TOLERANCE[dtype] * (1 if dtype == torch.float64 else 0.5))


def test_mixed_dtypes_share_one_norm(seed):
    """Both buckets use the norm over both."""
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float32]
    problem = Problem([(5,), (64,), (3, 3), (2,)], dtype=torch.float64, seed=seed)
    tops, results = [], []
    for kind in (SAM, OracleSAM):
        parameters = [
            nn.Parameter(w.to(t, copy=True)) for w, t in zip(problem.start, dtypes, strict=True)
        ]
        optimizer = kind([{"params": parameters}], torch.optim.SGD, rho=0.5, lr=0.1, momentum=0.9)
        problem.set_gradients(parameters, 0, 0)
        optimizer.first_step()
        tops.append([p.detach().clone() for p in parameters])
        problem.set_gradients(parameters, 0, 1)
        optimizer.second_step()
        results.append(problem.run(optimizer, parameters, range(1, 6)))
    for f, e in zip(*tops, strict=True):
        # The gradients of 16 and 32 bits are squared in float32: 1e-7 of the radius.
        assert_close([f], [e], max(TOLERANCE[f.dtype], 1e-7))
    assert_close(*results, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_tensor_lr_follows_its_tensor(base, seed):
    problem = Problem(SHAPES, seed=seed)
    results = []
    for kind in (SAM, PlainSAM):
        lr = torch.tensor(0.05)
        optimizer, parameters = make(kind, problem, base, lr=lr)
        problem.run(optimizer, parameters, 3)
        lr.mul_(0.5)
        results.append(problem.run(optimizer, parameters, range(3, 6)))
    assert_close(*results, TOLERANCE[torch.float32])


@pytest.mark.parametrize("rho", [0.0, 0.05, torch.tensor(0.3), 2])
def test_rho_may_be_a_number_or_a_tensor(rho, seed):
    problem = Problem(SHAPES, seed=seed)
    found = problem.run(*make(SAM, problem, torch.optim.SGD, rho=rho, lr=0.1), 4)
    expected = problem.run(*make(OracleSAM, problem, torch.optim.SGD, rho=float(rho), lr=0.1), 4)
    assert_close(found, expected, TOLERANCE[torch.float32])


def test_rho_zero_equals_the_base_optimizer(seed):
    problem = Problem([(4,)], seed=seed)
    found = problem.run(*make(SAM, problem, torch.optim.SGD, rho=0.0, lr=0.1), 1)
    w, g = problem.start[0], problem.gradient(0, problem.start[0], 0, 1)
    assert_close(found, [w - 0.1 * g], 1e-6)


def test_groups_with_their_own_settings(seed):
    groups = [
        (2, {"rho": 0.0, "lr": 0.2}),
        (1, {"rho": 0.5, "adaptive": True, "weight_decay": 0.1}),
        (2, {"rho": 0.1, "momentum": 0.0}),
        (2, {"adaptive": True, "eta": 0.3, "nesterov": True}),
    ]
    problem = Problem(SHAPES, groups, seed=seed)
    results = [
        problem.run(*make(kind, problem, torch.optim.SGD, rho=0.2, lr=0.1, momentum=0.9), 8)
        for kind in (SAM, OracleSAM)
    ]
    assert_close(*results, TOLERANCE[torch.float32])


def test_settings_changed_between_steps_take_effect(seed):
    problem = Problem(SHAPES, seed=seed)
    schedule = [
        {"lr": 0.1, "momentum": 0.0},
        {"lr": 0.05, "momentum": 0.9, "rho": 0.5},
        {"weight_decay": 0.1, "nesterov": True},
        {"momentum": 0.0, "nesterov": False, "rho": 0.0},
        {"adaptive": True, "rho": 0.2},
        {"momentum": 0.5, "maximize": True, "adaptive": False},
    ]
    results = []
    for kind in (SAM, PlainSAM):
        optimizer, parameters = make(kind, problem, torch.optim.SGD, rho=0.1, lr=0.2)
        for i, change in enumerate(schedule):
            optimizer.param_groups[0].update(change)
            problem.run(optimizer, parameters, range(2 * i, 2 * i + 2))
        results.append([p.detach() for p in parameters])
    assert_close(*results, TOLERANCE[torch.float32])


def test_amsgrad_may_be_switched_on(seed):
    problem = Problem(SHAPES, seed=seed)
    optimizer, parameters = make(SAM, problem, torch.optim.Adam, lr=0.05)
    problem.run(optimizer, parameters, 2)
    optimizer.param_groups[0]["amsgrad"] = True
    problem.run(optimizer, parameters, range(2, 4))
    assert all(bool(optimizer.state[p]["max_exp_avg_sq"].any()) for p in parameters if p.numel())


def test_asam_as_in_its_paper_normalizes_only_weights(seed):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    problem = Problem([tuple(p.shape) for p in model.parameters()], seed=seed)
    for named, expected_adaptive in ((True, [1, 0, 1, 0]), (False, [1, 0, 0, 0])):
        parameters = problem.parameters()
        names = [n for n, _ in model.named_parameters()]
        given = list(zip(names, parameters, strict=True)) if named else parameters
        optimizer = SAM(given, torch.optim.SGD, rho=0.3, adaptive="weights", lr=0.1)
        twins = problem.parameters()
        oracle = OracleSAM(
            [
                {"params": [p], "adaptive": bool(a), "eta": 0.01}
                for p, a in zip(twins, expected_adaptive, strict=True)
            ],
            torch.optim.SGD,
            rho=0.3,
            lr=0.1,
        )
        assert_close(problem.run(optimizer, parameters, 5), problem.run(oracle, twins, 5), 1e-5)


def test_the_same_run_twice_gives_the_same_bits(seed):
    problem = Problem([(64, 33), (100_003,), (5,)], seed=seed)
    runs = [
        problem.run(*make(SAM, problem, base, adaptive=True, lr=0.1), 3)
        for base in (torch.optim.SGD, torch.optim.SGD, torch.optim.Adam, torch.optim.Adam)
    ]
    assert_same_bits(runs[0], runs[1])
    assert_same_bits(runs[2], runs[3])


def test_the_bits_do_not_depend_on_the_number_of_threads(seed):
    problem = Problem([(300, 331), (100_003,), (5,)], seed=seed)
    runs = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        runs.append(problem.run(*make(SAM, problem, torch.optim.SGD, adaptive=True, lr=0.1), 3))
    assert_same_bits(*runs)


class Residual(nn.Module):
    """A small convolutional network with the layers of a ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.branch = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.SiLU(),
            nn.Conv2d(8, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
        )
        self.head = nn.Linear(8, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = nn.functional.silu(self.norm(self.stem(images)))
        return self.head(nn.functional.silu(x + self.branch(x)).mean(dim=(2, 3)))


def train(model: nn.Module, optimizer: Any, steps: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dtype = model.head.weight.dtype
    for _ in range(steps):
        images = torch.randn(16, 1, 8, 8, generator=generator).to(dtype)
        labels = torch.randint(10, (16,), generator=generator)
        for finish in (optimizer.first_step, optimizer.second_step):
            nn.functional.cross_entropy(model(images), labels).backward()
            finish(zero_grad=True)
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize(
    ("dtype", "lr", "tolerance"), [(torch.float64, 0.1, 1e-8), (torch.float32, 0.01, 1e-5)]
)
def test_twenty_steps_of_a_network_equal_plain_sam(dtype, lr, tolerance, seed):
    """With a smooth network and a small rate in float32, because training amplifies rounding."""
    torch.manual_seed(seed)
    models = [Residual().to(dtype) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    settings = {"rho": 0.05, "lr": lr, "momentum": 0.9, "weight_decay": 2e-4}
    optimizers = [
        SAM(models[0].parameters(), torch.optim.SGD, **settings),
        PlainSAM(models[1].parameters(), torch.optim.SGD, foreach=False, fused=False, **settings),
    ]
    results = [
        train(model, optimizer, 20, seed)
        for model, optimizer in zip(models, optimizers, strict=True)
    ]
    assert_close(*results, tolerance)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of the compiler itself
def test_a_compiled_model_sees_every_write(seed):
    """The compiled passes read the weights at fixed addresses, which must not change."""
    torch.manual_seed(seed)
    models = [Residual().double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    results = []
    for model, compiled in zip(models, (True, False), strict=True):
        run = torch.compile(model, backend="aot_eager") if compiled else model
        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1, momentum=0.9)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(3):
            images = torch.randn(8, 1, 8, 8, generator=generator, dtype=torch.float64)
            for finish in (optimizer.first_step, optimizer.second_step):
                run(images).square().mean().backward()
                finish(zero_grad=True)
        results.append([p.detach() for p in model.parameters()])
    assert_close(*results, 1e-10)


def test_channels_last_network_equals_the_contiguous_one(seed):
    models = [Residual().double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    models[1].to(memory_format=torch.channels_last)
    results = []
    for model in models:
        optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(5):
            images = torch.randn(8, 1, 8, 8, generator=generator, dtype=torch.float64)
            for finish in (optimizer.first_step, optimizer.second_step):
                model(images).square().mean().backward()
                finish(zero_grad=True)
        results.append([p.detach().clone() for p in model.parameters()])
    assert_close(*results, 1e-10)


def test_the_pairs_of_settings_are_options_of_the_base():
    """Guard the lists above: if torch renamed an option, its test would silently test nothing."""
    for base, options in itertools.chain(CONFIGURATIONS):
        base([nn.Parameter(torch.ones(1))], **options)
