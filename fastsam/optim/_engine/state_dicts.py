"""State dicts of an optimizer around another one: the inner one's own, and the hooks of both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

StateDict = dict[str, Any]


def save(outer: Optimizer, pack: Callable[[], StateDict]) -> StateDict:
    """What ``pack`` returns, with the ``state_dict`` hooks of ``outer`` around it, as torch calls them.

    ``Optimizer.state_dict(outer)`` would pass over a ``state_dict`` that the inner one's class has written.
    """
    for before in outer._optimizer_state_dict_pre_hooks.values():
        before(outer)
    state_dict = pack()
    for after in outer._optimizer_state_dict_post_hooks.values():
        changed = after(outer, state_dict)
        state_dict = state_dict if changed is None else changed
    return state_dict


def load(outer: Optimizer, unpack: Callable[[StateDict], None], state_dict: StateDict) -> None:
    """Hands ``state_dict`` to ``unpack``, with the ``load_state_dict`` hooks of ``outer`` around it."""
    state_dict = state_dict.copy()
    for before in outer._optimizer_load_state_dict_pre_hooks.values():
        changed = before(outer, state_dict)
        state_dict = state_dict if changed is None else changed
    unpack(state_dict)
    for after in outer._optimizer_load_state_dict_post_hooks.values():
        after(outer)
