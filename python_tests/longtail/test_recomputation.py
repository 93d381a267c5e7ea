"""Activation checkpointing stores less and changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastsam.distributed import World
from fastsam.longtail import Trainer, recipe
from fastsam.longtail.data import load_digits_lt
from fastsam.longtail.errors import UsageError
from fastsam.longtail.models import build_model
from fastsam.longtail.training import Engine
from fastsam.longtail.training.recomputation import recomputed, recomputed_blocks
from fastsam.optim import frozen_batch_norm_statistics
from python_tests.ranks import run_ranks

DIGITS = load_digits_lt()


def passed(
    name: str, frozen: bool, recomputes: bool
) -> tuple[list[Tensor], dict[str, Tensor], int]:
    """Return gradients and state after one pass, and the bytes that its graph stores."""
    channels = 1 if name.startswith("resnet8") else 3
    network = build_model(name, 10, channels=channels, seed=1)
    blocks = recomputed_blocks(network, name)
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(4, channels, 32, 32, generator=generator)
    stored: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        stored[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        if recomputes:
            with recomputed(blocks):
                outputs = network.outputs(inputs)
        else:
            outputs = network.outputs(inputs)
    held = sum(stored.values())
    if frozen:
        with frozen_batch_norm_statistics(network):
            outputs.logits.square().sum().backward()  # type: ignore[no-untyped-call]
    else:
        outputs.logits.square().sum().backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert "forward" not in vars(blocks[0])
    return gradients, dict(network.state_dict()), held


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "resnet50", "timm:resnet18"])
def test_gradients_and_statistics_are_the_same(name: str) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    elif name != "resnet8":
        pytest.importorskip("torchvision", reason="torchvision is not installed")
    plain, own_state, all_held = passed(name, False, False)
    again, state, held = passed(name, False, True)
    assert held < all_held
    assert len(plain) == len(again) > 0
    for mine, other in zip(again, plain, strict=True):
        assert torch.equal(mine, other)
    for key, value in own_state.items():
        assert torch.equal(state[key], value), key


def test_the_blocks_are_the_outermost() -> None:
    assert len(recomputed_blocks(build_model("resnet8", 10), "resnet8")) == 3
    network = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(UsageError, match=r"plain has no module whose class name ends in Block"):
        recomputed_blocks(network, "plain")


def config(optimizer: str, **settings: Any) -> Any:
    options = {"model": "resnet8", "epochs": 2, "batch_size": 256, "ema": 0.9, **settings}
    return recipe("digits-lt", "ce", optimizer, **options).config()


@pytest.mark.parametrize("optimizer", ["sgd", "sam"])
def test_training_has_the_same_bits(optimizer: str, tmp_path: Path) -> None:
    """The average of the weights is a copy of the network, whose blocks must not share its methods."""
    plain, again = (
        Trainer(config(optimizer, checkpoint_activations=on), data=DIGITS, progress=False)
        for on in (False, True)
    )
    one, other = plain.fit(), again.fit()
    assert one.test.nll == other.test.nll
    for name, value in plain.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def _rank(rank: int, folder: str) -> None:
    found = []
    for recomputes in (False, True):
        network = build_model("resnet8", 10, channels=1, seed=1)
        blocks = recomputed_blocks(network, "resnet8") if recomputes else ()
        engine = Engine(network, World(rank, 2), recomputes=blocks)
        inputs = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(rank))
        engine.backward(engine.outputs(inputs).logits.square().sum(), local=False)
        found.append([p.grad for p in network.parameters()])
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")
@pytest.mark.slow
def test_ranks_reduce_the_same_gradients(tmp_path: Path) -> None:
    run_ranks(_rank, 2, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for plain, again, other in zip(*first, second[1], strict=True):
        assert torch.equal(plain, again)
        assert torch.equal(again, other)
