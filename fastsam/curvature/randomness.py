"""Random numbers that a model or a data set draws during a run, out of streams of the run's own.

The global generators belong to the whole process: to save and restore them would rewind whatever
other threads drew meanwhile. So the run's own streams stand in for them while code of the user's draws.
"""

from __future__ import annotations

import _random
import functools
import hashlib
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fastsam.curvature.modes import Arguments, DispatchMode, Keywords

USER_CODE = threading.RLock()
"""Held while code of the user's runs on things of ours: parameters in a module, random streams."""


_NUMPY: Any = np.random
_GLOBAL: Any = random._inst


def _swap_python(state: Any) -> Any:
    """Give Python's global generator a state; returns the one it had.

    Both happen within one call of a C function, so that no other thread can draw in between.
    """
    take = functools.partial(_random.Random.getstate, _GLOBAL)
    give = functools.partial(_random.Random.setstate, _GLOBAL, state)
    call: Any = functools.partial.__call__
    found, _ = map(call, (take, give))
    return found


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

    Operations of this thread get torch generators of the run's own. NumPy and Python do not tell
    who draws, so theirs stand in as long as the code runs; another thread that draws from these two
    meanwhile gets numbers of the run's streams.

    Args:
        seed: of all streams.

    Attributes:
        drawn: whether anything was drawn.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._numpy = np.random.MT19937(seed)
        self._python: Any = _random.Random(seed).getstate()
        self._torch: dict[torch.device, torch.Generator] = {}
        self.drawn = False

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """Numbers that are drawn inside come from these streams."""
        with USER_CODE:
            numpy_outside, numpy_before = _NUMPY.get_bit_generator(), repr(self._numpy.state)
            gauss = vars(_GLOBAL).get("gauss_next")
            _NUMPY.set_bit_generator(self._numpy)
            python_outside = _swap_python(self._python)
            try:
                with _Drawing(self):
                    yield
            finally:
                python_after = _swap_python(python_outside)
                _NUMPY.set_bit_generator(numpy_outside)
                _GLOBAL.gauss_next = gauss
                same = repr(self._numpy.state) == numpy_before and python_after == self._python
                self.drawn |= not same
                self._python = python_after

    def draw(self, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Call an operation of torch's that would draw from the global generators."""
        generators = [self._generator(torch.device("cpu"))]
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            count = torch.cuda.device_count()
            generators += [self._generator(torch.device("cuda", index)) for index in range(count)]
        before = [generator.get_state() for generator in generators]
        try:
            return self._called(function, arguments, keywords)
        finally:
            states = zip(generators, before, strict=True)
            self.drawn |= not all(torch.equal(own.get_state(), state) for own, state in states)

    def _called(self, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        taking = _taking_a_generator(function)
        if taking is not None:
            device = next((x.device for x in arguments if isinstance(x, torch.Tensor)), None)
            own = self._generator(torch.device(keywords.get("device") or device or "cpu"))
            return taking(*arguments, **{**keywords, "generator": own})
        with USER_CODE, self._torch_standing_in():
            return function(*arguments, **keywords)

    def _generator(self, device: torch.device) -> torch.Generator:
        index = (
            torch.cuda.current_device() if device.type == "cuda" and device.index is None else None
        )
        place = device if index is None else torch.device("cuda", index)
        if place not in self._torch:
            self._torch[place] = torch.Generator(place).manual_seed(self._seed)
        return self._torch[place]

    @contextmanager
    def _torch_standing_in(self) -> Iterator[None]:
        pairs = [(torch.default_generator, self._generator(torch.device("cpu")))]
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            for index, generator in enumerate(torch.cuda.default_generators):
                pairs.append((generator, self._generator(torch.device("cuda", index))))
        outside = [generator.get_state() for generator, _ in pairs]
        for generator, own in pairs:
            generator.set_state(own.get_state())
        try:
            yield
        finally:
            for (generator, own), state in zip(pairs, outside, strict=True):
                own.set_state(generator.get_state())
                generator.set_state(state)


@functools.cache
def _taking_a_generator(function: Any) -> Any:
    """The form of an operation that takes a generator as well; None where there is none."""
    names = [argument.name for argument in function._schema.arguments]
    if "generator" in names:
        return function
    for name in function.overloadpacket.overloads():
        other = getattr(function.overloadpacket, name)
        if [x.name for x in other._schema.arguments if x.name != "generator"] == names and any(
            x.name == "generator" for x in other._schema.arguments
        ):
            return other
    return None


class _Drawing(DispatchMode):  # type: ignore[no-untyped-call]
    """Gives the run's generators to every operation of this thread that draws from a global one."""

    def __init__(self, streams: Randomness) -> None:
        super().__init__()
        self._streams = streams
        self._process = os.getpid()

    def call(self, function: Callable[..., Any], arguments: Arguments, keywords: Keywords) -> Any:
        """Call ``function``, with a generator of the run's where it draws."""
        draws = torch.Tag.nondeterministic_seeded in getattr(function, "tags", ())
        own = any(isinstance(value, torch.Generator) for value in (*arguments, *keywords.values()))
        # A DataLoader's worker is a copy of this process and has generators of its own.
        if not draws or own or os.getpid() != self._process:
            return function(*arguments, **keywords)
        return self._streams.draw(function, arguments, keywords)
