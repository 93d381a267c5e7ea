"""Random streams of a run, for models and data sets that use the global generators.

The global generators belong to the whole process. Saving and restoring their states would also rewind
the numbers that other threads draw meanwhile. Instead, the run's streams replace the global generators
while user code runs.
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

from fastsam.curvature.products.modes import Arguments, DispatchMode, Keywords

USER_CODE = threading.RLock()
"""Lock held while user code runs with swapped parameters or random streams."""


_NUMPY: Any = np.random
_GLOBAL: Any = random._inst


def _swap_python(state: Any) -> Any:
    """Set the state of Python's global generator and return the previous state.

    Both happen within one bytecode instruction, the unpacking of a ``map`` over C functions, so that
    no other thread can draw in between.
    """
    take = functools.partial(_random.Random.getstate, _GLOBAL)
    give = functools.partial(_random.Random.setstate, _GLOBAL, state)
    call: Any = functools.partial.__call__
    found, _ = map(call, (take, give))
    return found


def global_seed(*more: torch.Generator) -> int:
    """Return a seed derived from the states of the global generators and of ``more``."""
    checksum = hashlib.blake2b(digest_size=8)
    for generator in (torch.default_generator, *more):
        checksum.update(generator.get_state().numpy().tobytes())
    _, keys, position, *_ = np.random.get_state()
    checksum.update(np.asarray(keys).tobytes() + str(position).encode())
    checksum.update(repr(random.getstate()).encode())
    return int.from_bytes(checksum.digest(), "little") >> 1


class Randomness:
    """Random streams of torch (all devices), NumPy and Python that replace the global generators.

    torch operations of the current thread get the run's generators. NumPy and Python do not reveal
    which thread draws, so their global generators are replaced for all threads: another thread that
    uses them meanwhile gets numbers from the run's streams.

    Args:
        seed: seed of all streams.

    Attributes:
        drawn: whether any number was drawn.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._numpy = np.random.MT19937(seed)
        self._python: Any = _random.Random(seed).getstate()
        self._torch: dict[torch.device, torch.Generator] = {}
        self.drawn = False

    @contextmanager
    def active(self) -> Iterator[None]:
        """Replace the global generators by these streams inside the context."""
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
        """Call a torch operation that would draw from the global generators, with these streams."""
        generators = [self._generator(torch.device("cpu"))]
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            count = torch.cuda.device_count()
            generators += [self._generator(torch.device("cuda", index)) for index in range(count)]
        before = [generator.get_state() for generator in generators]
        try:
            return self._call_with_streams(function, arguments, keywords)
        finally:
            states = zip(generators, before, strict=True)
            self.drawn |= not all(torch.equal(own.get_state(), state) for own, state in states)

    def _call_with_streams(
        self, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> Any:
        overload = _overload_with_generator(function)
        if overload is not None:
            device = next((x.device for x in arguments if isinstance(x, torch.Tensor)), None)
            own = self._generator(torch.device(keywords.get("device") or device or "cpu"))
            return overload(*arguments, **{**keywords, "generator": own})
        with USER_CODE, self._replacing_torch():
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
    def _replacing_torch(self) -> Iterator[None]:
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
def _overload_with_generator(function: Any) -> Any:
    """Return the overload of an operation that also takes a generator, or None."""
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
    """Passes the run's generators to all operations of this thread that draw random numbers."""

    def __init__(self, streams: Randomness) -> None:
        super().__init__()
        self._streams = streams
        self._process = os.getpid()

    def call(self, function: Callable[..., Any], arguments: Arguments, keywords: Keywords) -> Any:
        """Call ``function``, with one of the run's generators if it draws."""
        draws = torch.Tag.nondeterministic_seeded in getattr(function, "tags", ())
        own = any(isinstance(value, torch.Generator) for value in (*arguments, *keywords.values()))
        # A DataLoader worker is a fork of this process, with this mode active, but seeds its generators.
        if not draws or own or os.getpid() != self._process:
            return function(*arguments, **keywords)
        return self._streams.draw(function, arguments, keywords)
