"""Access to the original and the perturbed weights between the two halves of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from fastsam.distributed import is_sharded, local_part
from fastsam.optim._engine import sharding
from fastsam.optim._engine.kernel_optimizer import KernelOptimizer
from fastsam.optim._engine.native_step import NativeStep
from fastsam.optim._engine.untraced import untraced


class BetweenHalves(KernelOptimizer):
    """An optimizer whose perturbation can be read, undone temporarily, or undone within an open step."""

    @property
    def unperturbed_weights(self) -> Mapping[Tensor, Tensor]:
        """The weights before the ascent, as a read-only mapping from each perturbed parameter.

        Each lookup returns a copy, so that writes cannot change what ``second_step`` restores. The mapping is
        empty while no weight is perturbed: before ``first_step``, and after ``second_step``, ``restore`` and
        ``return_to_weights``. It excludes parameters that the ascent did not move, which are those without a
        gradient or in a group with ``perturb=False``. The value for a DTensor parameter is a DTensor.

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
        """The perturbed minus the original weights, as a read-only mapping from each perturbed parameter.

        It has the keys of :attr:`unperturbed_weights`. Each lookup computes one difference, in the dtype of
        the weights or float32 for 16-bit weights. It includes the rounding of the ascent.
        """
        return _ByParameter(self.native_step, _difference)

    @contextmanager
    def unperturbed(self) -> Iterator[None]:
        """Restore the weights inside the context and perturb them again on exit, bit for bit.

        Use it to evaluate or copy the weights between the halves of a step. It needs no extra memory, and
        does nothing if the weights are not perturbed. They are perturbed again even if the body raises,
        unless ``restore()`` or ``return_to_weights()`` was called inside. Changes made to the weights inside
        the context are kept: the step later restores the changed weights.

        Run backward passes through graphs from before the context outside of it; inside, autograd raises its
        error about a modified variable.

        Raises:
            RuntimeError: the storage of a parameter was replaced since ``first_step``. If that happened
                inside the context, the step is abandoned with the weights restored.
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

        ``step()`` or ``second_step()`` then updates with the current gradients. Methods that combine
        gradients at the original and the perturbed weights can compute more of them in between. A first pass
        with gradients that are not finite still skips the update. ``state_dict()`` is possible again; it does
        not contain the open step. Does nothing if no weight is perturbed.
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
            return  # restore() or return_to_weights() was called inside
        try:
            self.native_step.exchange()
        except RuntimeError as error:
            self.restore()
            raise RuntimeError(
                "the storage of a parameter was replaced inside unperturbed() (p.data = ... or "
                "model.to(...)): the step was abandoned with the weights restored; repeat it"
            ) from error


class _ByParameter(Mapping[Tensor, Tensor]):
    """A mapping from each perturbed parameter to a value that each lookup computes.

    Args:
        step: the step with weights and backups.
        value: computes the value from the original and the perturbed local part of a parameter.
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
                "this mapping belongs to an earlier ascent: read the optimizer's attribute again between "
                "first_step() and second_step() of the current step"
            )
        weight = local_part(parameter).detach()
        part = self._value(*((weight, backup) if self._step.exchanged else (backup, weight)))
        return sharding.wrap_like(parameter, part) if is_sharded(parameter) else part

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
