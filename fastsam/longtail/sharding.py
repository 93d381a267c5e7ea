"""Networks sharded by FSDP2: every rank holds a part of each parameter, gradient and optimizer state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from fastsam.distributed import is_sharded
from fastsam.longtail.models.classifier import Classifier

Parallel = Literal["ddp", "fsdp2"]
"""How several ranks hold a network: each all of it, or each a part."""


def shard(network: Classifier) -> None:
    """Shard a network over all ranks of the default process group, in place.

    A pass gathers the weights of one block at a time. Blocks are the elements of ``nn.Sequential`` and
    ``nn.ModuleList`` that consist of several layers, such as the residual blocks of a ResNet. What is outside
    them is gathered for the whole pass.

    Args:
        network: the network, with the same weights on all ranks.
    """
    # Importing FSDP2 takes half as long as importing torch, and few runs need it.
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    lists = [m for m in network.modules() if isinstance(m, nn.Sequential | nn.ModuleList)]
    members = {id(child) for module in lists for child in module.children()}
    # Innermost blocks first, because a block does not contain the parameters of blocks inside it.
    for module in reversed(list(network.modules())):
        layers = list(module.children())
        if (id(module) in members and layers) or module is network:
            unit = fully_shard(module)
            # Losses are divided by the global sum of weights already: add the gradients of the ranks.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
    for name in network.forward_methods:
        register_fsdp_forward_method(network, name)


def synchronize_gradients(network: Classifier, *, enabled: bool) -> None:
    """Set whether the next backward pass of a sharded network reduces the gradients accumulated so far."""
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(network, FSDPModule):
        raise AssertionError("the network is not sharded")
    network.set_requires_gradient_sync(enabled)
    network.set_is_last_backward(enabled)


def drop_gathered(network: nn.Module) -> None:
    """Free the weights that a pass without a backward pass has left gathered; do nothing if none are sharded.

    Until then, ``network.parameters()`` are whole tensors and not the parts that the optimizer updates.
    """
    modules = [module for module in network.modules() if hasattr(module, "reshard")]
    for module in modules:
        module.reshard()  # type: ignore[operator]


def map_tensors(state: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return a state dict with each tensor replaced by ``change(tensor)``.

    Args:
        state: tensors and other values in dicts, lists and tuples.
        change: called with each tensor, in a fixed order.
    """
    if isinstance(state, Tensor):
        return change(state)
    if isinstance(state, Mapping):
        return {name: map_tensors(value, change) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map_tensors(value, change) for value in state)
    return state


def gathered(state: Any, *, keep: bool = True) -> Any:
    """Return a copy of a state dict with whole tensors on the CPU.

    All ranks must call this if a tensor is sharded.

    Args:
        state: tensors and other values in dicts, lists and tuples.
        keep: keep the copies; False leaves empty tensors in their places, on ranks that only help to gather.
            So a device holds one whole tensor at a time.
    """

    def whole(tensor: Tensor) -> Tensor:
        if is_sharded(tensor):
            tensor = tensor.full_tensor()  # type: ignore[attr-defined]
        return tensor.detach().to("cpu", copy=True) if keep else tensor.new_empty(0)

    return map_tensors(state, whole)


def load_weights(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict of whole or sharded tensors into a network that may be sharded."""
    own = network.state_dict()
    network.load_state_dict({name: _as(value, own.get(name)) for name, value in state.items()})


def sharded_state(state: Mapping[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """Return an optimizer's state dict of whole tensors for parameters that may be sharded.

    Args:
        state: state dict of the optimizer.
        parameters: its parameters, in the order of the state dict. A tensor of a parameter's shape is sharded
            like the parameter.
    """
    entries = {
        index: {name: _as(value, parameters[index]) for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": entries}


def _as(value: Any, like: Tensor | None) -> Any:
    """Shard a whole tensor like a sharded one of the same shape, without communication."""
    if like is None or not is_sharded(like) or not isinstance(value, Tensor) or is_sharded(value):
        return value
    if value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(value.to(like.device), mesh, placements, src_data_rank=None)
