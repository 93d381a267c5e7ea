"""Official codes of published methods, read from checkouts outside this repository.

``python -m python_tests.longtail.official_codes FOLDER`` clones them. The tests that compare with them need
``FASTSAM_OFFICIAL_CODES=FOLDER``, and are skipped without it. No official code is copied into this
repository: tests import single functions and classes from its files.
"""

from __future__ import annotations

import ast
import copy
import math
import os
import random
import subprocess
import sys
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

VARIABLE = "FASTSAM_OFFICIAL_CODES"

OFFICIAL_CODES = {
    "BagofTricks-LT": ("zhangyongshun", "ce7859a930649d10fb2a4fd4ed9242007eb25e2f"),
    "BalancedMetaSoftmax-Classification": (
        "jiawei-ren",
        "34a61e432881816c2da14d577d6ed63501288f5f",
    ),
    "CutMix-PyTorch": ("clovaai", "2d8eb68faff7fe4962776ad51d175c3b01a25734"),
    "DisAlign": ("Megvii-BaseDetection", "a2fc3500a108cb83e3942293a5675c97ab3a2c6e"),
    "LIFT": ("shijxcs", "661ead9b78368f05ba79abe4672d63154467f823"),
    "LTR-weight-balancing": ("ShadeAlsha", "e89f29273d35bb02d58204e7e450a390920c264d"),
    "MiSLAS": ("dvlab-research", "0fc381e333d8a11170851b7af2058c59840969e0"),
    "Prior-LT": ("XuZhengzhuo", "5f2298c95ce370a9ec3eeeaefdaff6ba177c7731"),
    "balanced_mixup": ("agaldran", "c9e053b95c2400a6c33e3cc1c0b405c37595147c"),
    "classifier-balancing": ("facebookresearch", "f162adef63fdf592d0b8a0f6e52bc481fc08785f"),
    "cmo": ("naver-ai", "10d2d0988df03f06605a3007be548129b6f0f5b8"),
    "cvpods": ("Megvii-BaseDetection", "2deea5dc659371318c8a570c644201d913a83027"),
    "mixup-cifar10": ("facebookresearch", "eaff31ab397a90fbc0a4aac71fb5311144b3608b"),
}
"""Owner on GitHub and commit of each repository. Its checkout is the subfolder of the same name."""

_SCOPE = {
    "F": functional, "Parameter": nn.Parameter, "Tensor": Tensor, "copy": copy, "math": math, "nn": nn,
    "np": np, "os": os, "path": os.path, "random": random, "time": time, "torch": torch,
}  # fmt: skip
"""Names that the files of the repositories import."""


def needs(*repositories: str) -> pytest.MarkDecorator:
    """Return the mark of a test that needs the checkouts of these repositories."""
    folder = os.environ.get(VARIABLE)
    missing = [name for name in repositories if folder is None or not Path(folder, name).is_dir()]
    return pytest.mark.skipif(
        bool(missing),
        reason=f"needs the official code of {', '.join(missing)}: run python -m "
        f"python_tests.longtail.official_codes FOLDER, then set {VARIABLE}=FOLDER",
    )


def file(repository: str, name: str) -> Path:
    """Return the path of a file of a checkout."""
    return Path(os.environ[VARIABLE], repository, name)


def official(repository: str, name: str, *wanted: str, **scope: Any) -> SimpleNamespace:
    """Execute functions and classes of a file, without its imports and its other statements.

    Args:
        repository: name of the checkout.
        name: path of the file in it.
        *wanted: names of functions, methods and classes anywhere in the file, each of which must be there
            once; by default all at the top level.
        **scope: further names that they use, or replacements.
    """
    tree = ast.parse(file(repository, name).read_text())
    kinds = (ast.FunctionDef, ast.ClassDef)
    nodes = [node for node in (ast.walk(tree) if wanted else tree.body) if isinstance(node, kinds)]
    chosen = [node for node in nodes if not wanted or node.name in wanted]
    assert not wanted or sorted(node.name for node in chosen) == sorted(wanted)
    return _executed(list(chosen), repository, name, scope)


def statements(repository: str, name: str, first: str, last: str, **scope: Any) -> SimpleNamespace:
    """Execute the statements of a script from the one that assigns ``first`` to the one of ``last``."""
    body = ast.parse(file(repository, name).read_text()).body
    assigned = [
        [target.id for target in node.targets if isinstance(target, ast.Name)]
        if isinstance(node, ast.Assign)
        else []
        for node in body
    ]
    begin = next(place for place, names in enumerate(assigned) if first in names)
    end = next(place for place, names in enumerate(assigned) if last in names and place >= begin)
    return _executed(body[begin : end + 1], repository, name, scope)


def _executed(
    nodes: Sequence[ast.stmt], repository: str, name: str, scope: dict[str, Any]
) -> SimpleNamespace:
    names = {**_SCOPE, **scope, "__name__": f"{repository}/{name}"}
    module = ast.Module(body=list(nodes), type_ignores=[])
    exec(compile(module, str(file(repository, name)), "exec"), names)
    return SimpleNamespace(**names)


class Meter:
    """A stand-in for the meters of the codes, which have no effect on training."""

    val = avg = 0.0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def update(self, *_: Any) -> None:
        """Ignore a value."""

    display = update


def no_accuracy(*_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """Stand in for the accuracies that the codes print."""
    return torch.zeros(1), torch.zeros(1)


class Draws:
    """A generator that records its random numbers, so that official code can use the same ones."""

    def __init__(self, generator: np.random.Generator) -> None:
        self._generator = generator
        self._recorded: dict[str, deque[tuple[tuple[Any, ...], Any]]] = defaultdict(deque)

    def random(self) -> float:
        """See :class:`numpy.random.Generator`."""
        return self._keep("random", (), self._generator.random())

    def beta(self, a: float, b: float, size: int | None = None) -> Any:
        """See :class:`numpy.random.Generator`."""
        values = self._generator.beta(a, b, size)
        for value in np.atleast_1d(values):
            self._keep("beta", (a, b), float(value))
        return values

    def integers(self, high: int) -> Any:
        """See :class:`numpy.random.Generator`."""
        return self._keep("integers", (high,), self._generator.integers(high))

    def permutation(self, size: int) -> Any:
        """See :class:`numpy.random.Generator`."""
        return self._keep("permutation", (size,), self._generator.permutation(size))

    def choice(self, size: int, count: int, *, p: Any) -> Any:
        """See :class:`numpy.random.Generator`."""
        return self._keep("choice", (count, p), self._generator.choice(size, count, p=p))

    def _keep(self, kind: str, arguments: tuple[Any, ...], value: Any) -> Any:
        self._recorded[kind].append((arguments, value))
        return value

    def again(self, kind: str, *arguments: Any) -> Any:
        """Return the next recorded number of a kind, which must have been drawn with the same arguments."""
        before, value = self._recorded[kind].popleft()
        for one, other in zip(before, arguments, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-12)
        return value

    def is_used_up(self) -> bool:
        """Return whether all recorded numbers were used."""
        return not any(self._recorded.values())

    def names(self) -> dict[str, Any]:
        """Return ``np``, ``torch`` and ``choice`` for official code, with the recorded numbers."""

        def rand(count: int) -> Any:
            # A mixer need not draw it in an epoch without mixing; with 0, the code would mix.
            assert count == 1
            return self.again("random") if self._recorded["random"] else 0.0

        drawn = SimpleNamespace(
            beta=lambda a, b: self.again("beta", a, b),
            rand=rand,
            randint=lambda high: self.again("integers", high),
        )
        return {
            "np": SimpleNamespace(**{**vars(np), "random": drawn, "int": int}),
            "torch": SimpleNamespace(
                **{
                    **vars(torch),
                    "randperm": lambda size: torch.from_numpy(self.again("permutation", size)),
                }
            ),
            "choice": lambda places, count, p: places[self.again("choice", count, p)],
        }


class Agreement:
    """Compares results with those of official code, and keeps the largest deviations.

    Attributes:
        count: number of comparisons.
        largest: largest deviation by precision, relative to the largest number of the result.
    """

    def __init__(self) -> None:
        self.count = 0
        self.largest: dict[torch.dtype, float] = {}

    def __call__(self, found: Any, expected: Any, *, rtol: float = 1e-11) -> None:
        """Check that the largest deviation is at most ``rtol`` times the largest number of the result."""
        found, expected = torch.as_tensor(found).detach(), torch.as_tensor(expected).detach()
        assert found.shape == expected.shape
        coarser = min(found.dtype, expected.dtype, key=lambda kind: torch.finfo(kind).bits)
        scale = float(expected.double().abs().max()) or 1.0
        deviation = float((found.double() - expected.double()).abs().max()) / scale
        assert deviation <= rtol, f"deviation {deviation:.2g}, allowed {rtol:.2g}"
        self.count += 1
        self.largest[coarser] = max(self.largest.get(coarser, 0.0), deviation)

    def gradients(self, found: Tensor, expected: Tensor, pairs: Any) -> None:
        """Compare two scalars, and their gradients with respect to pairs of tensors."""
        self(found, expected)
        ours, theirs = zip(*pairs, strict=True)
        for one, other in zip(
            torch.autograd.grad(found, ours), torch.autograd.grad(expected, theirs), strict=True
        ):
            self(one.flatten(), other.flatten())

    def summary(self) -> str:
        """Describe the comparisons so far."""
        found = (f"{value:.1e} ({kind})" for kind, value in self.largest.items())
        return f"{self.count} comparisons with official codes; largest deviation {', '.join(found)}"


def same_values(*shape: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the same random numbers twice, for the two codes."""
    values = scale * torch.randn(*shape)
    return values.clone().requires_grad_(), values.clone().requires_grad_()


def same_weights(ours: nn.Module, theirs: nn.Module, names: dict[str, str]) -> list[Any]:
    """Give two modules the same random parameters, and return the pairs. Names map theirs to ours."""
    mine, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert (mine.keys(), other.keys()) == ({*names.values()}, names.keys())
    pairs = [(mine[own], other[name]) for name, own in names.items()]
    with torch.no_grad():
        for one, two in pairs:
            two.copy_(nn.init.normal_(one, std=0.5).reshape(two.shape))
    assert [one.requires_grad for one, _ in pairs] == [two.requires_grad for _, two in pairs]
    return [pair for pair in pairs if pair[0].requires_grad]


def clone(folder: Path) -> None:
    """Clone all repositories at their commits into subfolders of a folder."""
    for name, (owner, commit) in OFFICIAL_CODES.items():
        there = folder / name
        there.mkdir(parents=True, exist_ok=True)
        for command in (
            ["init", "--quiet"],
            ["fetch", "--quiet", "--depth", "1", f"https://github.com/{owner}/{name}", commit],
            ["checkout", "--quiet", commit],
        ):
            subprocess.run(["git", "-C", str(there), *command], check=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m python_tests.longtail.official_codes FOLDER")
    clone(Path(sys.argv[1]))
