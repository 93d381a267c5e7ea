"""Gradients that are missing, zero, not finite, sparse or of the wrong kind, in either pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastsam import SAM
from fastsam.optim.plain import PlainSAM
from python_tests.backend import is_native
from python_tests.optim.trajectories import (
    Problem,
    assert_close,
    assert_same_bits,
    everywhere,
    make,
)

pytestmark = pytest.mark.filterwarnings("ignore:the ascent left")

SHAPES = [(3, 5), (7,), (), (33,)]
BASES = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.01}),
    (torch.optim.AdamW, {"lr": 0.05}),
    (torch.optim.RMSprop, {"lr": 0.02}),
]
INF, NAN = float("inf"), float("nan")


@pytest.fixture(params=BASES, ids=lambda case: case[0].__name__)
def base(request):
    return request.param


def patterns(value):
    """Return patterns with ``value`` in parameter 1 (and 2 in odd steps), in either or both passes."""
    return {
        "first": lambda i, s, w: value if i == 1 and w == 0 else True,
        "second": lambda i, s, w: value if i in (1, 1 + s % 2) and w == 1 else True,
        "both": lambda i, s, w: value if i in (1, 1 + s % 2) else True,
        "sometimes": lambda i, s, w: value if (i + s + w) % 3 == 0 else True,
    }


@pytest.mark.parametrize("where", ["first", "second", "both", "sometimes"])
def test_missing_gradients(base, where, seed):
    problem = Problem(SHAPES, seed=seed)
    results = [
        problem.run(*make(kind, problem, base[0], **base[1]), 7, patterns(None)[where])
        for kind in (SAM, PlainSAM)
    ]
    assert_close(*results, 1e-5)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("second_call", [False, True])
def test_an_ascent_without_any_gradient_is_refused(base, adaptive, steps_before, second_call, seed):
    """For every call that makes the ascent; nothing changes, and the next step works."""
    problem = Problem(SHAPES, seed=seed)
    optimizer, parameters = make(SAM, problem, base[0], adaptive=adaptive, **base[1])
    twin, twins = make(SAM, problem, base[0], adaptive=adaptive, **base[1])
    problem.run(optimizer, parameters, steps_before)
    before = problem.run(twin, twins, steps_before)
    for frozen in (False, True):
        for p in parameters:
            p.requires_grad_(not frozen)
        with pytest.raises(RuntimeError, match="no parameter has a gradient"):
            optimizer.ascent.step() if second_call else optimizer.first_step(zero_grad=True)
    for p in parameters:
        p.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"needs a? ?first_step\(\) before it"):
        optimizer.second_step()
    assert_same_bits([p.detach() for p in parameters], before)
    assert int(optimizer.skipped_steps) == 0
    steps = range(steps_before, steps_before + 2)
    assert_same_bits(problem.run(optimizer, parameters, steps), problem.run(twin, twins, steps))


def test_a_first_pass_of_a_closure_without_any_gradient_is_refused(base, seed):
    problem = Problem(SHAPES, seed=seed)
    optimizer, parameters = make(SAM, problem, base[0], closure="both_passes", **base[1])
    calls = []
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        optimizer.step(lambda: calls.append(1) or 1.0)
    assert calls == [1]
    assert_same_bits([p.detach() for p in parameters], problem.start)


def test_one_gradient_is_enough_for_an_ascent(base, seed):
    """The gradient of one parameter in either group, even an empty one."""
    problem = Problem([*SHAPES, (0,)], seed=seed)
    for only in range(len(problem.shapes)):
        results = [
            problem.run(
                *make(kind, problem, base[0], **base[1]),
                2,
                lambda i, s, w, only=only: True if w == 1 or i == only else None,
            )
            for kind in (SAM, PlainSAM)
        ]
        assert_close(*results, 1e-5)


def test_zero_gradients_do_not_divide_by_zero(base, seed):
    problem = Problem(SHAPES, seed=seed)
    optimizer, parameters = make(SAM, problem, base[0], **base[1])
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.first_step()
    assert_same_bits([p.detach() for p in parameters], problem.start)
    problem.set_gradients(parameters, 0, 1)
    optimizer.second_step()
    assert int(optimizer.skipped_steps) == 0
    expected = problem.run(*make(PlainSAM, problem, base[0], rho=0.0, **base[1]), 1)
    assert_close([p.detach() for p in parameters], expected, 1e-5)


@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("where", ["first", "second", "both"])
def test_steps_with_gradients_that_are_not_finite_are_skipped(base, value, where, seed):
    """Weights and state equal those of a run without the bad steps."""
    problem = Problem(SHAPES, seed=seed)
    bad = {0, 2, 3}  # the first step too, which must create no state

    def gradients(i, step, which):
        return patterns(value)[where](i, step, which) if step in bad else True

    optimizer, parameters = make(SAM, problem, base[0], **base[1])
    twin, twins = make(SAM, problem, base[0], **base[1])
    for step in range(6):
        before = [p.detach().clone() for p in parameters]
        problem.run(optimizer, parameters, range(step, step + 1), gradients)
        if step in bad:
            assert_same_bits([p.detach() for p in parameters], before)
        else:
            problem.run(twin, twins, range(step, step + 1))
    assert_same_bits([p.detach() for p in parameters], [p.detach() for p in twins])
    assert int(optimizer.skipped_steps) == len(bad)
    for p, t in zip(parameters, twins, strict=True):
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, twin.state[t][key]), key


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("which", [0, 1])
def test_every_dtype_is_checked(dtype, which, seed):
    problem = Problem([(5,), (40,)], dtype=dtype, seed=seed)
    optimizer, parameters = make(SAM, problem, torch.optim.SGD, lr=0.1)
    found = problem.run(
        optimizer, parameters, 1, lambda i, s, w: NAN if (i, w) == (1, which) else True
    )
    assert_same_bits(found, problem.start)
    assert int(optimizer.skipped_steps) == 1


def test_one_bad_dtype_skips_every_bucket(seed):
    problem = Problem([(5,), (6,)], dtype=torch.float64, seed=seed)
    for which in (0, 1):
        for bad in (0, 1):
            parameters = [
                nn.Parameter(problem.start[0].clone()),
                nn.Parameter(problem.start[1].float()),
            ]
            before = [p.detach().clone() for p in parameters]
            optimizer = SAM(parameters, torch.optim.SGD, lr=0.1)
            found = problem.run(
                optimizer,
                parameters,
                1,
                lambda i, s, w, at=(bad, which): INF if (i, w) == at else True,
            )
            assert_same_bits(found, before)
            assert int(optimizer.skipped_steps) == 1


def test_the_square_of_a_float16_gradient_may_overflow():
    """The norm is summed in float64: 60000 is a fine gradient."""
    p = nn.Parameter(torch.zeros(10, dtype=torch.float16))
    optimizer = SAM([p], torch.optim.SGD, rho=1.0, lr=0.0)
    p.grad = torch.full_like(p, 60000.0)
    optimizer.first_step()
    assert torch.allclose(p.detach().double(), torch.full((10,), 10**-0.5).double(), rtol=1e-3)


def test_the_square_of_a_float32_gradient_may_overflow():
    p = nn.Parameter(torch.zeros(4))
    optimizer = SAM([p], torch.optim.SGD, rho=1.0, lr=0.0)
    p.grad = torch.full_like(p, 1e25)
    optimizer.first_step()
    # If the sum of squares is float32, too, the step is skipped.
    assert torch.allclose(p.detach(), torch.full((4,), 0.5 if is_native() else 0.0))
    optimizer.second_step()
    assert optimizer.skipped_steps.item() == (0 if is_native() else 1)


def test_gradients_far_below_the_epsilon_hardly_move_the_weights():
    """1e-12 is added to the norm, as in the reference implementation, and not to its square."""
    p = nn.Parameter(torch.zeros(4))
    optimizer = SAM([p], torch.optim.SGD, rho=1.0, lr=0.0)
    p.grad = torch.full_like(p, 1e-13)
    optimizer.first_step()
    expected = 1e-13 / (2e-13 + 1e-12)
    assert torch.allclose(p.detach(), torch.full((4,), expected), rtol=1e-5, atol=0.0)


def test_without_the_check_the_second_pass_is_not_checked(seed):
    problem = Problem([(5,)], seed=seed)
    optimizer, parameters = make(SAM, problem, torch.optim.SGD, check_finite=False, lr=0.1)
    problem.run(optimizer, parameters, 1, lambda i, s, w: NAN if w == 1 else True)
    assert bool(parameters[0].isnan().any())
    assert int(optimizer.skipped_steps) == 0


def test_without_the_check_the_first_pass_is_still_checked(seed):
    problem = Problem([(5,)], seed=seed)
    optimizer, parameters = make(SAM, problem, torch.optim.SGD, check_finite=False, lr=0.1)
    found = problem.run(optimizer, parameters, 1, lambda i, s, w: NAN if w == 0 else True)
    assert_same_bits(found, problem.start)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_the_norm_of_the_ascent(base, adaptive, clip, seed):
    """Against float64, over groups and dtypes, with a parameter that has no gradient."""
    problem = Problem(SHAPES, dtype=torch.float64, seed=seed)
    parameters = problem.parameters()
    parameters[3] = nn.Parameter(parameters[3].detach().float())
    groups = [
        {"params": parameters[:2], "adaptive": adaptive, "eta": 0.3},
        {"params": parameters[2:], "rho": 0.2},
    ]
    optimizer = SAM(groups, base[0], **base[1])
    assert float(optimizer.ascent_norm) == 0.0
    for step in range(2):
        problem.set_gradients(parameters, step, 0, lambda i, s, w: None if i == 1 else True)
        if clip:
            nn.utils.clip_grad_norm_(parameters, 0.1)
        doubles = [p.detach().double() for p in parameters]
        expected = sum(
            float(((w.abs() + 0.3 if adaptive and i < 2 else 1.0) * p.grad.double()).square().sum())
            for i, (p, w) in enumerate(zip(parameters, doubles, strict=True))
            if p.grad is not None
        )
        optimizer.first_step(zero_grad=True)
        found = optimizer.ascent_norm
        assert found.dtype is torch.float64
        assert found.shape == ()
        assert float(found) == pytest.approx(expected**0.5, rel=1e-6)
        problem.set_gradients(parameters, step, 1)
        optimizer.second_step()
        assert torch.equal(optimizer.ascent_norm, found)  # the second pass does not touch it


@pytest.mark.parametrize("value", [INF, NAN])
def test_the_norm_of_an_ascent_that_was_skipped(value, seed):
    problem = Problem(SHAPES, seed=seed)
    optimizer, parameters = make(SAM, problem, torch.optim.SGD, lr=0.1)
    problem.run(optimizer, parameters, 1, patterns(value)["first"])
    assert not bool(optimizer.ascent_norm.isfinite())


def test_tied_and_frozen_parameters(seed):
    """A tied matrix is perturbed once; a frozen one never."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(11, 6)
            self.frozen = nn.Linear(6, 6).requires_grad_(False)
            self.head = nn.Linear(6, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.frozen(self.embed(tokens)))

    models = [Tied(), Tied()]
    models[1].load_state_dict(models[0].state_dict())
    frozen = models[0].frozen.weight.clone()
    tokens = torch.randint(11, (8,), generator=torch.Generator().manual_seed(seed))
    for model, kind in zip(models, (SAM, PlainSAM), strict=True):
        optimizer = kind(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
        for _ in range(5):
            for finish in (optimizer.first_step, optimizer.second_step):
                nn.functional.cross_entropy(model(tokens), tokens).backward()
                finish(zero_grad=True)
    results = [[p.detach() for p in model.parameters()] for model in models]
    assert_close(*results, 1e-5)
    assert_same_bits([models[0].frozen.weight], [frozen])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.complex64, torch.int64], ids=str)
def test_frozen_parameters_may_be_of_any_dtype(dtype, base, seed):
    """Frozen quantized weights next to trained ones are unchanged."""
    problem = Problem(SHAPES, seed=seed)
    trained = problem.parameters()
    frozen = nn.Parameter(torch.arange(6).to(dtype), requires_grad=False)
    optimizer = SAM([frozen, *trained], base[0], **base[1])
    expected = problem.run(*make(PlainSAM, problem, base[0], **base[1]), 3)
    assert_close(problem.run(optimizer, trained, 3), expected, 1e-5)
    assert_same_bits([frozen.detach()], [torch.arange(6).to(dtype)])
    assert frozen not in optimizer.state


@pytest.mark.parametrize("adaptive", [False, True])
def test_freezing_and_unfreezing_between_steps(adaptive, base, seed):
    """Parameter 0 is frozen at first, 1 from the middle on: the trajectory equals plain PyTorch."""
    problem = Problem(SHAPES, seed=seed)
    results = []
    for kind in (SAM, PlainSAM):
        optimizer, parameters = make(kind, problem, base[0], adaptive=adaptive, **base[1])
        for steps, frozen in ((range(3), {0}), (range(3, 5), set()), (range(5, 8), {1})):
            for i, p in enumerate(parameters):
                p.requires_grad_(i not in frozen)
            problem.run(
                optimizer, parameters, steps, lambda i, s, w, f=frozen: None if i in f else True
            )
        results.append([p.detach() for p in parameters])
    assert_close(*results, 1e-5)


def test_a_gradient_of_a_parameter_that_requires_none_is_used(base, seed):
    """Like the reference implementation and torch, which check only ``grad``."""
    problem = Problem(SHAPES, seed=seed)
    results = []
    for kind in (SAM, PlainSAM):
        optimizer, parameters = make(kind, problem, base[0], **base[1])
        parameters[1].requires_grad_(False)
        results.append(problem.run(optimizer, parameters, 3))
    assert_close(*results, 1e-5)


def test_unfreezing_between_the_passes_is_refused(base, seed):
    problem = Problem(SHAPES, seed=seed)
    optimizer, parameters = make(SAM, problem, base[0], **base[1])
    parameters[1].requires_grad_(False)
    problem.set_gradients(parameters, 0, 0, lambda i, s, w: None if i == 1 else True)
    optimizer.first_step(zero_grad=True)
    parameters[1].requires_grad_(True)
    problem.set_gradients(parameters, 0, 1)
    with pytest.raises(RuntimeError, match=r"frozen in first_step\(\).*restore\(\)"):
        optimizer.second_step()
    optimizer.restore()
    assert_same_bits([p.detach() for p in parameters], problem.start)
    expected = problem.run(*make(SAM, problem, base[0], **base[1]), 2)
    assert_same_bits(problem.run(optimizer, parameters, 2), expected)


def _sparse(p):
    return torch.zeros_like(p).to_sparse()


def _other_dtype(p):
    return torch.zeros_like(p, dtype=torch.float64)


_lets_other_dtypes_in = pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"),
    reason="this torch refuses a gradient of another dtype itself",
)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(_sparse, "sparse", id="sparse"),
        pytest.param(_other_dtype, "float64", id="dtype", marks=_lets_other_dtypes_in),
    ],
)
@pytest.mark.parametrize("which", [0, 1])
def test_unfit_gradients_are_refused_and_the_step_can_continue(spoil, message, which, seed):
    problem = Problem([(4, 3), (5,)], seed=seed)
    optimizer, parameters = make(SAM, problem, torch.optim.SGD, lr=0.1, momentum=0.9)
    expected = problem.run(*make(SAM, problem, torch.optim.SGD, lr=0.1, momentum=0.9), 1)
    for phase, finish in enumerate((optimizer.first_step, optimizer.second_step)):
        problem.set_gradients(parameters, 0, phase)
        if phase == which:
            good = parameters[1].grad
            before = [p.detach().clone() for p in parameters]
            state = {p: dict(entry) for p, entry in optimizer.state.items()}
            parameters[1].grad = None
            parameters[1].grad_dtype = None  # allow a gradient of another dtype
            parameters[1].grad = spoil(parameters[1])
            with pytest.raises(ValueError, match=message):
                finish()
            assert_same_bits([p.detach() for p in parameters], before)
            assert {p: dict(entry) for p, entry in optimizer.state.items()} == state
            parameters[1].grad = good
        finish()
    assert_same_bits([p.detach() for p in parameters], expected)


def test_the_error_of_a_sparse_embedding_names_the_fix():
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = SAM(embedding.parameters(), torch.optim.SGD, lr=0.1)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"sparse=False"):
        optimizer.first_step()


def test_gradients_may_be_read_and_clipped_between_the_calls(seed):
    problem = Problem(SHAPES, seed=seed)
    results = []
    for kind in (SAM, PlainSAM):
        optimizer, parameters = make(kind, problem, torch.optim.SGD, lr=0.1)
        problem.set_gradients(parameters, 0, 0)
        nn.utils.clip_grad_norm_(parameters, 0.1)
        optimizer.first_step()
        problem.set_gradients(parameters, 0, 1)
        nn.utils.clip_grad_norm_(parameters, 0.1)
        kept = [p.grad.clone() for p in parameters]
        optimizer.second_step()
        assert_same_bits([p.grad for p in parameters], kept)
        results.append([p.detach() for p in parameters])
    assert_close(*results, 1e-5)


def test_accumulation_over_micro_batches_in_both_passes(seed):
    """Four micro-batches with the loss divided by four equal one batch, and one batch of plain PyTorch."""
    torch.manual_seed(seed)
    model = nn.Linear(6, 3).double()
    batch, labels = torch.randn(16, 6).double(), torch.randint(3, (16,))
    results = []
    for kind, parts in ((SAM, 1), (SAM, 4), (PlainSAM, 1)):
        twin = nn.Linear(6, 3).double()
        twin.load_state_dict(model.state_dict())
        optimizer = kind(twin.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
        for _ in range(4):
            for finish in (optimizer.first_step, optimizer.second_step):
                for x, y in zip(batch.chunk(parts), labels.chunk(parts), strict=True):
                    (nn.functional.cross_entropy(twin(x), y) / parts).backward()
                finish(zero_grad=True)
        results.append([p.detach() for p in twin.parameters()])
    assert_close(results[0], results[1], 1e-12)
    assert_close(results[0], results[2], 1e-12)


def test_accumulation_equals_the_plain_pattern_for_all_wrappers():
    assert everywhere(0, 0, 0) is True


@pytest.mark.parametrize("adaptive", [False, True])
def test_gradients_whose_memory_does_not_hold_their_values(adaptive):
    """Autograd makes gradients with a negative bit for the imaginary part of a conjugate."""
    gradients = [torch.tensor([1.0, -2.0]), torch.tensor(3.0), torch.zeros(2)]
    odd = [torch._neg_view(-gradients[0]), torch._neg_view(-gradients[1])]
    results = []
    for given in (gradients, [*odd, torch._efficientzerotensor(2)]):
        parameters = [nn.Parameter(torch.ones_like(gradient)) for gradient in gradients]
        optimizer = SAM(parameters, torch.optim.SGD, rho=0.3, lr=0.1, adaptive=adaptive)
        for finish in (optimizer.first_step, optimizer.second_step):
            for parameter, gradient in zip(parameters, given, strict=True):
                parameter.grad = gradient
            finish()
            results.append([p.detach().clone() for p in parameters])
    assert_same_bits(results[0], results[2])
    assert_same_bits(results[1], results[3])


def test_a_weight_with_a_negative_bit():
    weight = nn.Parameter(torch._neg_view(torch.tensor([-1.0, 2.0])))
    optimizer = SAM([weight], torch.optim.SGD, rho=0.5, lr=0.25)
    for finish, expected in (
        (optimizer.first_step, [1.5, -2.0]),
        (optimizer.second_step, [0.75, -2]),
    ):
        weight.grad = torch.tensor([1.0, 0.0])
        finish()
        assert weight.tolist() == expected


def test_the_conjugate_of_complex_numbers_trains():
    a, b = (nn.Parameter(torch.tensor(1.0)) for _ in range(2))
    optimizer = SAM([a, b], torch.optim.SGD, rho=0.01, lr=0.01)
    for _ in range(30):
        for finish in (optimizer.first_step, optimizer.second_step):
            loss = (torch.complex(a, b).conj() * (2 + 3j) - (1 - 4j)).abs().square()
            loss.backward()
            finish(zero_grad=True)
    solution = ((1 - 4j) / (2 + 3j)).conjugate()
    assert a.item() == pytest.approx(solution.real, abs=0.01)
    assert b.item() == pytest.approx(solution.imag, abs=0.01)
