"""Look at and leave the perturbed weights between the two halves of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from fastsam.optim._engine import sharding
from fastsam.optim._engine.kernel_optimizer import KernelOptimizer
from fastsam.optim._engine.native_step import NativeStep
from fastsam.optim._engine.untraced import untraced


class BetweenHalves(KernelOptimizer):
    """An optimizer that shows both sides of its perturbation, and can step back from it and return."""

    @property
    def unperturbed_weights(self) -> Mapping[Tensor, Tensor]:
        """The weights before the ascent, by parameter, of all parameters that are perturbed now.

        A read-only mapping. Each lookup copies one tensor, so that no write can reach what ``second_step``
        restores. Empty where no weight is perturbed: before ``first_step``, after ``second_step``,
        ``restore`` and ``return_to_weights``. Parameters that the ascent leaves where they are, without a
        gradient or in a group with ``perturb=False``, are not in it. Of a DTensor parameter it is a DTensor.

        Example:
            >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
            >>> from fastsam import SAM
            >>> optimizer = SAM([weight], torch.optim.SGD, rho=0.5, lr=0.1)
            >>> weight.grad = torch.tensor([0.0, 2.0])
            >>> optimizer.first_step()
            >>> optimizer.unperturbed_weights[weight]
            tensor([3., 4.])
            >>> optimizer.perturbation[weight]
            tensor([0.0000, 0.5000])
        """
        return _ByParameter(self.native_step, _unperturbed)

    @property
    def perturbation(self) -> Mapping[Tensor, Tensor]:
        """How far the weights are from those before the ascent, by parameter.

        As :attr:`unperturbed_weights`; each lookup computes the difference of one parameter. It has the dtype
        of the weights, float32 for 16-bit weights, and contains what rounding did to the ascent.
        """
        return _ByParameter(self.native_step, _difference)

    @contextmanager
    def unperturbed(self) -> Iterator[None]:
        """Restore the weights inside the context, and perturb them again after it, bit for bit.

        For an evaluation or a copy of the weights between the halves; it needs no memory. Without a
        perturbation it does nothing, so that it may be used anywhere. The weights are perturbed again when
        the body raises, too. ``restore()`` and ``return_to_weights()`` inside leave them restored. A change
        of the weights inside lasts: the step goes back to the changed weights.

        A backward pass through a graph from before the context raises autograd's error about a modified
        variable: run it before.

        Raises:
            RuntimeError: the storage of a parameter was replaced since ``first_step``. If that happened
                inside the context, the step is given up with the weights restored.
        """
        step = self.native_step
        if step.exchanged or not step.climbed:
            yield
            return
        self._exchange()
        try:
            yield
        finally:
            self._exchange_back()

    @untraced
    @torch.no_grad()
    def return_to_weights(self) -> None:
        """Restore the weights bit for bit, and keep the gradients and the open step.

        ``step()`` or ``second_step()`` then updates with the gradients that are there, those of the perturbed
        weights or others: methods that combine gradients of both places compute more of them first. A
        gradient of the first pass that was not finite still skips the update. Without a perturbation it does
        nothing.
        """
        if self.native_step.climbed:
            self.native_step.return_to_weights()

    @untraced
    @torch.no_grad()
    def _exchange(self) -> None:
        self.native_step.exchange()

    @untraced
    @torch.no_grad()
    def _exchange_back(self) -> None:
        if not self.native_step.exchanged:
            return  # restored meanwhile
        try:
            self.native_step.exchange()
        except RuntimeError as error:
            self.restore()
            raise RuntimeError(
                "the storage of a parameter was replaced inside unperturbed() (p.data = ... or "
                "model.to(...)): the weights stay restored and the step was given up; begin it again"
            ) from error


class _ByParameter(Mapping[Tensor, Tensor]):
    """A value for each parameter that is perturbed now, computed when it is looked up.

    Args:
        step: holds weights and backups.
        value: makes it of a parameter's restored and perturbed local parts.
    """

    def __init__(self, step: NativeStep, value: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._step = step
        self._value = value
        self._ascent = step.ascent
        self._backups = dict(step.backups())

    @torch.no_grad()
    def __getitem__(self, parameter: Tensor) -> Tensor:
        backup = self._backups[parameter]
        if self._step.ascent is not self._ascent:
            raise RuntimeError(
                "this mapping belongs to an ascent that is over: read the optimizer's attribute between "
                "first_step() and second_step() of the present step"
            )
        weight = sharding.local(parameter).detach()
        part = self._value(*((weight, backup) if self._step.exchanged else (backup, weight)))
        return sharding.wrap_like(parameter, part) if sharding.is_sharded(parameter) else part

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._backups)

    def __len__(self) -> int:
        return len(self._backups)


def _unperturbed(restored: Tensor, perturbed: Tensor) -> Tensor:
    return restored.clone()


def _difference(restored: Tensor, perturbed: Tensor) -> Tensor:
    if restored.element_size() == 2:
        return perturbed.float() - restored.float()
    return perturbed - restored
