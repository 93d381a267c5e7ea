"""Random sequences of calls on SAM, compared with a model of its contract after every call.

``FASTSAM_TEST_SEED`` shifts the seeds of all runs. A failure names its run and lists its actions.
"""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ExponentialLR

from fastsam import SAM
from fastsam.optim import LinearSchedule, RhoScheduler
from python_tests.conftest import BASE_SEED
from python_tests.optim.sam_model import (
    OWN,
    POLICY,
    Model,
    Refusal,
    Snapshot,
    difference,
    same_layout,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:the ascent left"),
    pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract"),
]

QUICK, FULL, PART = 40, 2000, 50
"""Number of runs of the quick and the slow test, and of runs per test."""

ACTIONS = (12, 30)
"""Minimum and maximum number of actions of a run."""

# --- optimizers and parameters of a run ---------------------------------------------------------


class SubclassedSGD(SGD):
    """An SGD subclass without a fused update, which runs its own step."""


@dataclass(frozen=True)
class Base:
    make: type[Optimizer]
    options: Callable[[random.Random, bool], dict[str, Any]]
    fused: bool = False
    takes_groups_later: bool = True


def _sgd(rng: random.Random, narrow: bool) -> dict[str, Any]:
    momentum = rng.choice([0.0, 0.5, 0.9])
    nesterov = momentum > 0 and rng.random() < 0.3
    return {
        "lr": rng.choice([0.1, 0.01]),
        "momentum": momentum,
        "dampening": 0.0 if nesterov else rng.choice([0.0, 0.3]),
        "nesterov": nesterov,
        "weight_decay": rng.choice([0.0, 0.01]),
        "maximize": rng.random() < 0.2,
    }


def _adam(rng: random.Random, narrow: bool) -> dict[str, Any]:
    return {
        "lr": rng.choice([0.1, 0.01]),
        "betas": rng.choice([(0.9, 0.999), (0.5, 0.9)]),
        "eps": 1e-3 if narrow else 1e-8,
        "weight_decay": rng.choice([0.0, 0.1]),
        "amsgrad": rng.random() < 0.3,
        "maximize": rng.random() < 0.2,
    }


def _plain(rng: random.Random, narrow: bool) -> dict[str, Any]:
    return {"lr": 0.01, "weight_decay": rng.choice([0.0, 0.01])}


def _divides(rng: random.Random, narrow: bool) -> dict[str, Any]:
    return {"eps": 1e-3 if narrow else 1e-8, **_plain(rng, narrow)}


def _rmsprop(rng: random.Random, narrow: bool) -> dict[str, Any]:
    return {
        "momentum": rng.choice([0.0, 0.9]),
        "centered": rng.random() < 0.3,
        **_divides(rng, narrow),
    }


BASES = {
    "SGD": Base(SGD, _sgd, fused=True),
    "Adam": Base(Adam, _adam, fused=True),
    "AdamW": Base(AdamW, _adam, fused=True),
    "subclass of SGD": Base(SubclassedSGD, _sgd),
    "RMSprop": Base(torch.optim.RMSprop, _rmsprop),
    # Adagrad of torch 2.14 creates no state for parameters that are added later.
    "Adagrad": Base(torch.optim.Adagrad, _divides, takes_groups_later=False),
    "NAdam": Base(torch.optim.NAdam, _divides),
    "RAdam": Base(torch.optim.RAdam, _divides),
    "Adamax": Base(torch.optim.Adamax, _divides),
    "ASGD": Base(torch.optim.ASGD, _plain),
    "Rprop": Base(torch.optim.Rprop, lambda rng, narrow: {"lr": 0.01}),
}
WEIGHTS_OF_BASES = [6, 4, 4, 2, 2, 1, 1, 1, 1, 1, 1]

DTYPES = {
    "float32": [torch.float32],
    "float64": [torch.float64],
    "bfloat16": [torch.bfloat16],
    "float16": [torch.float16],
    "mixed": [torch.float32, torch.float64, torch.bfloat16, torch.float16],
}
SHAPES = [(), (1,), (3,), (17,), (5, 7), (3, 1, 2), (33, 3), (0,), (2, 0), (1003,)]
LAYOUTS = ["contiguous", "contiguous", "transposed", "channels_last", "gaps", "offset"]


class Memory:
    """A parameter's memory, including the elements around it."""

    def __init__(self, values: Tensor, layout: str) -> None:
        shape = list(values.shape)
        if layout == "transposed" and len(shape) >= 2:
            self.whole = torch.full([*shape[:-2], shape[-1], shape[-2]], 7.0, dtype=values.dtype)
            self.view = self.whole.transpose(-1, -2)
        elif layout == "gaps" and shape:
            self.whole = torch.full([*shape[:-1], 2 * shape[-1] + 1], 7.0, dtype=values.dtype)
            self.view = self.whole[..., 1::2]
        elif layout == "offset":
            self.whole = torch.full([values.numel() + 3], 7.0, dtype=values.dtype)
            self.view = self.whole[1 : 1 + values.numel()].view(shape)
        elif layout == "channels_last" and len(shape) == 4:
            self.whole = torch.empty(shape, dtype=values.dtype, memory_format=torch.channels_last)
            self.view = self.whole
        else:
            self.whole = torch.empty(shape, dtype=values.dtype)
            self.view = self.whole
        self.view.copy_(values)
        self._around = self._outside()

    def _outside(self) -> Tensor:
        """Return the memory with zeros in place of the parameter."""
        if self.view.numel() == self.whole.numel():
            return torch.zeros(())
        copied = self.whole.clone(memory_format=torch.contiguous_format)
        copied.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset()).zero_()
        return copied

    def is_intact(self) -> bool:
        return torch.equal(self._outside(), self._around)


class Machine:
    """An optimizer, its parameters, and the model of both."""

    def __init__(
        self, parameters: list[nn.Parameter], optimizer: SAM, model: Model, kind: Base
    ) -> None:
        self.parameters = parameters
        self.optimizer = optimizer
        self.model = model
        self.kind = kind
        self.memory: list[Memory] = []
        self.kept: list[Any] = []
        self.saved: tuple[dict[str, Any], Snapshot, list[int]] | None = None
        self.lr_schedule: ExponentialLR | None = None
        self.stepped = False
        self.remember_addresses()

    def remember_addresses(self) -> None:
        self.addresses = [p.data_ptr() for p in self.parameters]
        self.strides = [p.stride() for p in self.parameters]

    @property
    def trains(self) -> list[bool]:
        return [p.requires_grad for p in self.parameters]

    def verify(self) -> None:
        """Compare everything visible with the model."""
        optimizer, model = self.optimizer, self.model
        base = optimizer.base_optimizer
        assert optimizer.param_groups is base.param_groups
        assert optimizer.state is base.state
        flat = [p for group in optimizer.param_groups for p in group["params"]]
        assert [id(p) for p in flat] == [id(p) for p in self.parameters]
        assert [p.data_ptr() for p in self.parameters] == self.addresses
        assert [p.stride() for p in self.parameters] == self.strides
        for group, settings, others in zip(
            optimizer.param_groups, model.settings, model.base.param_groups, strict=True
        ):
            for name, expected in {**others, **settings}.items():
                if name not in ("params", "foreach", "fused", "initial_lr"):
                    assert equal_options(group[name], expected), f"option {name}"
        for index, (p, slot) in enumerate(zip(self.parameters, model.slots, strict=True)):
            problem = model.compare_weight(slot, p.detach())
            problem = problem or model.compare_state(slot, optimizer.state.get(p, {}))
            if (p.grad is None) != (slot.gradient is None):
                problem = problem or "a gradient came or went"
            if p.grad is not None and p.grad.layout is torch.strided and slot.gradient is not None:
                problem = problem or difference(p.grad, slot.gradient)
            assert problem is None, f"parameter {index}: {problem}"
        assert all(memory.is_intact() for memory in self.memory), "memory around a parameter"
        assert int(optimizer.skipped_steps) == model.skipped
        assert optimizer.attempted_steps == model.attempted
        for bucket in optimizer.native_step._buckets:
            assert bucket.perturbs or bucket.backup is None
        assert 0.0 <= float(optimizer.unchanged_share) <= 1.0

    def versions(self) -> dict[int, tuple[Tensor, int]]:
        """Return the versions of parameters and of existing state."""
        tensors = [p for p in self.parameters if p.numel()]
        for p in self.parameters:
            if p.numel():
                tensors += [
                    v for v in self.optimizer.state.get(p, {}).values() if isinstance(v, Tensor)
                ]
        return {id(t): (t, t._version) for t in tensors}

    def written(
        self, before: dict[int, tuple[Tensor, int]], which: list[int], *, state: bool = False
    ) -> None:
        """Without version increments, autograd would run backward through a stale graph."""
        groups = [group for _, _, group in self.model.members()]
        for index in which:
            p = self.parameters[index]
            tensors = [p]
            if state and groups[index].get("momentum") != 0:
                tensors += self.optimizer.state.get(p, {}).values()
            for tensor in tensors:
                if id(tensor) in before:
                    assert tensor._version > before[id(tensor)][1], f"version of {index}"


def equal_options(found: Any, expected: Any) -> bool:
    if isinstance(found, Tensor):
        return float(found) == expected
    return bool(found == expected)


# --- a run --------------------------------------------------------------------------------------


class Run:
    """A sequence of random actions, determined by ``seed``."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.trace: list[str] = []
        rng = self.rng
        name = rng.choices(list(BASES), WEIGHTS_OF_BASES)[0]
        self.kind = BASES[name]
        dtypes = rng.choice(list(DTYPES))
        self.dtypes = DTYPES[dtypes]
        self.narrow = any(dtype.itemsize == 2 for dtype in self.dtypes)
        self.options = self.kind.options(rng, self.narrow)
        self.closure_makes_both = rng.random() < 0.5
        self.sam_options = {
            "rho": self.rho(),
            "adaptive": self.adaptive(),
            **self.policy(),
            "check_finite": rng.random() < 0.8,
            "closure": "both_passes" if self.closure_makes_both else "second_pass",
        }
        self.trace.append(f"{name} {self.options} {dtypes} {self.sam_options}")
        self.machines = [self.begin()]
        self.machine = self.machines[0]

    def go(self) -> None:
        try:
            self.machine.verify()
            for _ in range(self.rng.randint(*ACTIONS)):
                self.machine = self.rng.choice(self.machines)
                actions = MIDWAY if self.machine.model.begun else BETWEEN
                action = self.rng.choices(list(actions), list(actions.values()))[0]
                self.trace.append(action)
                getattr(self, action)()
                self.machine.verify()
            for machine in self.machines:
                machine.optimizer.restore()
                machine.model.restore()
                machine.verify()
        except BaseException as error:
            error.add_note(f"run {self.seed}, after " + "\n      ".join(self.trace))
            raise

    def note(self, text: str) -> None:
        self.trace[-1] += f" {text}"

    # --- chance ---

    def rho(self) -> float:
        return self.rng.choice([0.0, 0.05, 0.3, 2.0])

    def policy(self) -> dict[str, Any]:
        start = self.rng.choice([0, 0, 0, 1, 2, 4])
        return {
            "start": start,
            "interval": self.rng.choice([1, 1, 1, 2, 3]),
            "stop": self.rng.choice([None, None, start + 1, start + 3]),
        }

    def adaptive(self) -> bool | str:
        return self.rng.choice([False, False, True, "weights"])

    def normal(self, shape: Any, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def parameter(self) -> tuple[nn.Parameter, Memory]:
        rng = self.rng
        layout = rng.choice(LAYOUTS)
        shape = (2, 3, 4, 3) if layout == "channels_last" else rng.choice(SHAPES)
        memory = Memory(self.normal(shape, rng.choice(self.dtypes)), layout)
        return nn.Parameter(memory.view, requires_grad=rng.random() < 0.95), memory

    def group_options(self) -> dict[str, Any]:
        """Return random options of a group."""
        rng = self.rng
        options: dict[str, Any] = {}
        if rng.random() < 0.4:
            options["rho"] = self.rho()
        if rng.random() < 0.3:
            options["adaptive"] = self.adaptive()
        if rng.random() < 0.2:
            options["eta"] = rng.choice([None, 0.0, 0.1])
        if rng.random() < 0.3:
            options["lr"] = rng.choice([0.1, 0.05])
        if rng.random() < 0.2:
            options["stochastic_rounding"] = True
        if rng.random() < 0.2:
            options["perturb"] = False
        return options

    def begin(self) -> Machine:
        rng = self.rng
        groups: list[dict[str, Any]] = []
        memory = []
        for _ in range(rng.choice([1, 1, 2, 3])):
            made = [self.parameter() for _ in range(rng.randint(1, 4))]
            memory += [each for _, each in made]
            groups.append({"params": [p for p, _ in made], **self.group_options()})
        if not any(group.get("perturb", True) for group in groups):
            with pytest.raises(ValueError, match="perturb=False in every parameter group"):
                SAM(copy.deepcopy(groups), self.kind.make, **self.sam_options, **self.options)
            del groups[0]["perturb"]
        described = [dict(group) for group in groups]
        for wrong in (LBFGS, torch.optim.Adadelta):
            with pytest.raises((TypeError, ValueError), match=wrong.__name__):
                SAM([{"params": group["params"]} for group in groups], wrong)
        if rng.random() < 0.2:
            own = {k: v for k, v in self.sam_options.items() if k not in ("rho", "adaptive")}
            for group in groups:
                group.setdefault("rho", self.sam_options["rho"])
                group.setdefault("adaptive", self.sam_options["adaptive"])
            optimizer = SAM(optimizer=self.kind.make(groups, **self.options), **own)
        else:
            optimizer = SAM(groups, self.kind.make, **self.sam_options, **self.options)
        parameters = [p for group in described for p in group["params"]]
        machine = Machine(parameters, optimizer, self.model_of(described), self.kind)
        machine.memory = memory
        return machine

    def model_of(self, described: list[dict[str, Any]]) -> Model:
        return Model(
            [(group["params"], self.in_full(group)) for group in described],
            self.kind.make,
            fused=self.kind.fused,
            options=self.options,
            check_finite=self.sam_options["check_finite"],
        )

    def in_full(self, group: dict[str, Any]) -> dict[str, Any]:
        """Return SAM's options of a group, filled with those of the constructor."""
        own = {
            "rho": self.sam_options["rho"],
            "adaptive": self.sam_options["adaptive"],
            "eta": None,
            "stochastic_rounding": False,
            "perturb": True,
            **{name: self.sam_options[name] for name in POLICY},
        }
        return {**own, **{key: value for key, value in group.items() if key != "params"}}

    def fork(self, parameters: list[nn.Parameter], optimizer: SAM) -> Machine:
        """Return a machine whose model has the current state."""
        now = self.machine.model
        rest = iter(parameters)
        described = [{"params": [next(rest) for _ in range(n)]} for n in now.shape()]
        model = self.model_of(described)
        model.load(now.snapshot(), casts=False)
        model.skipped = int(optimizer.skipped_steps)
        assert model.skipped in (0, now.skipped)
        return Machine(parameters, optimizer, model, self.kind)

    def refused(self, call: Callable[[], Any], refusal: Refusal | None) -> bool:
        """Make a call and return whether it raised, as it must if there is a ``refusal``."""
        if refusal is None:
            call()
            return False
        with pytest.raises(refusal[0], match=refusal[1]):
            call()
        self.note("(refused)")
        return True

    # --- gradients ---

    def gradient(self, p: nn.Parameter, clean: bool) -> Tensor | None:
        rng = self.rng
        kind = rng.random()
        if not p.requires_grad and rng.random() < 0.85:
            return None
        gradient = self.normal(p.shape, p.dtype)
        if kind < 0.06:
            gradient.zero_()
        elif kind < 0.10:
            gradient *= 1e-4
        elif kind < 0.14:
            gradient *= 30.0
        elif kind < 0.18 and not self.narrow:
            gradient *= rng.choice([1e-15, 1e9])
        if not clean:
            if kind > 0.75:
                return None
            if kind > 0.65 and p.numel():
                at = rng.randrange(p.numel())
                gradient.view(-1)[at] = rng.choice([float("inf"), -float("inf"), float("nan")])
        layout = rng.random()
        if layout < 0.75:  # as autograd creates them
            return torch.empty_strided(p.shape, p.stride(), dtype=p.dtype).copy_(gradient)
        if layout < 0.85 and p.dim() >= 2:
            return gradient.transpose(-1, -2).contiguous().transpose(-1, -2)
        return gradient

    def set_gradients(self, *, some: bool = False) -> None:
        """Set new gradients; with ``some``, at least one is not None."""
        machine = self.machine
        model = machine.model
        clean = self.rng.random() < 0.6
        if not self.sam_options["check_finite"] and (model.begun or not model.is_due()):
            clean = True  # without the check they would reach the weights
        for p, slot in zip(machine.parameters, machine.model.slots, strict=True):
            gradient = self.gradient(p, clean)
            p.grad = gradient
            slot.gradient = None if gradient is None else same_layout(gradient)
        if some:
            self.give_if_needed()

    def give_if_needed(self) -> None:
        """Set a gradient if the next half would raise without one."""
        model = self.machine.model
        members = list(model.members())
        if model.begun or not model.is_due():
            able = list(range(len(members)))
            enough = any(slot.gradient is not None for slot in model.slots)
        else:
            able = [i for i, (_, settings, _) in enumerate(members) if settings["perturb"]]
            enough = any(model.is_perturbed(*each) for each in members)
        if not enough:
            self.give(self.rng.choice(able), zero=False)

    def give(self, index: int, *, zero: bool) -> None:
        p, slot = self.machine.parameters[index], self.machine.model.slots[index]
        p.grad = torch.zeros_like(p) if zero else self.normal(p.shape, p.dtype)
        slot.gradient = same_layout(p.grad)

    def backward(self) -> None:
        self.set_gradients()

    def accumulate(self) -> None:
        """Accumulate a backward pass of autograd into the existing gradients."""
        machine = self.machine
        chosen = [p for p in machine.parameters if p.requires_grad and self.rng.random() < 0.7]
        if not chosen:
            return
        added = {id(p): self.normal(p.shape, p.dtype) for p in chosen}
        expected = {
            id(p): added[id(p)] if p.grad is None else p.grad + added[id(p)] for p in chosen
        }
        sum((p * added[id(p)]).sum().double() for p in chosen).backward()
        for p, slot in zip(machine.parameters, machine.model.slots, strict=True):
            if id(p) in expected:
                assert p.grad is not None
                assert difference(p.grad, expected[id(p)]) is None
                slot.gradient = same_layout(p.grad)

    def clip(self) -> None:
        for p, slot in zip(self.machine.parameters, self.machine.model.slots, strict=True):
            if p.grad is not None:
                nn.utils.clip_grad_norm_([p], 0.5)
                slot.gradient = same_layout(p.grad)

    def zero_grad(self) -> None:
        to_none = self.rng.random() < 0.7
        self.note(f"set_to_none={to_none}")
        target = self.rng.choice([self.machine.optimizer, self.machine.optimizer.base_optimizer])
        target.zero_grad(set_to_none=to_none)
        self.machine.model.zero_grad(set_to_none=to_none)

    def sparse_gradient(self) -> None:
        """Set a sparse gradient, which either half refuses without changing anything."""
        machine = self.machine
        begins = self.look() and not machine.model.begun
        able = [
            index
            for index, (p, (slot, settings, _)) in enumerate(
                zip(machine.parameters, machine.model.members(), strict=True)
            )
            if p.dim()
            and p.requires_grad
            and not (machine.model.climbed and slot.left_out)
            and not (begins and not settings["perturb"])
        ]
        if not able or any(slot.moved for slot in machine.model.slots):
            return
        index = self.rng.choice(able)
        p = machine.parameters[index]
        old = p.grad
        if machine.model.refuses_climb() is None or machine.model.refuses_descend() is None:
            p.grad = None
            p.grad = torch.zeros(p.shape, dtype=p.dtype).to_sparse()
            self.machine.model.slots[index].gradient = torch.zeros(())
            half = machine.optimizer.first_step if begins else machine.optimizer.second_step
            with pytest.raises(ValueError, match="sparse"):
                half()
            machine.verify()
            p.grad = None
            p.grad = old
            machine.model.slots[index].gradient = None if old is None else same_layout(old)

    # --- the halves ---

    def look(self) -> bool:
        """Read ``ascent_due``, which fixes the decision for the step."""
        due = self.machine.model.decide()
        assert self.machine.optimizer.ascent_due is due
        self.note(f"due={due}")
        return due

    def would_spoil(self) -> bool:
        """Return whether an update would write inf or NaN to the weights, as torch's would."""
        machine = self.machine
        return not (machine.model.climbed or self.sam_options["check_finite"]) and not all(
            bool(p.grad.isfinite().all()) for p in machine.parameters if p.grad is not None
        )

    def indices(self, *names: str) -> list[int]:
        return [
            index
            for index, slot in enumerate(self.machine.model.slots)
            if any(getattr(slot, name) is not None for name in names)
        ]

    def first_step(self) -> None:
        machine, model = self.machine, self.machine.model
        zero_grad = self.rng.random() < 0.5
        self.look()
        refusal = model.refuses_climb()
        versions = machine.versions()
        if self.refused(lambda: machine.optimizer.first_step(zero_grad=zero_grad), refusal):
            return
        model.climb(machine.trains)
        self.after_ascent(versions)
        if zero_grad:
            model.zero_grad()

    def after_ascent(self, versions: dict[int, tuple[Tensor, int]]) -> None:
        machine, model = self.machine, self.machine.model
        if not model.climbed:
            return
        machine.written(versions, self.indices("backup"))
        if not self.sam_options["check_finite"]:
            # Of parameters that are not perturbed; without the check they could reach the weights.
            for p, slot in zip(machine.parameters, model.slots, strict=True):
                if p.grad is not None and not bool(p.grad.isfinite().all()):
                    p.grad.zero_()
                    slot.gradient = same_layout(p.grad)
        norm = float(machine.optimizer.ascent_norm)
        if torch.tensor(model.norm).isfinite():
            assert norm == pytest.approx(model.norm, rel=1e-6, abs=1e-30)
        else:
            assert not torch.tensor(norm).isfinite()

    def scaled(self, half: Any, *, descends: bool) -> None:
        """Emulate ``torch.amp.GradScaler.step``."""
        machine, model = self.machine, self.machine.model
        self.look()
        refusal = model.refuses_descend() if descends else model.refuses_climb()
        scale = self.rng.choice([None, 0.5, 3.0, 128.0])
        found = self.rng.random() < 0.1 or not all(
            bool(p.grad.isfinite().all()) for p in machine.parameters if p.grad is not None
        )
        self.note(f"scale={scale} found_inf={found}")
        half.grad_scale = None if scale is None else torch.tensor(scale)
        half.found_inf = torch.tensor(float(found))
        versions = machine.versions()
        try:
            if self.refused(half.step, refusal):
                return
        finally:
            for name in ("grad_scale", "found_inf"):
                vars(half).pop(name, None)  # a refused step has dropped them
        if descends:
            self.descend(versions, scale=scale, found_inf=found)
        else:
            model.climb(machine.trains, scale=scale, found_inf=found)
            self.after_ascent(versions)

    def scaled_first_step(self) -> None:
        self.scaled(self.machine.optimizer.ascent, descends=False)

    def scaled_second_step(self) -> None:
        self.scaled(self.machine.optimizer, descends=True)

    def descend(
        self,
        versions: dict[int, tuple[Tensor, int]],
        *,
        scale: float | None = None,
        found_inf: bool | None = None,
    ) -> None:
        machine, model = self.machine, self.machine.model
        perturbed, updated = self.indices("backup"), self.indices("gradient")
        skipped = model.skipped
        model.descend(scale=scale, found_inf=found_inf)
        machine.stepped = True
        machine.written(versions, perturbed)
        if model.fused and model.skipped == skipped:
            machine.written(versions, updated, state=True)

    def second_step(self) -> None:
        self.finish(lambda zero_grad: self.machine.optimizer.second_step(zero_grad=zero_grad))

    def step(self) -> None:
        self.finish(lambda zero_grad: self.machine.optimizer.step())

    def finish(self, call: Callable[[bool], Any]) -> None:
        machine, model = self.machine, self.machine.model
        zero_grad = self.rng.random() < 0.5
        self.look()
        if self.would_spoil():
            return
        versions = machine.versions()
        if self.refused(lambda: call(zero_grad), model.refuses_descend()):
            return
        self.descend(versions)
        if zero_grad and all(p.grad is None for p in machine.parameters):
            model.zero_grad()

    def fresh_second_step(self) -> None:
        """Set new gradients and make the second half, as usual."""
        self.set_gradients(some=True)
        self.second_step()

    def usual_step(self) -> None:
        self.set_gradients(some=True)
        self.first_step()
        self.machine.verify()
        if self.machine.model.begun:
            self.fresh_second_step()

    def asking_step(self) -> None:
        """Make a step like a loop that makes the second pass only if an ascent is due."""
        if not self.look():
            self.fresh_second_step()
            return
        self.usual_step()

    def unperturbed(self) -> None:
        """Read the weights before the ascent, and possibly abandon the step there."""
        machine, model = self.machine, self.machine.model
        if any(slot.moved for slot in model.slots):
            return
        gives_up = self.rng.random() < 0.2
        self.note(f"gives_up={gives_up}")
        found = [slot.weight for slot in model.slots]
        with machine.optimizer.unperturbed():
            for slot in model.slots:
                if slot.backup is not None:
                    slot.weight = slot.backup
            machine.verify()
            if gives_up:
                machine.optimizer.restore()
                model.restore()
        if not gives_up:
            for slot, weight in zip(model.slots, found, strict=True):
                slot.weight = weight

    def return_to_weights(self) -> None:
        if any(slot.moved for slot in self.machine.model.slots):
            return
        self.machine.optimizer.return_to_weights()
        self.machine.model.return_to_weights()

    def restore(self) -> None:
        perturbed = self.indices("backup")
        versions = self.machine.versions()
        moved = any(slot.moved for slot in self.machine.model.slots)
        self.machine.optimizer.restore()
        self.machine.model.restore()
        if not moved:
            self.machine.written(versions, perturbed)

    # --- closures ---

    def closure_step(self) -> None:
        """Call ``step(closure)`` with a closure that may raise in either pass, or break a gradient."""
        machine, model, rng = self.machine, self.machine.model, self.rng
        starts_midway = model.begun
        due = self.look()
        passes = 2 if self.closure_makes_both and due and not starts_midway else 1
        fails_in = rng.choice([None, None, None, *range(passes)])
        fails_late = rng.random() < 0.5
        clears = rng.random() < 0.7 or starts_midway
        leaves_nothing = fails_in is None and rng.random() < 0.1
        self.note(f"fails_in={fails_in} late={fails_late} clears={clears}")
        error = rng.choice([ArithmeticError, KeyboardInterrupt])
        calls = 0

        has_gradient = any(p.grad is not None for p in machine.parameters)
        if not self.closure_makes_both and not starts_midway and not has_gradient:
            self.refused(
                lambda: machine.optimizer.step(lambda: pytest.fail("the closure was called")),
                (RuntimeError, "found no gradient of the first"),
            )
            model.restore()
            return
        if not (self.closure_makes_both or starts_midway or due):
            if not self.would_spoil():
                versions = machine.versions()
                found = machine.optimizer.step(lambda: pytest.fail("the closure was called"))
                assert found is None
                self.descend(versions)
            return
        if not clears and has_gradient:
            return
        if not self.closure_makes_both and not starts_midway:
            if model.refuses_climb() is not None:
                return
            model.climb(machine.trains)
            model.zero_grad()

        def closure() -> str:
            nonlocal calls
            which, calls = calls, calls + 1
            assert torch.is_grad_enabled()
            if which == 0 and self.closure_makes_both:
                for p, slot in zip(machine.parameters, model.slots, strict=True):
                    if p.grad is None:  # gradients that a step has used are dropped
                        slot.gradient = None
            machine.verify()
            if fails_in == which and not fails_late:
                raise error
            is_last = which == passes - 1
            if clears:
                machine.optimizer.zero_grad()
                model.zero_grad()
            if is_last and leaves_nothing:
                return f"loss {which}"
            if clears:
                self.set_gradients(some=True)
            else:
                self.accumulate()
                self.give_if_needed()
            if fails_in == which and fails_late:
                raise error
            if not is_last and model.refuses_climb() is None:
                model.climb(machine.trains)
                model.zero_grad()
            return f"loss {which}"

        versions = machine.versions()
        failed: type[BaseException] | None = None
        try:
            loss = machine.optimizer.step(closure)
        except (ArithmeticError, KeyboardInterrupt, RuntimeError) as caught:
            failed = type(caught)
        if fails_in is not None:
            assert failed is error
            assert calls == fails_in + 1
            model.restore()
            return
        no_gradient = all(slot.gradient is None for slot in model.slots)
        if model.refuses_descend() is not None or no_gradient:
            self.note("(refused)")
            assert failed is RuntimeError
            model.restore()
            return
        assert failed is None
        assert calls == passes
        assert loss == "loss 0"
        self.descend(versions)

    # --- settings ---

    def change_settings(self) -> None:
        machine, model, rng = self.machine, self.machine.model, self.rng
        index = rng.randrange(len(model.settings))
        group = machine.optimizer.param_groups[index]
        choices: dict[str, list[Any]] = {"rho": [0.0, 0.1, 0.5], "lr": [0.1, 0.02]}
        if "momentum" in group and model.fused:
            choices |= {
                "momentum": [0.0, 0.5, 0.9],
                "dampening": [0.0, 0.3],
                "nesterov": [False, True],
            }
        if "betas" in group and model.fused:
            choices["betas"] = [(0.9, 0.999), (0.8, 0.9)]
        for name, values in (("weight_decay", [0.0, 0.05]), ("maximize", [False, True])):
            if name in group:
                choices[name] = values
        if not model.climbed:
            choices |= {
                "adaptive": [False, True, "weights"],
                "eta": [None, 0.0, 0.05],
                "stochastic_rounding": [False, True],
            }
            if any(s["perturb"] for i, s in enumerate(model.settings) if i != index):
                choices["perturb"] = [False, True]
        if rng.random() < 0.2:
            self.change_policy()
            return
        name = rng.choice(list(choices))
        value = rng.choice(choices[name])
        self.note(f"{index} {name}={value}")
        group[name] = value
        if (name == "rho" or (name == "lr" and model.fused)) and rng.random() < 0.3:
            group[name] = torch.tensor(value, dtype=torch.float64)
        model.set(index, name, value)

    def change_policy(self) -> None:
        """Change the policy in all groups; if this step is decided, it applies to the next one."""
        machine, model = self.machine, self.machine.model
        policy = self.policy()
        policy["start"] += self.rng.choice([0, model.attempted])
        if policy["stop"] is not None:
            policy["stop"] += model.attempted
        self.note(str(policy))
        for index, group in enumerate(machine.optimizer.param_groups):
            group.update(policy)
            model.settings[index].update(policy)

    def differing_groups(self) -> None:
        machine = self.machine
        *_, last = machine.optimizer.param_groups
        if len(machine.optimizer.param_groups) == 1:
            return
        name = self.rng.choice(POLICY)
        old = last[name]
        last[name] = 10**6
        for call in (machine.optimizer.first_step, machine.optimizer.step):
            with pytest.raises(ValueError, match=f"must agree on {name}|stop must be greater"):
                call()
        last[name] = old

    def wrong_rho(self) -> None:
        machine, model = self.machine, self.machine.model
        if model.refuses_climb() is not None:
            return
        due = self.look()
        half = machine.optimizer.first_step if due else machine.optimizer.step
        old = machine.optimizer.param_groups[0]["rho"]
        for wrong in (-1.0, float("nan")):
            machine.optimizer.param_groups[0]["rho"] = wrong
            with pytest.raises(ValueError, match="rho"):
                half()
        machine.optimizer.param_groups[0]["rho"] = old
        assert not model.climbed

    def schedule(self) -> None:
        """Use a scheduler on either object, which must not warn and must affect the kernels."""
        machine, model = self.machine, self.machine.model
        optimizer = machine.optimizer
        if machine.lr_schedule is None:
            target = self.rng.choice([optimizer, optimizer.base_optimizer])
            machine.lr_schedule = ExponentialLR(target, 0.75)
            machine.stepped = False
        elif machine.stepped:
            machine.lr_schedule.step()
            for index, group in enumerate(optimizer.param_groups):
                lr = float(group["lr"])
                assert lr == pytest.approx(float(model.base.param_groups[index]["lr"]) * 0.75)
                model.set(index, "lr", lr)

    def schedule_rho(self) -> None:
        machine, model = self.machine, self.machine.model
        scheduler = RhoScheduler(machine.optimizer, LinearSchedule(0.5, 0.25, epochs=2))
        steps = self.rng.randrange(2)
        for _ in range(steps):
            scheduler.step()
        for index in range(len(model.settings)):
            model.set(index, "rho", 0.25 if steps else 0.5)

    def freeze(self) -> None:
        p = self.rng.choice(self.machine.parameters)
        p.requires_grad_(not p.requires_grad)
        if not p.requires_grad and self.rng.random() < 0.7:
            p.grad = None
            index = [id(other) for other in self.machine.parameters].index(id(p))
            self.machine.model.slots[index].gradient = None

    # --- memory ---

    def replace_storage(self) -> None:
        """Assign ``p.data = ...``, and keep the old memory so that its address cannot be reused."""
        machine = self.machine
        index = self.rng.randrange(len(machine.parameters))
        p, slot = machine.parameters[index], machine.model.slots[index]
        memory = Memory(p.detach(), self.rng.choice(LAYOUTS))
        machine.kept.append(p.data)
        address = p.data_ptr()
        p.data = memory.view
        machine.memory.append(memory)
        slot.moved = slot.moved or p.data_ptr() != address
        slot.weight = same_layout(p)
        if not machine.model.fused:
            slot.work.data = same_layout(p)
        if p.grad is not None and self.rng.random() < 0.5:
            p.grad = None
            slot.gradient = None
        machine.remember_addresses()

    def write(self) -> None:
        """Write to a weight from outside; between the halves the restore discards the write."""
        machine = self.machine
        index = self.rng.randrange(len(machine.parameters))
        p, slot = machine.parameters[index], machine.model.slots[index]
        with torch.no_grad():
            p.copy_(self.normal(p.shape, p.dtype))
        slot.weight = same_layout(p)

    # --- checkpoints and copies ---

    def state_dict(self) -> None:
        machine, model = self.machine, self.machine.model
        optimizer = machine.optimizer
        if self.is_open_at_the_weights() or self.refuses_midway(optimizer.state_dict, "state_dict"):
            return
        state = optimizer.state_dict()
        if self.rng.random() < 0.5:
            optimizer.load_state_dict(state)
            model.load(model.snapshot(), casts=True)
        if self.rng.random() < 0.5:
            machine.saved = copy.deepcopy(state), model.snapshot(), model.shape()
        if self.rng.random() < 0.3:
            twins = [nn.Parameter(p.detach().clone()) for p in machine.parameters]
            rest = iter(twins)
            groups = [{"params": [next(rest) for _ in range(n)]} for n in model.shape()]
            plain = self.kind.make(groups, **self.options)
            plain.load_state_dict(copy.deepcopy(state))  # torch's optimizer can load it
            for group, expected in zip(plain.param_groups, model.base.param_groups, strict=True):
                assert equal_options(group["lr"], expected["lr"])

    def load_state_dict(self) -> None:
        machine, model = self.machine, self.machine.model
        optimizer = machine.optimizer
        if self.refuses_midway(lambda: optimizer.load_state_dict({}), "load_state_dict"):
            return
        if machine.saved is None:
            return
        state, snapshot, shape = machine.saved
        if shape != model.shape():
            with pytest.raises(ValueError, match="group"):
                optimizer.load_state_dict(copy.deepcopy(state))
            return
        optimizer.load_state_dict(copy.deepcopy(state))
        model.load(snapshot, casts=True)

    def load_into_fresh(self) -> None:
        """Continue with another optimizer over the same parameters, with other settings."""
        machine, model = self.machine, self.machine.model
        if self.is_open_at_the_weights() or self.refuses_midway(
            machine.optimizer.state_dict, "state_dict"
        ):
            return
        state = copy.deepcopy(machine.optimizer.state_dict())
        groups = [{"params": list(group["params"])} for group in machine.optimizer.param_groups]
        other = {**self.sam_options, "rho": 0.7, "adaptive": False}
        fresh = SAM(groups, self.kind.make, **other, **{**self.options, "lr": 0.7})
        fresh.load_state_dict(state)
        model.load(model.snapshot(), casts=True)
        machine.optimizer = fresh
        machine.lr_schedule = None
        model.skipped = 0

    def deepcopy(self) -> None:
        self.copied(copy.deepcopy)

    def pickle(self) -> None:
        self.copied(lambda both: pickle.loads(pickle.dumps(both)))

    def copied(self, copied: Callable[[Any], Any]) -> None:
        machine = self.machine
        both = (machine.parameters, machine.optimizer)
        if self.refuses_midway(lambda: copied(both), "pickling or copying"):
            return
        parameters, optimizer = copied(both)
        fork = self.fork(parameters, optimizer)
        fork.verify()
        if len(self.machines) < 3:
            self.machines.append(fork)
        else:
            self.machines[self.machines.index(machine)] = fork
            self.machine = fork

    def add_param_group(self) -> None:
        machine, model = self.machine, self.machine.model
        if not self.kind.takes_groups_later:
            return
        made = [self.parameter() for _ in range(self.rng.randint(1, 2))]
        parameters = [p for p, _ in made]
        own = self.group_options()
        group = {"params": parameters, **own}
        group |= {name: model.settings[0][name] for name in POLICY}
        if self.refuses_midway(
            lambda: machine.optimizer.add_param_group(dict(group)), "add_param_group"
        ):
            return
        with pytest.raises(ValueError, match="rho"):
            machine.optimizer.add_param_group({**group, "rho": -1.0})
        target = self.rng.choice([machine.optimizer, machine.optimizer.base_optimizer])
        target.add_param_group(dict(group))
        # Copies and loads keep the defaults of the optimizer.
        found = machine.optimizer.param_groups[-1]
        model.add_group(parameters, {**own, **{key: found[key] for key in OWN}})
        for name in model.base.param_groups[-1]:
            if name not in ("params", "foreach", "fused"):
                model.set(len(model.settings) - 1, name, found[name])
        machine.parameters += parameters
        machine.memory += [memory for _, memory in made]
        machine.lr_schedule = None
        machine.remember_addresses()

    def is_open_at_the_weights(self) -> bool:
        """Save the state if the weights of an open step were returned; return whether they were."""
        machine = self.machine
        if not (machine.model.climbed and machine.model.returned):
            return False
        machine.saved = (
            copy.deepcopy(machine.optimizer.state_dict()),
            machine.model.snapshot(),
            machine.model.shape(),
        )
        return True

    def refuses_midway(self, call: Callable[[], Any], message: str) -> bool:
        return self.machine.model.climbed and self.refused(call, (RuntimeError, message))


BETWEEN = {
    "usual_step": 8,
    "asking_step": 8,
    "backward": 8,
    "accumulate": 2,
    "clip": 2,
    "zero_grad": 1,
    "sparse_gradient": 1,
    "first_step": 8,
    "scaled_first_step": 3,
    "second_step": 1,
    "scaled_second_step": 0.5,
    "step": 0.5,
    "closure_step": 6,
    "restore": 1,
    "change_settings": 4,
    "wrong_rho": 0.5,
    "differing_groups": 0.5,
    "schedule": 2,
    "schedule_rho": 0.5,
    "freeze": 1.5,
    "replace_storage": 1.5,
    "write": 1.5,
    "state_dict": 2,
    "load_state_dict": 1.5,
    "load_into_fresh": 1,
    "deepcopy": 1,
    "pickle": 1,
    "add_param_group": 1,
}
"""Actions before the first half of a step, with their frequencies."""

MIDWAY = {
    "fresh_second_step": 8,
    "backward": 2,
    "accumulate": 2,
    "clip": 1,
    "zero_grad": 1,
    "sparse_gradient": 0.5,
    "second_step": 4,
    "scaled_second_step": 3,
    "step": 2,
    "first_step": 0.5,
    "scaled_first_step": 0.3,
    "closure_step": 1,
    "restore": 2,
    "unperturbed": 1,
    "return_to_weights": 1,
    "change_settings": 1,
    "freeze": 0.5,
    "replace_storage": 0.5,
    "write": 0.5,
    "state_dict": 0.3,
    "load_state_dict": 0.3,
    "load_into_fresh": 0.2,
    "deepcopy": 0.2,
    "pickle": 0.2,
    "add_param_group": 0.2,
}
"""Actions between the halves."""


def run(seeds: range) -> None:
    for seed in seeds:
        Run(BASE_SEED + seed).go()


def test_random_calls_follow_the_contract():
    run(range(QUICK))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(FULL // PART))
def test_many_random_calls_follow_the_contract(part):
    run(range(part * PART, (part + 1) * PART))
