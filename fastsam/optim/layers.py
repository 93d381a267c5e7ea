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
    """Return parameter groups of ``model`` for SAM, in which the ascent perturbs the chosen parameters alone.

    SAM-ON (Mueller et al., NeurIPS 2023) perturbs only the normalization layers, below one percent of the
    parameters of most networks, and generalizes better than SAM on many. The update is that of all
    parameters with the gradients found at the top.

    Args:
        model: after it was sharded, if it is.
        chosen: ``"normalization"``: the affine parameters of BatchNorm, LayerNorm, GroupNorm, InstanceNorm
            and RMSNorm modules, in all their dimensions; a module counts where its class or a base class has
            one of these words in its name, as ``LlamaRMSNorm`` has. A sequence of names: those of parameters,
            or of modules for all parameters below them. A function: called with the name of a parameter.

    Returns:
        One group with ``perturb=True`` and one with ``perturb=False``, which is left out where it would be
        empty. ``params`` are pairs of name and parameter, which torch's optimizers take and which ASAM's
        ``adaptive="weights"`` reads. A tied parameter is there once, and chosen if one of its names is.

    Raises:
        ValueError: no parameter is chosen, a name is none of the model's, or ``chosen`` is another string.
        TypeError: ``chosen`` is something else.

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
            f"perturb_only chose no parameter of {type(model).__name__} with {chosen!r}, and SAM would have "
            "nothing to perturb: choose by the names that model.named_parameters() lists"
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
                f"perturb_only knows 'normalization', a sequence of names and a function of the name, got "
                f"{chosen!r}; for one name pass [{chosen!r}]"
            )
        return [
            parameter
            for module in model.modules()
            if _is_normalization(module)
            for parameter in module.parameters(recurse=False)
        ]
    # Every name of a tied parameter counts.
    named = list(model.named_parameters(remove_duplicate=False))
    if callable(chosen):
        return [parameter for name, parameter in named if chosen(name)]
    if not isinstance(chosen, Sequence) or not all(isinstance(name, str) for name in chosen):
        raise TypeError(
            "perturb_only takes 'normalization', a sequence of names or a function of the name, got "
            f"{chosen!r}"
        )
    found: list[Tensor] = []
    for wanted in chosen:
        members = [p for name, p in named if name == wanted or name.startswith(f"{wanted}.")]
        if not members:
            raise ValueError(
                f"{wanted!r} is the name of no parameter of {type(model).__name__}, nor of a module that has "
                "one: choose by the names that model.named_parameters() lists"
            )
        found += members
    return found


def _is_normalization(module: nn.Module) -> bool:
    return any(word in kind.__name__ for kind in type(module).__mro__ for word in _NORMALIZATION)
