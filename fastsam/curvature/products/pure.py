"""A model's loss as a pure function of chosen parameters."""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastsam.curvature.losses import ModelLoss
from fastsam.curvature.products.differentiable import refuse_unreachable
from fastsam.curvature.products.second_order import TwiceDifferentiable
from fastsam.curvature.randomness import USER_CODE, Randomness, global_seed
from fastsam.curvature.structure import map_tensors, tensors_of

_RECOMPUTES = "the loss recomputes parts of its forward pass in the backward pass"
_WATCHED = 2
"""Evaluations without a random number after which a loss is assumed to draw none."""


class PureLoss:
    """The summed loss as a pure function of chosen parameters; it never modifies the model's tensors.

    Args:
        model_loss: the model and its loss.
        names: names of the chosen parameters, as in ``model.named_parameters()``.
        dtype: dtype to which all floating-point parameters, buffers and inputs are converted.

    Attributes:
        values: values of the chosen parameters.
        sizes: number of elements of each.
        dimension: n, the sum of the sizes.
        recomputes: whether a backward pass may run parts of the forward pass again, as activation
            checkpointing does; known after the first call.
    """

    def __init__(self, model_loss: ModelLoss, names: Sequence[str], *, dtype: torch.dtype) -> None:
        self.model_loss = model_loss
        self.names = tuple(names)
        self.dtype = dtype
        with USER_CODE:  # another run may have swapped its parameters into the model
            state = dict((*model_loss.named_parameters(), *model_loss.named_buffers()))
            self._places = Counter(id(tensor) for _, _, tensor in _entries(model_loss))
        self._originals = [state.pop(f"model.{name}") for name in names]
        # Copies, because a module may write to its buffers or, as nn.Embedding(max_norm=) does, to a
        # parameter.
        self.values = tuple(value.detach().to(dtype, copy=True) for value in self._originals)
        self._constants = {
            name: (value, self._convert(value.detach().clone())) for name, value in state.items()
        }
        self.device = self.values[0].device
        self.sizes = [value.numel() for value in self.values]
        self.dimension = sum(self.sizes)
        self._streams: Randomness | None = Randomness(global_seed())
        self._evaluations = 0
        self._inspected = False
        self._writes = False
        self.recomputes = False

    def __call__(self, parameters: Sequence[Tensor], batch: Any) -> tuple[Tensor, Tensor]:
        """Return (sum of losses, weight) of a batch on the run's device, at ``parameters``.

        Raises:
            ValueError: in the first call, if derivatives by a parameter would be missing.
        """
        if not self._inspected:
            return self._inspect(parameters, batch)
        with self._installed(parameters):
            loss, weight = self.model_loss(self._spare(batch))
        return loss, weight

    def _inspect(self, parameters: Sequence[Tensor], batch: Any) -> tuple[Tensor, Tensor]:
        """Evaluate the loss and find out how it can be evaluated again and differentiated."""
        self._writes = True  # for the first evaluation
        own = self._spare(batch)
        try:
            # Activation checkpointing and offloading set hooks for saved tensors.
            hooks = torch.autograd.graph.disable_saved_tensors_hooks(_RECOMPUTES)
            with hooks, self._installed(parameters):
                loss, weight = self.model_loss(own)
        except RuntimeError as error:
            if _RECOMPUTES not in str(error):
                raise
            self.recomputes = True
            own = self._spare(batch)
            with self._installed(parameters):
                loss, weight = self.model_loss(own)
        refuse_unreachable(loss, self._names_by_id())
        self._writes = any(tensor._version for tensor in tensors_of(own))
        self._inspected = True
        return loss, weight

    def _spare(self, arguments: Any) -> Any:
        """Return copies of the tensors if the model or the loss changes its arguments in place."""
        return map_tensors(torch.clone, arguments) if self._writes else arguments

    def call(
        self, method: str, parameters: Sequence[Tensor], *arguments: Any, **keywords: Any
    ) -> Any:
        """Call another method of the :class:`ModelLoss` at ``parameters``."""
        with self._installed(parameters):
            return getattr(self.model_loss, method)(*self._spare(arguments), **keywords)

    def gradient(
        self, batch: Any, leaves: Sequence[Tensor], *, differentiable: bool
    ) -> list[Tensor]:
        """Return the gradient of a batch's summed loss; see :meth:`derivative`."""
        return self.derivative(self(leaves, batch)[0], leaves, differentiable=differentiable)

    def derivative(
        self, total: Tensor, leaves: Sequence[Tensor], *, differentiable: bool
    ) -> list[Tensor]:
        """Return the gradient of a summed loss computed at ``leaves``, zeros for unused parameters.

        Raises:
            ValueError: the loss does not depend on any of the parameters, or a gradient is sparse.
        """
        if not total.requires_grad:
            raise ValueError(
                "the loss does not depend on the chosen parameters; check for detach() or no_grad in "
                "the model"
            )
        with self.backward_at(leaves):
            gradients = torch.autograd.grad(
                total,
                leaves,
                create_graph=differentiable,
                allow_unused=True,
                materialize_grads=True,
            )
        for name, gradient in zip(self.names, gradients, strict=True):
            if gradient.is_sparse:
                raise ValueError(
                    f"the gradient of {name} is sparse and cannot be differentiated again: construct "
                    "its nn.Embedding with sparse=False"
                )
        if differentiable:
            return list(gradients)
        # The gradient of a linear loss is a tensor of the graph itself, which it would keep alive.
        return [gradient.detach() for gradient in gradients]

    @contextmanager
    def backward_at(self, leaves: Sequence[Tensor]) -> Iterator[None]:
        """Context of a backward pass through a graph that was computed at ``leaves``.

        What the backward pass computes again must find the tensors of the forward pass.
        """
        if not self.recomputes:
            yield
            return
        with self._installed(leaves, streams=False):
            yield

    def place(self, batch: Any) -> Any:
        """Move ``batch`` to the run's device, and floating-point tensors to the run's dtype.

        Tensors that need no conversion become aliases, so that a loss that calls
        ``requires_grad_()`` on its inputs, as in physics-informed networks, does not change the
        caller's tensors.
        """

        def placed(tensor: Tensor) -> Tensor:
            # Autograd cannot save tensors made under torch.inference_mode().
            tensor = tensor.clone() if tensor.is_inference() else tensor
            converted = self._convert(tensor.detach().to(self.device))
            return converted.requires_grad_(tensor.requires_grad)

        return map_tensors(placed, batch)

    def leaves(self) -> tuple[Tensor, ...]:
        """Return differentiable aliases of the parameters' values."""
        return tuple(value.detach().requires_grad_() for value in self.values)

    def split(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Split a vector ``[..., n]`` into views of the parameters' shapes, with its leading dimensions."""
        pieces = torch.split(vector, self.sizes, dim=-1)
        lead = vector.shape[:-1]
        return tuple(
            piece.reshape(*lead, *value.shape)
            for piece, value in zip(pieces, self.values, strict=True)
        )

    def join(self, pieces: Iterable[Tensor], *, lead: int = 0) -> Tensor:
        """Invert :meth:`split`; ``lead`` is the number of leading dimensions."""
        return torch.cat([piece.reshape(*piece.shape[:lead], -1) for piece in pieces], dim=-1)

    def split_by_name(self, vector: Tensor) -> dict[str, Tensor]:
        """Split a vector ``[n]`` into tensors of the parameters' shapes, by their names."""
        return dict(zip(self.names, self.split(vector), strict=True))

    def join_by_name(self, pieces: Mapping[str, Tensor]) -> Tensor:
        """Join tensors of the parameters' shapes to a vector ``[n]``.

        Raises:
            ValueError: a name is missing or unknown, or a shape is wrong.
        """
        unknown = sorted(set(pieces) - set(self.names))
        if unknown:
            raise ValueError(f"no chosen parameter is named {unknown[0]!r}")
        found = []
        for name, value in zip(self.names, self.values, strict=True):
            if name not in pieces:
                raise ValueError(
                    f"there is no tensor for {name!r}; expected one for each parameter, by its name"
                )
            if pieces[name].shape != value.shape:
                raise ValueError(
                    f"the tensor for {name!r} has shape {tuple(pieces[name].shape)}, expected "
                    f"{tuple(value.shape)}"
                )
            found.append(pieces[name].to(value))
        return self.join(found)

    def with_constants(self, values: Mapping[str, Tensor]) -> PureLoss:
        """Return this loss with other values of parameters and buffers that are not chosen.

        Args:
            values: new values by name, as in ``model.state_dict()``; all others stay.
        """
        twin = copy.copy(self)
        twin._constants = dict(self._constants)
        for name, value in values.items():
            original, old = self._constants[f"model.{name}"]
            fresh = value.detach().to(device=old.device, dtype=old.dtype, copy=True)
            twin._constants[f"model.{name}"] = (original, fresh)
        return twin

    @property
    def constants(self) -> dict[str, Tensor]:
        """Values of the model's parameters and buffers that are not chosen, by name."""
        return {
            name.removeprefix("model."): value
            for name, (_, value) in self._constants.items()
            if name.startswith("model.")
        }

    def refuse_random(self, batch: Any, first: float) -> None:
        """Raise ValueError if a second evaluation of a placed batch differs from the first."""
        second = float(self(self.leaves(), batch)[0].detach())
        if abs(first - second) > 1e-5 * max(abs(first), abs(second)):
            raise ValueError(
                "the loss is random: two evaluations of the same batch in evaluation mode gave "
                f"{first} and {second}. Check for dropout that is always on (F.dropout without "
                "training=self.training)"
            )

    def checksum(self) -> str:
        """Return a hexadecimal checksum of the names and values of all parameters and buffers."""
        checksum = hashlib.blake2b(digest_size=16)
        chosen = zip(self.names, self.values, strict=True)
        others = ((name, value) for name, (_, value) in sorted(self._constants.items()))
        for name, value in (*chosen, *others):
            checksum.update(name.encode())
            checksum.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return checksum.hexdigest()

    def _names_by_id(self) -> dict[int, str]:
        """Return the names of the model's own parameters and buffers by the tensors' ``id``."""
        others = {id(own): name for name, (own, _) in self._constants.items()}
        names = {key: name.removeprefix("model.") for key, name in others.items()}
        return names | dict(zip(map(id, self._originals), self.names, strict=True))

    @contextmanager
    def _installed(self, parameters: Sequence[Tensor], *, streams: bool = True) -> Iterator[None]:
        """Swap ``parameters``, and copies of all other tensors, into the modules inside the context.

        Tensors are replaced by identity wherever they occur. ``torch.func.functional_call`` is not
        used, because it unties parameters of a module that is registered under two names.

        Args:
            parameters: values of the chosen parameters.
            streams: whether random numbers come from the run's streams.

        Raises:
            ValueError: a module no longer holds a tensor that it held at construction.
        """
        new = {id(old): value for old, value in self._constants.values()}
        new |= {id(old): value for old, value in zip(self._originals, parameters, strict=True)}
        undo: list[Callable[[], None]] = []
        with USER_CODE:
            try:
                places = list(_entries(self.model_loss))
                self._refuse_replaced(Counter(id(tensor) for _, _, tensor in places))
                for table, name, old in places:
                    if id(old) in new:
                        undo.append(partial(table.__setitem__, name, old))
                        table[name] = new[id(old)]
                random = self._random_numbers() if streams else nullcontext()
                with random, TwiceDifferentiable(self.device):
                    yield
            finally:
                for restore in reversed(undo):
                    restore()

    def _refuse_replaced(self, places: Counter[int]) -> None:
        replaced = self._places - places
        if replaced:
            name = self._names_by_id()[next(iter(replaced))]
            raise ValueError(
                f"{name!r} of the model is another tensor than when the operator was made, so the "
                "operator cannot put its own values there. Make a new operator, or change the model "
                "in place, as load_state_dict does without assign=True"
            )

    @contextmanager
    def _random_numbers(self) -> Iterator[None]:
        """Draw random numbers from the run's streams, until the loss is known to draw none."""
        streams = self._streams
        if streams is None:
            yield
            return
        with streams.active():
            yield
        self._evaluations += 1
        if self._evaluations >= _WATCHED and not streams.drawn:
            self._streams = None

    def _convert(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor


def _entries(model: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Yield every table of parameters or buffers that holds a tensor, the name in it, and the tensor."""
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            yield from ((table, name, value) for name, value in table.items() if value is not None)
