"""Parameters, gradients and state in every memory layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastsam import SAM
from python_tests.optim.trajectories import (
    TOLERANCE,
    OracleSAM,
    Problem,
    assert_close,
    assert_same_bits,
    everywhere,
    make,
)

pytestmark = pytest.mark.filterwarnings("ignore:the ascent left")

BASES = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (torch.optim.AdamW, {"lr": 0.05, "amsgrad": True}),
    (torch.optim.RMSprop, {"lr": 0.02}),
]


def contiguous(w: Tensor) -> Tensor:
    return w.clone()


def transposed(w: Tensor) -> Tensor:
    return w.transpose(0, -1).contiguous().transpose(0, -1)


def channels_last(w: Tensor) -> Tensor:
    return w.contiguous(memory_format=torch.channels_last)


def gapped(w: Tensor) -> Tensor:
    """Return a view of every other element of a larger tensor."""
    whole = torch.full((*w.shape[:-1], 2 * w.shape[-1]), 77.0, dtype=w.dtype)
    view = whole[..., ::2]
    view.copy_(w)
    return view


def cropped(w: Tensor) -> Tensor:
    """Return rows with a margin, at an unaligned address."""
    whole = torch.full((*w.shape[:-1], w.shape[-1] + 3), 77.0, dtype=w.dtype)
    view = whole[..., 1:-2]
    view.copy_(w)
    return view


def unaligned(w: Tensor) -> Tensor:
    view = torch.full((w.numel() + 1,), 77.0, dtype=w.dtype)[1:].view(w.shape)
    view.copy_(w)
    return view


LAYOUTS = [contiguous, transposed, channels_last, gapped, cropped, unaligned]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gradient_layout", [contiguous, transposed, gapped])
@pytest.mark.parametrize("base", BASES, ids=lambda case: case[0].__name__)
def test_layouts_of_weights_and_gradients(layout, gradient_layout, base, seed):
    problem = Problem([(3, 5, 2, 7), (4, 2, 3, 3)], seed=seed)
    expected = problem.run(*make(SAM, problem, base[0], adaptive=True, **base[1]), 4)
    parameters = [nn.Parameter(layout(w)) for w in problem.start]
    strides = [p.stride() for p in parameters]
    optimizer = SAM(parameters, base[0], adaptive=True, **base[1])
    for step in range(4):
        for which, finish in enumerate((optimizer.first_step, optimizer.second_step)):
            problem.set_gradients(parameters, step, which)
            for p in parameters:
                p.grad = gradient_layout(p.grad)
            finish()
    assert_close([p.detach() for p in parameters], expected, 1e-6)
    assert [p.stride() for p in parameters] == strides


@pytest.mark.parametrize("layout", [gapped, cropped, unaligned])
def test_memory_between_the_elements_is_not_written(layout, seed):
    problem = Problem([(3, 5)], seed=seed)
    parameter = nn.Parameter(layout(problem.start[0]))
    optimizer = SAM([parameter], torch.optim.SGD, lr=0.1)
    problem.run(optimizer, [parameter], 3)
    outside = torch.ones(parameter.untyped_storage().nbytes() // 4, dtype=torch.bool)
    outside.as_strided((3, 5), parameter.stride(), parameter.storage_offset()).fill_(False)
    whole = parameter.detach().as_strided((outside.numel(),), (1,), 0)
    assert bool((whole[outside] == 77.0).all())


@pytest.mark.parametrize("layout", [gapped, cropped])
def test_gapped_views_without_a_gradient_keep_what_users_write(layout, seed):
    """The optimizer works on a copy of gapped views, which must not overwrite them with stale values."""
    problem = Problem([(3, 5), (2, 2)], seed=seed)
    parameters = [nn.Parameter(layout(w)) for w in problem.start]
    optimizer = SAM(parameters, torch.optim.SGD, lr=0.1)
    for finish in ("second_step", "restore"):
        with torch.no_grad():
            parameters[0].fill_(3.0)
        problem.set_gradients(parameters, 0, 0, lambda i, s, w: None if i == 0 else True)
        optimizer.first_step()
        assert bool((parameters[0] == 3.0).all())
        with torch.no_grad():
            parameters[0].fill_(4.0)
        problem.set_gradients(parameters, 0, 1, lambda i, s, w: None if i == 0 else True)
        getattr(optimizer, finish)()
        assert bool((parameters[0] == 4.0).all())


@pytest.mark.parametrize("numel", [1, 2, 15, 16, 17, 16383, 16384, 16385, 70_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_odd_sizes(numel, dtype, seed):
    problem = Problem([(numel,), (numel // 2,)], dtype=dtype, seed=seed)
    results = [
        problem.run(*make(kind, problem, torch.optim.SGD, adaptive=True, lr=0.1, momentum=0.9), 2)
        for kind in (SAM, OracleSAM)
    ]
    assert_close(*results, TOLERANCE[dtype])


def test_channels_last_state_equals_that_of_torch(seed):
    p = nn.Parameter(channels_last(torch.randn(2, 3, 4, 4)))
    optimizer = SAM([p], torch.optim.SGD, lr=0.1, momentum=0.9)
    p.grad = torch.ones_like(p)
    optimizer.first_step()
    optimizer.second_step()
    assert optimizer.state[p]["momentum_buffer"].stride() == p.stride()


# --- random configurations ----------------------------------------------------------------------

sizes = st.lists(st.integers(0, 6), max_size=3).map(tuple)
layouts = st.sampled_from([contiguous, unaligned, gapped, cropped, transposed])
rates = st.floats(1e-3, 0.1)
decays = st.sampled_from([0.0, 0.01, 0.1])
sam_settings = st.fixed_dictionaries(
    {}, optional={"rho": st.floats(0, 0.5), "adaptive": st.booleans(), "eta": st.floats(0, 0.1)}
)
sgd = st.fixed_dictionaries(
    {"lr": rates, "weight_decay": decays, "momentum": st.sampled_from([0.0, 0.5, 0.9])},
    optional={"dampening": st.floats(0, 1), "maximize": st.booleans()},
)
nesterov = st.fixed_dictionaries(
    {"lr": rates, "weight_decay": decays, "momentum": st.just(0.9), "nesterov": st.just(True)}
)
adam = st.fixed_dictionaries(
    {"lr": rates, "weight_decay": decays, "eps": st.sampled_from([1e-3, 1e-4])},
    optional={
        "betas": st.tuples(st.floats(0, 0.95), st.floats(0.5, 0.999)),
        "amsgrad": st.booleans(),
        "maximize": st.booleans(),
    },
)
bases = st.one_of(
    st.tuples(st.just(torch.optim.SGD), sgd | nesterov),
    st.tuples(st.sampled_from([torch.optim.Adam, torch.optim.AdamW]), adam),
    # Its own eps, 1e-10, is 0 in float16, where the square of a small gradient is 0 too.
    st.tuples(
        st.just(torch.optim.Adagrad), st.fixed_dictionaries({"lr": rates, "eps": st.just(1e-3)})
    ),
)


@st.composite
def configurations(draw):
    shapes = draw(st.lists(sizes, min_size=1, max_size=6))
    cut = draw(st.integers(0, len(shapes)))
    groups = [(cut, draw(sam_settings)), (len(shapes) - cut, draw(sam_settings))]
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    seed = draw(st.integers(0, 2**31 - 1))
    problem = Problem(shapes, [g for g in groups if g[0]], dtype=dtype, seed=seed)
    missing = draw(st.sets(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(0, 1))))
    return problem, draw(bases), [draw(layouts) for _ in shapes], missing


def check(configuration) -> None:
    """Compare single steps from equal weights and state, so that rounding is not amplified."""
    problem, (base, options), layouts, missing = configuration

    def laid_out(i: int, w: Tensor) -> nn.Parameter:
        layout = layouts[i]
        return nn.Parameter(layout(w) if w.dim() and w.numel() else w.clone())

    def gradients(i: int, step: int, which: int):
        # A pass without any gradient is refused.
        none_left = all((j, step, which) in missing for j in range(len(problem.shapes)))
        is_missing = (i, step, which) in missing and not none_left
        return None if is_missing else everywhere(i, step, which)

    parameters = [laid_out(i, w) for i, w in enumerate(problem.start)]
    optimizer = SAM(problem.param_groups(parameters), base, **options)
    oracle, twins = make(OracleSAM, problem, base, **options)
    for step in range(4):
        start = [p.detach().clone() for p in parameters]
        found = problem.run(optimizer, parameters, range(step, step + 1), gradients)
        expected = problem.run(oracle, twins, range(step, step + 1), gradients)
        # An update rounds relative to the weights before it, which it may nearly cancel.
        assert_close([*found, *start], [*expected, *start], 16 * torch.finfo(problem.dtype).eps)
        with torch.no_grad():
            for p, twin, double in zip(parameters, twins, oracle.doubles, strict=True):
                twin.copy_(p)
                double.copy_(p)
                for key, value in optimizer.state[p].items():
                    oracle.base.state[double][key].copy_(value)
    problem.set_gradients(parameters, 4, 0, gradients)
    before = [p.detach().clone() for p in parameters]
    optimizer.first_step()
    optimizer.restore()
    assert_same_bits([p.detach() for p in parameters], before)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(configurations())
def test_random_configurations(configuration):
    check(configuration)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(configurations())
def test_a_thousand_random_configurations(configuration):
    check(configuration)


def test_a_parameter_sliced_in_place_is_refused_before_memory_is_read(seed):
    """The address stays the same, so only the shape differs; a copy of the slice is accepted."""
    weight = nn.Parameter(torch.randn(5, 3, generator=torch.Generator().manual_seed(seed)))
    optimizer = SAM([weight], torch.optim.SGD, rho=0.1, lr=0.1)
    for step in (optimizer.first_step, optimizer.second_step):
        weight.grad = torch.ones_like(weight)
        step()
    cut = weight.data[:2]
    before = cut.clone()
    weight.grad = None
    weight.data = cut
    weight.grad = torch.ones_like(weight)
    with pytest.raises(ValueError, match=r"clone\(\)"):
        optimizer.first_step()
    assert torch.equal(weight.detach(), before)
    weight.data = cut.clone()
    optimizer.first_step()
    assert not torch.equal(weight.detach(), before)
    optimizer.restore()
    assert torch.equal(weight.detach(), before)
