"""Parameter groups that restrict the ascent to some of a model's parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor, nn

_NORMALIZATION = ("BatchNorm", "LayerNorm", "GroupNorm", "InstanceNorm", "RMSNorm")


def perturb_only(
    model: nn.Module,
    chosen: Literal["normalization"] | Sequence[str] | Callable[[str], bool],
) -> list[dict[str, Any]]:
    """Return parameter groups of ``model`` with which SAM perturbs only the chosen parameters.

    SAM-ON (Mueller et al., NeurIPS 2023) perturbs only the normalization layers, below one percent of the
    parameters of most networks, and generalizes better than SAM on many. The update still includes all
    parameters.

    Args:
        model: the model. If it is sharded, shard it before this call.
        chosen: which parameters to perturb. ``"normalization"`` chooses the affine parameters of BatchNorm,
            LayerNorm, GroupNorm, InstanceNorm and RMSNorm modules of any dimension, recognized by the name of
            their class or a base class, such as ``LlamaRMSNorm``. A sequence chooses by name: of a parameter,
            or of a module for all parameters in it. A function is called with the name of each parameter and
            returns whether to choose it.

    Returns:
        A group with ``perturb=True`` and a group with ``perturb=False``, which is omitted if it is empty.
        ``params`` are ``(name, parameter)`` pairs, which torch's optimizers accept and ASAM's
        ``adaptive="weights"`` reads. A tied parameter occurs once and is chosen if any of its names is.

    Raises:
        ValueError: no parameter is chosen, the model has no parameter or module of a name, or ``chosen`` is
            another string.
        TypeError: ``chosen`` is neither a string, a sequence of names nor a function.

    Example:
        >>> import torch
        >>> from fastsam import SAM
        >>> from fastsam.optim import perturb_only
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
        >>> groups = perturb_only(model, "normalization")
        >>> [name for name, _ in groups[0]["params"]]
        ['1.weight', '1.bias']
        >>> optimizer = SAM(groups, torch.optim.SGD, rho=0.5, lr=0.1)
    """
    perturbed = {id(parameter) for parameter in _chosen_parameters(model, chosen)}
    if not perturbed:
        raise ValueError(
            f"perturb_only found no parameter of {type(model).__name__} for {chosen!r}, and SAM needs one to "
            "perturb: choose among the names in model.named_parameters()"
        )
    named = list(model.named_parameters())
    groups = [
        {
            "params": [(name, p) for name, p in named if (id(p) in perturbed) is perturb],
            "perturb": perturb,
        }
        for perturb in (True, False)
    ]
    return [group for group in groups if group["params"]]


def _chosen_parameters(
    model: nn.Module, chosen: Literal["normalization"] | Sequence[str] | Callable[[str], bool]
) -> list[Tensor]:
    if isinstance(chosen, str):
        if chosen != "normalization":
            raise ValueError(
                "perturb_only expects 'normalization', a sequence of names or a function of the name, got "
                f"{chosen!r}; for a single name pass [{chosen!r}]"
            )
        return [
            parameter
            for module in model.modules()
            if _is_normalization(module)
            for parameter in module.parameters(recurse=False)
        ]
    # Keep duplicates, so that a tied parameter is found under each of its names.
    named = list(model.named_parameters(remove_duplicate=False))
    if callable(chosen):
        return [parameter for name, parameter in named if chosen(name)]
    if not isinstance(chosen, Sequence) or not all(isinstance(name, str) for name in chosen):
        raise TypeError(
            "perturb_only expects 'normalization', a sequence of names or a function of the name, got "
            f"{chosen!r}"
        )
    found: list[Tensor] = []
    for wanted in chosen:
        members = [p for name, p in named if name == wanted or name.startswith(f"{wanted}.")]
        if not members:
            raise ValueError(
                f"{type(model).__name__} has no parameter named {wanted!r} and no module of that name with "
                "parameters: choose among the names in model.named_parameters()"
            )
        found += members
    return found


def _is_normalization(module: nn.Module) -> bool:
    return any(word in kind.__name__ for kind in type(module).__mro__ for word in _NORMALIZATION)
