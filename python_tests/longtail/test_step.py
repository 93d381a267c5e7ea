"""The training step compared with autograd: weightings, added gradients, parts and fresh batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastsam.distributed import World
from fastsam.longtail import recipe
from fastsam.longtail.build import build_network, build_objective
from fastsam.longtail.data import Batch, load_digits_lt
from fastsam.longtail.errors import UsageError
from fastsam.longtail.losses.ce import CrossEntropyLoss
from fastsam.longtail.models import Classifier
from fastsam.longtail.objective import Objective, WeightedTerm
from fastsam.longtail.seeds import Stream, derived_seed
from fastsam.longtail.training import Engine, Stepper
from fastsam.optim.passes import Need, Passes

DIGITS = load_digits_lt()
CONFIG = recipe("digits-lt", "ce", "sgd").config()


class Scripted(torch.optim.SGD):
    """An optimizer that requests a list of gradients, moves the weights in between, and records them."""

    def __init__(self, network: nn.Module, needs: Sequence[Need], *, climb: float = 0.0) -> None:
        super().__init__(network.parameters(), lr=0.1)
        self.needs = needs
        self.climb = climb
        self.given: list[list[Tensor]] = []

    def passes(self) -> Passes:
        """One step."""
        trained = [p for group in self.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in trained]
        for need in self.needs:
            yield need
            self.given.append([p.grad.clone() for p in trained])
            with torch.no_grad():
                for parameter in trained:
                    parameter.add_(parameter.grad, alpha=self.climb)
        with torch.no_grad():
            for parameter, weight in zip(trained, before, strict=True):
                parameter.copy_(weight)
        self.step()


def batch(size: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, 1, 8, 8, generator=generator)
    targets = torch.randint(10, (size,), generator=generator)
    return Batch((inputs,), targets, torch.arange(size))


def stepper(needs: Sequence[Need], **options: float) -> tuple[Stepper, Scripted]:
    network = build_network(CONFIG, 10, 1).train()
    optimizer = Scripted(network, needs, **options)
    objective = build_objective(CONFIG, DIGITS.counts, DIGITS.groups)
    return Stepper(Engine(network, World()), optimizer, objective, seed=0), optimizer


def gradients(
    network: Classifier, loss: Callable[[Tensor, Tensor], Tensor], data: Batch
) -> list[Tensor]:
    losses = loss(network(data.inputs), data.targets)
    return list(torch.autograd.grad(losses, list(network.parameters())))


def weighted(group: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Compute the sum of the losses of a group's images, divided by the number of all images."""
    members = torch.tensor(DIGITS.groups[group])

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        losses = functional.cross_entropy(logits, targets, reduction="none")
        return (losses * torch.isin(targets, members)).sum() / len(targets)

    return loss


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_a_weighting_chooses_classes_and_added_gradients_add_up(seed: int) -> None:
    """Ascend along the tail's gradient, then add its gradient there to that of the other classes."""
    run, optimizer = stepper([Need("tail"), Need("tail"), Need("head", add=True)], climb=0.05)
    data = batch(32, seed)
    reference = build_network(CONFIG, 10, 1).train()
    seen = next(run.steps([data], epoch=1))
    tail = gradients(reference, weighted("tail"), data)
    assert_close(optimizer.given[0], tail)
    with torch.no_grad():
        for parameter, gradient in zip(reference.parameters(), tail, strict=True):
            parameter.add_(gradient, alpha=0.05)
    top = gradients(reference, weighted("tail"), data)
    assert_close(optimizer.given[1], top)
    with torch.no_grad():
        for parameter, gradient in zip(reference.parameters(), top, strict=True):
            parameter.add_(gradient, alpha=0.05)
    head = gradients(reference, weighted("head"), data)
    assert_close(optimizer.given[2], [a + b for a, b in zip(top, head, strict=True)])
    assert len(seen) == 1
    # Only the first pass updates statistics.
    norms = [m for m in run.network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {int(m.num_batches_tracked) for m in norms} == {1}


def test_groups_add_up_to_all(seed: int) -> None:
    run, optimizer = stepper([Need(), Need("head"), Need("mid", add=True), Need("tail", add=True)])
    next(run.steps([batch(16, seed)], epoch=1))
    assert_close(optimizer.given[3], optimizer.given[0])
    with pytest.raises(UsageError, match="unknown weighting 'rare'; valid: all, head, mid, tail"):
        next(stepper([Need("rare")])[0].steps([batch(4, seed)], epoch=1))


def test_parts_have_numbers_of_their_own(seed: int) -> None:
    """Five images form two parts instead of three, so the third pass uses the first part again."""
    run, optimizer = stepper([Need(part=(i, 3)) for i in range(3)])
    data = batch(5, seed)
    first, second = next(run.steps([data, batch(4, seed)], epoch=1))
    assert (first.batch, second.batch) == (0, 1)
    assert torch.cat([first.indices, second.indices]).tolist() == [0, 1, 2, 3, 4]
    assert_close(optimizer.given[0], optimizer.given[2])


def test_fresh_batches_are_taken_until_none_is_left(seed: int) -> None:
    run, optimizer = stepper([Need(fresh=True)] * 3)
    data = [batch(4, seed + number) for number in range(5)]
    sizes = [[step.batch for step in seen] for seen in run.steps(data, epoch=1)]
    assert sizes == [[0, 1, 2], [3, 4]]
    assert_close(
        optimizer.given[3], optimizer.given[5]
    )  # the last step uses its two batches in turn


class Recorded(CrossEntropyLoss):
    """Cross-entropy that counts the calls of ``divisor`` and records its seeds."""

    def __init__(self) -> None:
        super().__init__()
        self.divisors = 0
        self.seeds: list[int] = []

    def prepare(self, batch: Batch, network: Classifier, seed: int) -> None:
        self.seeds.append(seed)

    def divisor(self, batch: Batch) -> Tensor:
        self.divisors += 1
        return super().divisor(batch)


def test_passes_of_a_step_share_divisors_and_the_seed_of_their_micro_batch(seed: int) -> None:
    run, _ = stepper([Need(ascent=True, local=True), Need(), Need()])
    term = Recorded()
    run.objective, run.accumulate, run.seed = Objective([WeightedTerm(term)]), 2, 7
    for _ in run.steps([batch(8, seed), batch(8, seed + 1)], epoch=3):
        pass
    places = [(0,), (0, 1), (1,), (1, 1)]
    assert term.seeds == [derived_seed(7, Stream.LOSS, 3, *place) for place in places]
    assert term.divisors == 2 * 2  # in each step, of the local pass and of the others


def test_a_term_that_prepares_nothing_needs_no_seed(seed: int) -> None:
    def fails() -> int:
        raise AssertionError("a seed was derived")

    network = build_network(CONFIG, 10, 1)
    plain, recorded = WeightedTerm(CrossEntropyLoss()), WeightedTerm(Recorded())
    given = batch(8, seed), network
    assert Objective([plain, plain]).prepare(*given, epoch=1, seed=fails) == [None, None]
    with pytest.raises(AssertionError, match="derived"):
        Objective([plain, recorded]).prepare(*given, epoch=1, seed=fails)
