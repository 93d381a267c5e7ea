"""Random numbers that a model or a data set draws during a run, out of streams of the run's own.

The global generators belong to the whole process: to save and restore them would rewind whatever
other threads drew meanwhile. So the run's own streams stand in for them exactly while code of the
user's draws, and nothing is ever rewound.
"""

from __future__ import annotations

import hashlib
import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

USER_CODE = threading.RLock()
"""Held while code of the user's runs on things of ours: parameters in a module, random streams."""


def global_seed(*more: torch.Generator) -> int:
    """A seed that follows from the state of the global generators, and of others."""
    checksum = hashlib.blake2b(digest_size=8)
    for generator in (torch.default_generator, *more):
        checksum.update(generator.get_state().numpy().tobytes())
    _, keys, position, *_ = np.random.get_state()
    checksum.update(np.asarray(keys).tobytes() + str(position).encode())
    checksum.update(repr(random.getstate()).encode())
    return int.from_bytes(checksum.digest(), "little") >> 1


class Randomness:
    """Streams of torch (all devices), NumPy and Python for code that draws from the global ones.

    Torch's stand in for single operations of this thread. NumPy and Python do not tell who draws,
    so theirs stand in as long as the code runs; another thread that draws from these two meanwhile
    gets numbers of the run's streams.

    Args:
        seed: of all streams.

    Attributes:
        drawn: whether anything was drawn.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._numpy: Any = np.random.RandomState(seed % 2**32).get_state()
        self._python = random.Random(seed).getstate()
        self._torch: dict[torch.Generator, torch.Tensor] = {}
        self.drawn = False

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """Numbers that are drawn inside come from these streams."""
        with USER_CODE:
            outside = np.random.get_state(), random.getstate()
            np.random.set_state(self._numpy)
            random.setstate(self._python)
            try:
                with _Drawing(self):
                    yield
            finally:
                numpy_state: Any = np.random.get_state()
                python_state = random.getstate()
                np.random.set_state(outside[0])
                random.setstate(outside[1])
                same = numpy_state[2:] == self._numpy[2:] and python_state == self._python
                self.drawn |= not (same and np.array_equal(numpy_state[1], self._numpy[1]))
                self._numpy, self._python = numpy_state, python_state

    @contextmanager
    def _torch_standing_in(self) -> Iterator[None]:
        generators = [torch.default_generator]
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            generators += torch.cuda.default_generators
        with USER_CODE:
            outside = [(generator, generator.get_state()) for generator in generators]
            for generator in generators:
                if generator in self._torch:
                    generator.set_state(self._torch[generator])
                else:
                    generator.manual_seed(self._seed)
                    self._torch[generator] = generator.get_state()
            try:
                yield
            finally:
                for generator, state in outside:
                    after = generator.get_state()
                    self.drawn |= not torch.equal(after, self._torch[generator])
                    self._torch[generator] = after
                    generator.set_state(state)


class _Drawing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Swaps generators around every operation of this thread that draws from a global one."""

    def __init__(self, streams: Randomness) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._streams = streams
        self._process = os.getpid()

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        arguments: tuple[Any, ...] = (),
        keywords: dict[str, Any] | None = None,
    ) -> Any:
        keywords = keywords or {}
        draws = torch.Tag.nondeterministic_seeded in getattr(function, "tags", ())
        own = any(isinstance(value, torch.Generator) for value in (*arguments, *keywords.values()))
        # A DataLoader's worker is a copy of this process and has generators of its own.
        if not draws or own or os.getpid() != self._process:
            return function(*arguments, **keywords)
        with self._streams._torch_standing_in():
            return function(*arguments, **keywords)
