"""A model of SAM's contract, one tensor at a time, for the random runs of the state machine.

The model has its own weights, gradients and base optimizer. If fastsam fuses the update, torch's for-loop
optimizer runs on float64 copies of weights and state, and results may differ by rounding. Otherwise it runs
on copies of the same dtype and layout, and the bits must be equal. After every comparison the model adopts
the compared bits, so that errors do not accumulate over steps.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

POLICY = ("start", "interval", "stop")
"""Options that all groups share."""

OWN = ("rho", "adaptive", "eta", "stochastic_rounding", "perturb", *POLICY)
"""Options of a group that are SAM's; the others are the base optimizer's."""

Refusal = tuple[type[Exception], str]
"""The exception that a call must raise, and a pattern of its message."""


def same_layout(tensor: Tensor) -> Tensor:
    """Return a copy with the strides of ``tensor``, including gaps."""
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return made.copy_(tensor.detach())


def difference(found: Tensor, expected: Tensor) -> str | None:
    """Describe the first element whose bits differ, treating all NaN as equal; None if all agree."""
    found, expected = found.detach(), expected.detach()
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return f"{found.dtype} {list(found.shape)} is not {expected.dtype} {list(expected.shape)}"
    fine = (found == expected) & (found.signbit() == expected.signbit())
    fine |= found.isnan() & expected.isnan()
    if bool(fine.all()):
        return None
    at, right = float(found[~fine][0]), float(expected[~fine][0])
    return f"{int((~fine).sum())} of {found.numel()} bits differ: {at} is not {right}"


@dataclass
class Prediction:
    """Predicted values in float64, and the largest allowed differences."""

    value: Tensor
    allowed: Tensor

    def problem(self, found: Tensor) -> str | None:
        """Describe the first element that differs by more than allowed; None without one."""
        found = found.double()
        fine = (found == self.value) | ((found - self.value).abs() <= self.allowed)
        if bool(fine.all()):
            return None
        values = (found, self.value.expand_as(found), self.allowed.expand_as(found))
        at, right, allowed = (float(each[~fine][0]) for each in values)
        return f"{int((~fine).sum())} of {found.numel()} differ: {at} is not {right} +- {allowed}"


def predict(value: Tensor, dtype: torch.dtype, terms: float, *, units: float = 0.55) -> Prediction:
    """Predict a value with one rounding to ``dtype``, and arithmetic in float32 (or float64).

    Args:
        terms: largest magnitude among the terms of the sums behind ``value``.
        units: rounding to the storage type, in units in the last place.
    """
    info = torch.finfo(dtype)
    arithmetic = min(info.eps, torch.finfo(torch.float32).eps)
    allowed = units * info.eps * value.abs() + 8 * arithmetic * terms + info.tiny * info.eps
    return Prediction(value, allowed)


def largest(*tensors: Tensor | None) -> float:
    return max(
        (float(t.detach().double().abs().max()) for t in tensors if t is not None and t.numel()),
        default=0.0,
    )


@dataclass
class Slot:
    """A parameter of the model.

    Attributes:
        weight: current bits of the parameter.
        work: the copy that the model's base optimizer updates.
        backup: bits before the ascent, or None.
        left_out: frozen and without a gradient when the ascent began.
        prediction: expected value in the next comparison, instead of ``weight``.
    """

    weight: Tensor
    work: nn.Parameter
    gradient: Tensor | None = None
    backup: Tensor | None = None
    left_out: bool = False
    moved: bool = False
    prediction: Prediction | None = None
    state_predictions: dict[str, Prediction] = field(default_factory=dict)


Snapshot = tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]], int]


class Model:
    """SAM over copies of parameters.

    Args:
        groups: parameters and all options of each group.
        base: torch's class of the base optimizer.
        fused: whether fastsam fuses its update.
        options: constructor arguments of the base optimizer.
        check_finite: as in SAM.
    """

    def __init__(
        self,
        groups: Sequence[tuple[list[nn.Parameter], dict[str, Any]]],
        base: type[Optimizer],
        *,
        fused: bool,
        options: dict[str, Any],
        check_finite: bool,
    ) -> None:
        self.fused = fused
        self.check_finite = check_finite
        self.begun = False
        self.climbed = False
        self.returned = False
        self.decided: bool | None = None
        self.attempted = 0
        self.flagged = False
        self.norm = 0.0
        self.skipped = 0
        self.slots: list[Slot] = []
        self.settings: list[dict[str, Any]] = []
        loops = {"foreach": False, "fused": False} if fused else {"foreach": False}
        made = [self._slots_of(*group) for group in groups]
        self.base = base(made, **{**options, **loops})

    def add_group(self, parameters: list[nn.Parameter], options: dict[str, Any]) -> None:
        self.base.add_param_group(self._slots_of(parameters, options))

    def _slots_of(self, parameters: list[nn.Parameter], options: dict[str, Any]) -> dict[str, Any]:
        slots = [
            Slot(
                same_layout(p),
                nn.Parameter(p.detach().double() if self.fused else same_layout(p)),
                None if p.grad is None else same_layout(p.grad),
            )
            for p in parameters
        ]
        self.slots += slots
        self.settings.append({key: options[key] for key in OWN})
        rest = {key: value for key, value in options.items() if key not in OWN}
        return {"params": [slot.work for slot in slots], **rest}

    def members(self) -> Iterator[tuple[Slot, dict[str, Any], dict[str, Any]]]:
        """Yield every slot with the options of SAM and of the base optimizer in its group."""
        slots = iter(self.slots)
        for settings, group in zip(self.settings, self.base.param_groups, strict=True):
            for _ in group["params"]:
                yield next(slots), settings, group

    def set(self, group: int, name: str, value: Any) -> None:
        (self.settings if name in OWN else self.base.param_groups)[group][name] = value

    def zero_grad(self, *, set_to_none: bool = True) -> None:
        for slot in self.slots:
            if set_to_none:
                slot.gradient = None
            elif slot.gradient is not None:
                slot.gradient.zero_()

    # --- the ascent -----------------------------------------------------------------------------

    def is_due(self) -> bool:
        """Return whether the current step ascends, by an earlier decision or by the options."""
        if self.decided is not None:
            return self.decided
        start, interval, stop = (self.settings[0][name] for name in POLICY)
        due = range(start, self.attempted + 1 if stop is None else stop, interval)
        perturbs = any(own["perturb"] and float(own["rho"]) != 0 for own in self.settings)
        return self.attempted in due and perturbs

    def decide(self) -> bool:
        self.decided = self.is_due()
        return self.decided

    def refuses_climb(self) -> Refusal | None:
        if self.begun:
            return RuntimeError, "first_step\\(\\) was called twice"
        if all(slot.gradient is None for slot in self.slots):
            return RuntimeError, "no parameter has a gradient"
        if self.is_due() and not any(self.is_perturbed(*each) for each in self.members()):
            return RuntimeError, "only parameters of groups with perturb=False"
        return None

    @staticmethod
    def is_perturbed(slot: Slot, settings: dict[str, Any], group: dict[str, Any]) -> bool:
        """Return whether an ascent now would move the parameter."""
        return slot.gradient is not None and settings["perturb"]

    def climb(
        self, requires_grad: Sequence[bool], *, scale: float | None = None, found_inf: bool = False
    ) -> None:
        self.begun = True
        if not self.decide():
            return
        normalized = []
        squares = 0.0
        for slot, settings, group in self.members():
            t = self._normalization(slot.weight, settings)
            normalized.append(t)
            if self.is_perturbed(slot, settings, group):
                squares += float((t * slot.gradient.double() / (scale or 1.0)).square().sum())
        self.norm = squares**0.5
        is_finite = torch.tensor(self.norm).isfinite().item()
        # A scaler checks all gradients, but those of other parameters do not matter here.
        found_inf = found_inf and all(settings["perturb"] for settings in self.settings)
        self.flagged = found_inf or not is_finite
        self.climbed, self.returned = True, False
        for (slot, settings, group), t, trains in zip(
            self.members(), normalized, requires_grad, strict=True
        ):
            slot.left_out = slot.gradient is None and not trains
            slot.moved = False
            if not self.is_perturbed(slot, settings, group):
                continue
            slot.backup = slot.weight
            if not is_finite:
                continue
            step = t.square() * slot.gradient.double() / (scale or 1.0)
            step *= float(settings["rho"]) / (self.norm + 1e-12)
            slot.prediction = predict(
                slot.weight.double() + step,
                slot.weight.dtype,
                largest(slot.weight, step),
                units=1.05 if settings["stochastic_rounding"] else 0.55,
            )
            # The norm is summed in float32 within a pack.
            if any(other.weight.dtype is not torch.float64 for other in self.slots):
                slot.prediction.allowed += 1e-6 * step.abs()

    @staticmethod
    def _normalization(weight: Tensor, settings: dict[str, Any]) -> Tensor:
        adaptive = settings["adaptive"]
        if not adaptive or (adaptive == "weights" and weight.dim() < 2):
            return torch.ones_like(weight, dtype=torch.float64)
        eta = settings["eta"]
        if eta is None:
            eta = 0.01 if adaptive == "weights" else 0.0
        return weight.double().abs() + eta

    def return_to_weights(self) -> None:
        for slot in self.slots:
            if slot.backup is not None:
                slot.weight = slot.backup
            slot.backup = slot.prediction = None
        self.returned = True

    def restore(self) -> None:
        self.return_to_weights()
        self.begun = self.climbed = False
        self.decided = None

    # --- the descent ----------------------------------------------------------------------------

    def refuses_descend(self) -> Refusal | None:
        if not self.begun and self.decide():
            return RuntimeError, "first_step"
        if all(slot.gradient is None for slot in self.slots):
            return RuntimeError, "left no gradient" if self.begun else "no parameter has a gradient"
        if not self.climbed:
            return None
        if any(slot.moved and not slot.left_out for slot in self.slots):
            return RuntimeError, "storage of a parameter was replaced"
        if any(slot.left_out and slot.gradient is not None for slot in self.slots):
            return RuntimeError, "was frozen in first_step"
        return None

    def descend(self, *, scale: float | None = None, found_inf: bool | None = None) -> None:
        flagged = self.climbed and self.flagged
        if found_inf is not None:
            flagged |= found_inf
        elif self.check_finite:
            flagged |= not all(
                bool(slot.gradient.isfinite().all())
                for slot in self.slots
                if slot.gradient is not None
            )
        self.restore()
        self.attempted += 1
        if flagged:
            self.skipped += 1
            return
        before: dict[int, dict[str, Any]] = {}
        for index, slot in enumerate(self.slots):
            slot.work.grad = None
            if slot.gradient is None:
                continue
            if self.fused:
                slot.work.grad = slot.gradient.double() / (scale or 1.0)
            else:
                if scale is not None:
                    slot.gradient.div_(scale)
                slot.work.grad = slot.gradient
            before[index] = copy.deepcopy(self.base.state.get(slot.work, {}))
            slot.work.data.copy_(slot.weight)
        self.base.step()
        for index, (slot, _, group) in enumerate(self.members()):
            if index in before:
                if self.fused:
                    self._predict_update(slot, group, before[index])
                else:
                    slot.weight = same_layout(slot.work)

    def _predict_update(self, slot: Slot, group: dict[str, Any], before: dict[str, Any]) -> None:
        dtype = slot.weight.dtype
        weight, gradient = largest(slot.weight), largest(slot.work.grad)
        direction = gradient + float(group["weight_decay"]) * weight
        for name, value in self.base.state[slot.work].items():
            if value is None or name == "step":
                continue
            size = direction**2 if name.endswith("sq") else direction
            terms = size + largest(before.get(name))
            slot.state_predictions[name] = predict(value.clone(), dtype, terms)
        lr = float(group["lr"])
        if "momentum" in group:
            buffer = largest(
                self.base.state[slot.work].get("momentum_buffer"), before.get("momentum_buffer")
            )
            terms = weight + lr * (2 * direction + 2 * buffer)
        else:
            # m / sqrt(v) is at most about 30, and its rounding error about 100 times that of its terms.
            terms = weight * (1 + lr) + 100 * lr + largest(slot.work - slot.weight.double())
        slot.prediction = predict(slot.work.detach().clone(), dtype, terms)

    # --- comparison -----------------------------------------------------------------------------

    def compare_weight(self, slot: Slot, found: Tensor) -> str | None:
        """Describe what is wrong with ``found``; if nothing is, adopt its bits."""
        prediction, slot.prediction = slot.prediction, None
        if prediction is None:
            return difference(found, slot.weight)
        problem = prediction.problem(found)
        slot.weight = same_layout(found)
        return problem

    def compare_state(self, slot: Slot, found: dict[str, Any]) -> str | None:
        expected = self.base.state.get(slot.work, {})
        predictions, slot.state_predictions = slot.state_predictions, {}
        for name in found.keys() | expected.keys():
            value, other = found.get(name), expected.get(name)
            problem = None
            if other is None:  # before the first update, memory may exist and must be zero
                if value is not None and torch.as_tensor(value).any():
                    problem = f"{value} came out of nothing"
            elif value is None:
                problem = "is missing"
            elif name in predictions:
                problem = predictions[name].problem(value)
                other.copy_(value)
            elif isinstance(other, Tensor):
                problem = difference(value.to(other.dtype), other)
            elif value != other:
                problem = f"{value} is not {other}"
            if problem is not None:
                return f"state {name}: {problem}"
        return None

    # --- copies ---------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        return copy.deepcopy(
            (
                [dict(self.base.state.get(slot.work, {})) for slot in self.slots],
                [
                    {key: value for key, value in group.items() if key != "params"}
                    for group in self.base.param_groups
                ],
                self.settings,
                self.attempted,
            )
        )

    def load(self, snapshot: Snapshot, *, casts: bool) -> None:
        """Go back to ``snapshot``; with ``casts``, cast state as torch's ``load_state_dict`` does."""
        states, groups, settings, self.attempted = copy.deepcopy(snapshot)
        self.restore()
        if casts:
            for slot, state in zip(self.slots, states, strict=True):
                for name, value in state.items():
                    if isinstance(value, Tensor) and name != "step":
                        state[name] = value.to(slot.work.dtype)
        self.base.state.clear()
        for slot, state in zip(self.slots, states, strict=True):
            if state:
                self.base.state[slot.work] = state
        for group, saved in zip(self.base.param_groups, groups, strict=True):
            group.update(saved)
        self.settings = settings

    def shape(self) -> list[int]:
        return [len(group["params"]) for group in self.base.param_groups]
