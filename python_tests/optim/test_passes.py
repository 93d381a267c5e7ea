"""Steps as generators of needs have the bits of the closure form, and restore the weights on errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import StepLR

from fastsam import SAM
from fastsam.optim import (
    LPFSGD,
    PGD,
    EntropySGD,
    LookSAM,
    Need,
    frozen_batch_norm_statistics,
    passes_of,
)
from fastsam.optim.passes import Passes, run_passes
from python_tests.optim.trajectories import assert_same_bits

Build = Callable[[Any], Any]
Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor, str], Tensor]

BASES: dict[str, Build] = {
    "sgd": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: AdamW(p, lr=0.01),
    "rmsprop": lambda p: RMSprop(p, lr=0.001),
}
KINDS: dict[str, Build] = {
    "sam": lambda base: SAM(optimizer=base, rho=0.3, closure="both_passes"),
    "asam": lambda base: SAM(optimizer=base, rho=0.3, adaptive="weights", closure="both_passes"),
    "looksam": lambda base: LookSAM(base, rho=0.3, every=3, alpha=0.3),
    "lpf": lambda base: LPFSGD(base, gamma=0.05, parts=3),
    "entropy": lambda base: EntropySGD(base, steps=3),
    "pgd on the gradient": lambda base: PGD(base, sigma=0.01),
    "pgd on the weights": lambda base: PGD(base, sigma=0.01, noise_on="weights"),
}
PASSES = {"sam": 2, "asam": 2, "looksam": 2, "lpf": 3, "entropy": 3}
"""Number of passes of the first step, if more than one."""

PLACES = [(kind, broken) for kind in KINDS for broken in range(PASSES.get(kind, 1))]
"""Every pass of every optimizer."""


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 4))


def batches(seed: int, count: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield (
            torch.randn(13, 6, generator=generator),
            torch.randint(4, (13,), generator=generator),
        )


def cross_entropy(outputs: Tensor, targets: Tensor, weighting: str) -> Tensor:
    assert weighting == "all"
    return nn.functional.cross_entropy(outputs, targets)


def execute(
    passes: Passes, model: nn.Module, batches: Iterator[Batch], loss_of: Loss = cross_entropy
) -> list[Tensor]:
    """Answer each need by forward and backward; return the losses of the passes."""
    batch = next(batches)
    used = False

    def answer(need: Need) -> Tensor:
        nonlocal batch, used
        if need.fresh and used:
            batch = next(batches)
        used = True
        index, count = need.part
        inputs, targets = (side.tensor_split(count)[index] for side in batch)
        if not need.add:
            model.zero_grad()
        assert torch.is_grad_enabled()
        loss = loss_of(model(inputs), targets, need.weighting)
        loss.backward()
        return loss

    return run_passes(passes, answer)


def by_closure(optimizer: Any, model: nn.Module, batches: Iterator[Batch]) -> Tensor:
    """Make one step by its closure form; return its loss."""
    parts: list[Batch] = []
    batch: Batch | None = None

    def closure() -> Tensor:
        nonlocal batch
        optimizer.zero_grad()
        if isinstance(optimizer, LPFSGD):
            if not parts:
                inputs, targets = next(batches)
                parts.extend(
                    zip(
                        inputs.tensor_split(optimizer.parts),
                        targets.tensor_split(optimizer.parts),
                        strict=True,
                    )
                )
            batch = parts.pop(0)
        elif batch is None or isinstance(optimizer, EntropySGD):
            batch = next(batches)
        loss = cross_entropy(model(batch[0]), batch[1], "all")
        loss.backward()
        return loss

    loss: Tensor = optimizer.step(closure)
    return loss


def everything(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    """Return copies of weights, buffers and state."""
    state = [
        value
        for p in model.parameters()
        for _, value in sorted(optimizer.state.get(p, {}).items())
        if isinstance(value, Tensor)
    ]
    return [tensor.detach().clone() for tensor in (*model.state_dict().values(), *state)]


@pytest.fixture(params=KINDS)
def kind(request: Any) -> str:
    name: str = request.param
    return name


@pytest.mark.parametrize("base", BASES)
def test_passes_have_the_bits_of_the_closure_form(kind: str, base: str, seed: int) -> None:
    found, expected = network(seed), network(seed)
    optimizers = [KINDS[kind](BASES[base](m.parameters())) for m in (found, expected)]
    streams = [batches(seed, 40) for _ in optimizers]
    for _ in range(7):
        losses = execute(optimizers[0].passes(), found, streams[0])
        loss = by_closure(optimizers[1], expected, streams[1])
        mean = torch.stack([each.detach() for each in losses]).mean()
        assert torch.equal(loss, mean if kind == "lpf" else losses[0])
        assert_same_bits(
            everything(found, optimizers[0]),
            everything(expected, optimizers[1]),
        )


@pytest.mark.parametrize("base", BASES)
def test_an_optimizer_without_passes_gets_a_single_pass(base: str, seed: int) -> None:
    found, expected = network(seed), network(seed)
    optimizers = [BASES[base](m.parameters()) for m in (found, expected)]
    streams = [batches(seed, 5) for _ in optimizers]
    for _ in range(5):
        execute(passes_of(optimizers[0]), found, streams[0])
        by_closure(optimizers[1], expected, streams[1])
    assert_same_bits(everything(found, optimizers[0]), everything(expected, optimizers[1]))


def test_passes_of_uses_the_passes_of_the_optimizer(seed: int) -> None:
    model = network(seed)
    optimizer = KINDS["lpf"](BASES["sgd"](model.parameters()))
    needs = [need.part for need in passes_of(optimizer)]
    assert needs == [(0, 3), (1, 3), (2, 3)]


@pytest.mark.parametrize("way", ["raises", "is closed", "is dropped"])
@pytest.mark.parametrize(("kind", "broken"), PLACES)
def test_a_step_abandoned_at_any_pass_changes_nothing(
    kind: str, broken: int, way: str, seed: int
) -> None:
    """Weights, state and counters are bitwise unchanged, and the next step is the same step."""
    model, twin = network(seed), network(seed)
    optimizer, other = (KINDS[kind](BASES["sgd"](m.parameters())) for m in (model, twin))
    for m, o in ((model, optimizer), (twin, other)):
        stream = batches(seed, 9)
        for _ in range(3):  # LookSAM's next step makes two passes again
            execute(o.passes(), m, stream)
    before = everything(model, optimizer)
    count = 0

    def failing(outputs: Tensor, targets: Tensor, weighting: str) -> Tensor:
        nonlocal count
        count += 1
        if count > broken:
            raise ArithmeticError
        return cross_entropy(outputs, targets, weighting)

    with frozen_batch_norm_statistics(model):
        if way == "raises":
            with pytest.raises(ArithmeticError):
                execute(optimizer.passes(), model, batches(seed + 1, 9), failing)
        else:
            passes = optimizer.passes()
            next(passes)
            for _ in range(broken):
                model(torch.ones(3, 6)).square().sum().backward()
                passes.send(torch.zeros(()))
            if way == "is closed":
                passes.close()
            del passes
    assert_same_bits(everything(model, optimizer), before)
    for m, o in ((model, optimizer), (twin, other)):
        execute(o.passes(), m, batches(seed + 2, 9))
    assert_same_bits(everything(model, optimizer), everything(twin, other))


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"pgd on the weights"}))
def test_an_error_of_the_update_itself_restores(kind: str, seed: int) -> None:
    """Except PGD's noise on the weights, which is permanent once the pass was made."""

    class Failing(SGD):
        def step(self, closure: Any = None) -> Any:
            raise ArithmeticError

    model = network(seed)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = KINDS[kind](Failing(model.parameters(), lr=0.1))
    with pytest.raises(ArithmeticError):
        execute(optimizer.passes(), model, batches(seed, 9))
    assert_same_bits(list(model.parameters()), before)


def test_a_stop_iteration_of_the_caller_propagates(kind: str, seed: int) -> None:
    """A loader that is exhausted in a pass must not look like a finished step."""
    model = network(seed)
    optimizer = KINDS[kind](BASES["sgd"](model.parameters()))
    before = [p.detach().clone() for p in model.parameters()]

    def empty() -> Tensor:
        batch: Tensor = next(iter(()))
        return batch

    with pytest.raises(StopIteration):
        optimizer.step(empty)
    with pytest.raises(StopIteration):
        run_passes(optimizer.passes(), lambda need: empty())
    assert_same_bits(list(model.parameters()), before)


def test_hooks_fire_around_the_update_and_schedulers_see_it(kind: str, seed: int) -> None:
    """As in a loop that calls ``step()``: a hook finds the final gradient, and a scheduler does not warn."""
    model = network(seed)
    optimizer = KINDS[kind](BASES["sgd"](model.parameters()))
    scheduler = StepLR(optimizer, 1)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    passes = optimizer.passes()
    for need in passes:
        assert not calls
        inputs, targets = next(batches(seed, 1))
        model.zero_grad()
        cross_entropy(model(inputs), targets, need.weighting).backward()
    assert calls == ["before", "after"]
    scheduler.step()
    calls.clear()
    by_closure(optimizer, model, batches(seed, 9))
    assert calls == ["before", "after"]


def test_sam_skips_a_batch_without_loss_and_gradient(seed: int) -> None:
    model = network(seed)
    optimizer = SAM(optimizer=BASES["sgd"](model.parameters()))
    assert list(optimizer.passes()) == [Need(ascent=True)]
    assert not optimizer.state


@pytest.mark.parametrize("kind", ["sam", "looksam"])
def test_only_the_first_pass_of_an_ascent_has_need_ascent(kind: str, seed: int) -> None:
    model = network(seed)
    base = SGD(model.parameters(), lr=0.1)
    make: dict[str, Any] = {
        "sam": lambda: SAM(optimizer=base, start=1, interval=2),
        "looksam": lambda: LookSAM(base, start=1, every=2),
    }
    optimizer = make[kind]()
    ascents = []
    for inputs, _ in batches(seed, 4):
        needs = []
        for need in optimizer.passes():
            needs.append(need.ascent)
            model.zero_grad()
            model(inputs).square().sum().backward()
        ascents.append(needs)
    assert ascents == [[False], [True, False], [False], [True, False]]


# --- steps of user-defined optimizers -----------------------------------------------------------

SHARP = "sharp"
REST = "rest"


class WeightedSAM(SAM):
    """Ascend and descend on one weighting of the loss, and add the plain gradient of another.

    The shape of ImbSAM (0 and 1 by class) and of Focal-SAM (any share by class).
    """

    def passes(self) -> Passes:
        yield Need(SHARP)
        try:
            self.first_step(zero_grad=True)
            yield Need(SHARP)
        finally:
            self.restore()
        yield Need(REST, add=True)
        self.base_optimizer.step()


@pytest.mark.parametrize(
    "shares",
    [[0.0, 0.0, 1.0, 1.0], [0.08, 0.24, 0.56, 0.72], [-0.5, 0.0, 1.0, 1.5]],
    ids=["ImbSAM", "Focal-SAM", "negative weights"],
)
def test_a_weighted_step_agrees_with_autograd(shares: list[float], seed: int) -> None:
    sharp = torch.tensor(shares)
    weights = {SHARP: sharp, REST: 1 - sharp}
    model, reference = network(seed).double(), network(seed).double()
    optimizer = WeightedSAM(optimizer=SGD(model.parameters(), lr=0.1), rho=0.3)

    def loss_of(outputs: Tensor, targets: Tensor, weighting: str) -> Tensor:
        losses = nn.functional.cross_entropy(outputs, targets, reduction="none")
        return (losses * weights[weighting].to(losses)[targets]).sum() / len(targets)

    def gradient(inputs: Tensor, targets: Tensor, weighting: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            loss_of(reference(inputs), targets, weighting), list(reference.parameters())
        )

    for single, targets in batches(seed, 5):
        inputs = single.double()
        execute(optimizer.passes(), model, iter([(inputs, targets)]), loss_of)
        weights_before = [p.detach().clone() for p in reference.parameters()]
        slope = gradient(inputs, targets, SHARP)
        norm = torch.stack([g.norm() for g in slope]).norm()
        rest = gradient(inputs, targets, REST)
        with torch.no_grad():
            for p, g in zip(reference.parameters(), slope, strict=True):
                p.add_(0.3 * g / norm)
        top = gradient(inputs, targets, SHARP)
        with torch.no_grad():
            for p, w, g, r in zip(reference.parameters(), weights_before, top, rest, strict=True):
                p.copy_(w - 0.1 * (g + r))
    error = max(
        (p - q).abs().max().item()
        for p, q in zip(model.parameters(), reference.parameters(), strict=True)
    )
    assert error < 1e-12


class TwoWeightings(PGD):
    """A step that no closure can answer."""

    def _passes(self, update: Any) -> Passes:
        yield Need()
        yield Need(REST)
        update(self.base_optimizer.step)


@pytest.mark.parametrize("by", ["closure", "passes"])
def test_a_closure_cannot_answer_every_need(by: str, seed: int) -> None:
    model = network(seed)
    optimizer = TwoWeightings(SGD(model.parameters(), lr=0.1), sigma=0.0, noise_on="weights")
    with (
        pytest.raises(TypeError, match=r"cannot answer Need\(weighting='rest'")
        if by == "closure"
        else nullcontext()
    ):
        if by == "closure":
            by_closure(optimizer, model, batches(seed, 9))
        else:
            execute(
                optimizer.passes(),
                model,
                batches(seed, 9),
                lambda o, t, weighting: cross_entropy(o, t, "all"),
            )
    assert optimizer.steps_taken == (0 if by == "closure" else 1)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")
@pytest.mark.parametrize("alone", [True, False])
def test_an_ascent_needs_a_local_gradient_only_beside_other_ranks(
    alone: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not alone:
        monkeypatch.setattr(SAM, "peers", property(lambda optimizer: optimizer.process_group))
    model = network(seed)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        optimizer = SAM(
            optimizer=SGD(model.parameters(), lr=0.1),
            process_group=dist.group.WORLD,
            closure="both_passes",
        )
        needs = []
        for need in optimizer.passes():
            needs.append(need)
            model(torch.ones(3, 6)).square().sum().backward()
        assert needs == [Need(local=not alone, ascent=True), Need()]
        by_closure(optimizer, model, batches(seed, 9))
    finally:
        dist.destroy_process_group()
