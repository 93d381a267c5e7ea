"""Any optimizer of ``torch.optim``, named ``torch:NAME``."""

from __future__ import annotations

import ast
import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.optim import LBFGS, Optimizer, SparseAdam

from fastsam.longtail.base_optimizers.base import (
    BASE_OPTIMIZERS,
    BaseOptimizer,
    OptimizerInputs,
    OptimizerSettings,
)
from fastsam.longtail.errors import UsageError, unknown
from fastsam.longtail.settings import Entry, Layer, setting

PREFIX = "torch:"


@dataclass(frozen=True, kw_only=True)
class TorchSettings(OptimizerSettings):
    """Settings of an optimizer of ``torch.optim``."""

    torch_options: tuple[str, ...] = setting(
        "arguments of an optimizer torch:NAME as OPTION=VALUE, for instance momentum=0.9 alpha=0.95",
        default=(),
        default_text="torch's defaults",
    )

    def state_copies(self) -> int:
        """Return the largest number of state tensors of torch's optimizers."""
        return 3

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the optimizer.

        Raises:
            UsageError: if one is not ``OPTION=VALUE``.
        """
        return dict(_parsed(option) for option in self.torch_options)


def _parsed(option: str) -> tuple[str, Any]:
    name, equals, text = option.partition("=")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        equals = ""
    if not equals or not name.isidentifier() or name in ("params", "lr", "weight_decay"):
        raise UsageError(
            f"torch_options must be OPTION=VALUE with a number, a tuple, True, False or None, such as "
            f"momentum=0.9, got {option!r}; lr and weight_decay are settings of the run"
        )
    return name, value


def _class(name: str) -> type[Optimizer]:
    """Return the class of an optimizer of torch.

    Raises:
        UsageError: if there is none, or it needs a closure or sparse gradients.
    """
    known = {
        key: value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type)
        and issubclass(value, Optimizer)
        and value not in (Optimizer, LBFGS, SparseAdam)
    }
    if name not in known:
        raise unknown("optimizer of torch.optim", name, sorted(known))
    return known[name]


def _build(name: str, settings: TorchSettings, inputs: OptimizerInputs) -> Optimizer:
    chosen, options = _class(name), settings.arguments()
    accepted = inspect.signature(chosen).parameters
    for option in options:
        if option not in accepted:
            raise unknown(f"option of torch.optim.{name}", option, sorted(accepted))
    if "weight_decay" in accepted:
        options["weight_decay"] = inputs.weight_decay
    elif inputs.weight_decay:
        raise UsageError(
            f"torch.optim.{name} has no weight decay, but weight_decay is {inputs.weight_decay:g}; pass "
            "weight_decay=0"
        )
    return chosen(inputs.parameters, lr=inputs.lr, **options)  # type: ignore[call-arg]


def _recipe(name: str) -> Layer:
    """Return torch's learning rate and weight decay of an optimizer, as starting points."""
    accepted = inspect.signature(_class(name)).parameters
    values = {"lr": accepted["lr"].default, "weight_decay": 0.0}
    if "weight_decay" in accepted:
        values["weight_decay"] = accepted["weight_decay"].default
    return {
        key: Entry(float(value), f"default of torch.optim.{name}; not tuned", known=False)
        for key, value in values.items()
    }


def torch_optimizer(name: str) -> BaseOptimizer:
    """Return the part for ``torch:NAME``."""
    short = name.removeprefix(PREFIX)
    return BaseOptimizer(
        name=name,
        build=partial(_build, short),
        settings=TorchSettings,
        summary="optimizer of torch.optim",
        recipe={} if short == "NAME" else _recipe(short),  # NAME stands for the family
    )


BASE_OPTIMIZERS.add_family(PREFIX, torch_optimizer)
