"""State dicts of optimizers around another one, with the hooks of both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

StateDict = dict[str, Any]


def save(outer: Optimizer, pack: Callable[[], StateDict]) -> StateDict:
    """Return the result of ``pack``, and run the ``state_dict`` hooks of ``outer`` around it, as torch does.

    ``Optimizer.state_dict(outer)`` is not used, because it ignores a ``state_dict`` method that the base
    optimizer's class overrides.
    """
    for before in outer._optimizer_state_dict_pre_hooks.values():
        before(outer)
    state_dict = pack()
    for after in outer._optimizer_state_dict_post_hooks.values():
        changed = after(outer, state_dict)
        state_dict = state_dict if changed is None else changed
    return state_dict


def load(outer: Optimizer, unpack: Callable[[StateDict], None], state_dict: StateDict) -> None:
    """Pass ``state_dict`` to ``unpack``, and run the ``load_state_dict`` hooks of ``outer`` around it."""
    state_dict = state_dict.copy()
    for before in outer._optimizer_load_state_dict_pre_hooks.values():
        changed = before(outer, state_dict)
        state_dict = state_dict if changed is None else changed
    unpack(state_dict)
    for after in outer._optimizer_load_state_dict_post_hooks.values():
        after(outer)
