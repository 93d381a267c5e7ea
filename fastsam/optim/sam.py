"""Sharpness-Aware Minimization whose norm, perturbation, restore and update are fused native kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import LBFGS, Optimizer

from fastsam.optim import sharding
from fastsam.optim.ascent import AscentStep
from fastsam.optim.closures import ClosurePasses
from fastsam.optim.native_step import NativeStep
from fastsam.optim.outer import Groups, OuterOptimizer
from fastsam.optim.passes import Need, Passes, run_passes
from fastsam.optim.settings import (
    Default,
    check_flag,
    check_given,
    check_group,
    refuse_clashes,
    value_of,
)
from fastsam.optim.untraced import untraced

_LEGACY_STATE = ("old_p", "e_w")
"""Copies of the weights that checkpoints of other SAM implementations carry; nobody needs them."""

_ACCUMULATE = (
    "; or run backward for every micro-batch, call first_step(zero_grad=True), run backward for every "
    "micro-batch again, and call second_step(zero_grad=True)"
)


class SAM(OuterOptimizer):
    """Wrap any base optimizer in SAM or ASAM, with the calls of the reference ``sam.py``.

    A step has two passes. ``first_step`` climbs from w to ``w + rho g / ||g||`` along the gradient of the
    first pass; ``second_step`` goes back to w, bit for bit, and lets the base optimizer use the gradient
    found at the top. ``torch.optim.SGD``, ``Adam`` and ``AdamW`` are updated in the same native pass that
    restores the weights; any other base optimizer runs its own ``step()`` after a native restore, at the
    price of one flag read by the host per step.

    Frozen parameters (``requires_grad`` False and no gradient) cost nothing and may be of any dtype; they
    may be frozen and unfrozen between steps.

    A gradient that is not finite, in either pass, restores the weights and skips the update.
    ``skipped_steps`` counts that on the device.

    Args:
        params: parameters or parameter groups; a group may have its own ``rho``, ``adaptive``, ``eta`` and
            ``stochastic_rounding``.
        base_optimizer: class of the optimizer that makes the descent step, such as ``torch.optim.SGD``, or
            any callable that makes it of ``params`` and ``**kwargs``, such as ``partial(SGD, lr=0.1)``.
        rho: radius of the perturbation, >= 0; a number or a scalar tensor, and free to change between
            steps through ``param_groups``. Default 0.05 (Foret et al. 2021, section 3.1).
        adaptive: False for SAM; True for ASAM with every weight normalised by ``|w|``; ``"weights"`` for
            ASAM as in its paper (Kwon et al. 2021): ``|w| + eta`` for weights, 1 for everything else.
            Weights are parameters with "weight" in their name where names are known (pass
            ``model.named_parameters()``), tensors of two or more dimensions otherwise.
        eta: ASAM's eta, added to ``|w|``. Default None: 0.01 for ``"weights"`` (Kwon et al. 2021, section
            5) and 0 otherwise.
        stochastic_rounding: round 16-bit weights in the ascent to one of their two neighbours, the nearer
            the likelier, so that a perturbation below their resolution is there on average. What is drawn
            depends on the step's gradient norm and the place of an element alone: equal on all replicas and
            in every repetition of a run. It makes no difference to wider weights, nor to the update, which
            rounds to nearest as torch's optimizers do.
        optimizer: a ready base optimizer, instead of ``params`` and ``base_optimizer``. Options that its
            groups have already stay; one that is given here is for groups without it, and must agree
            with them where there is no such group.
        check_finite: look for inf and NaN in the gradients of the second pass (4 of the 44 bytes per
            parameter that a step moves). Those of the first pass show in the norm at no cost.
        closure: what the closure of ``step(closure)`` does. ``"second_pass"`` (default): only the second
            forward and backward, the gradient of the first being there already. ``"both_passes"``, as in
            torch.optim: it is called for each pass and the loss of the first is returned. The gradients are
            set to None between the passes, and those that the last step left before the first.
        process_group: ranks that must skip together, for ranks that climb on their own gradients; the
            flag (4 bytes) is max-reduced over them before the update.
        **kwargs: arguments of the base optimizer.

    Raises:
        ValueError: an option is not what it must be, or one of the base optimizer is NaN; the base
            optimizer has an option of its own by the name of one of SAM's (Adadelta's ``rho``); an option
            that was given contradicts a group of ``optimizer``; a parameter is sharded by FSDP1; or
            ``ZeroRedundancyOptimizer`` constructs SAM over one rank's part of the parameters.
        TypeError: ``base_optimizer`` makes no optimizer, or one that needs a closure (LBFGS), or both ways
            of giving one were used.

    Example:
        >>> import torch
        >>> from fastsam import SAM
        >>> model = torch.nn.Linear(4, 2)
        >>> inputs, targets = torch.randn(8, 4), torch.randint(2, (8,))
        >>> loss_fn = torch.nn.CrossEntropyLoss()
        >>> optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
        >>> loss_fn(model(inputs), targets).backward()
        >>> optimizer.first_step(zero_grad=True)
        >>> loss_fn(model(inputs), targets).backward()
        >>> optimizer.second_step(zero_grad=True)
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any] | None = None,
        base_optimizer: Callable[..., Optimizer] | None = None,
        rho: float | Tensor | Default[float] = Default(0.05),
        adaptive: bool | Literal["weights"] | Default[bool] = Default(False),
        *,
        eta: float | Default[None] | None = Default(None),
        stochastic_rounding: bool | Default[bool] = Default(False),
        optimizer: Optimizer | None = None,
        check_finite: bool = True,
        closure: Literal["second_pass", "both_passes"] = "second_pass",
        process_group: ProcessGroup | None = None,
        **kwargs: Any,
    ) -> None:
        options: dict[str, Any] = {
            "rho": rho,
            "adaptive": adaptive,
            "eta": eta,
            "stochastic_rounding": stochastic_rounding,
        }
        own = {name: value_of(option) for name, option in options.items()}
        sharding.refuse_zero_redundancy()
        check_group(own)
        check_flag("check_finite", check_finite)
        if closure not in ("second_pass", "both_passes"):
            raise ValueError(f"closure must be 'second_pass' or 'both_passes', got {closure!r}")
        if optimizer is None:
            if params is None or base_optimizer is None:
                raise TypeError("SAM needs params and base_optimizer, or optimizer=")
            optimizer = _made(base_optimizer, params, own, kwargs)
            options = {}  # are the defaults of groups that have none of their own
        else:
            if not isinstance(optimizer, Optimizer):
                raise TypeError(
                    f"optimizer= takes a ready optimizer, got {optimizer!r}; a class is passed as "
                    "SAM(params, base_optimizer)"
                )
            if params is not None or base_optimizer is not None or kwargs:
                raise TypeError(
                    "pass either optimizer= (a ready base optimizer, which has its parameters and "
                    "settings already) or params and base_optimizer, not both"
                )
        _refuse_lbfgs(type(optimizer))
        refuse_clashes("SAM", own, optimizer)
        check_given(options, optimizer.param_groups)
        for group in optimizer.param_groups:
            check_group(group)
            for parameter in group["params"]:
                sharding.refuse_flattened(parameter)
        # Nothing was refused: from here on things change.
        super().__init__(optimizer, own)
        self.check_finite = check_finite
        self.closure = closure
        self.process_group = process_group
        self._begin()

    def _begin(self) -> None:
        """Make what neither a copy nor a file has."""
        self.native = NativeStep(self.base_optimizer, self.options)
        self._closure_passes = ClosurePasses(type(self).__name__, _ACCUMULATE, needs_loss=False)
        self._ascent: AscentStep | None = None

    # --- what a user calls ----------------------------------------------------------------------

    @untraced
    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Climbs to ``w + T_w^2 rho g / ||T_w g||`` along the gradients that the parameters have now.

        Parameters without a gradient stay.

        Args:
            zero_grad: clear the gradients afterwards.

        Raises:
            RuntimeError: the last ascent was neither finished nor restored, or no parameter has a gradient
                on this rank.
            ValueError: a gradient does not fit its parameter (sparse, other dtype or device), or a rho
                is negative or not finite. Nothing was changed.
        """
        self._climb()
        if zero_grad:
            self.zero_grad()

    def second_step(self, zero_grad: bool = False) -> None:
        """Returns to w and makes the base optimizer's update with the gradients found at the top.

        Args:
            zero_grad: clear the gradients afterwards.

        Raises:
            RuntimeError: there was no ``first_step``, or since then a parameter's storage was replaced or
                a frozen parameter was given a gradient; or no parameter has a gradient.
            ValueError: a gradient does not fit its parameter. The weights are still perturbed then, as
                where there is no gradient: make it good and call again, or give the step up with
                ``restore()``.
        """
        if not self.native.climbed:
            raise RuntimeError(
                "second_step() needs a first_step() before it: the gradients must be those of the "
                "perturbed weights"
            )
        self._hooked_descend()
        if zero_grad:
            self.zero_grad()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Finish a step that ``first_step`` began; or, with a closure, make everything from the gradient on.

        Between ``first_step`` and ``second_step`` the closure is the second pass. It may also do nothing
        where that pass was made already; gradients that are there stay.

        Args:
            closure: makes the second forward and backward pass and returns the loss; it is run with
                gradients enabled. See the constructor's ``closure`` for one that makes both passes.

        Returns:
            None without a closure, else the loss that the closure returned (that of the first pass where
            it makes both). Whatever the closure raises, the weights are back at w. A closure for both
            passes that returns None and leaves no gradient skips the batch: nothing changes.

        Raises:
            RuntimeError: no closure was given and there was no ``first_step``; a closure for the
                second pass was given and there is no gradient of the first; a closure for both passes did
                not clear the gradients; or the second pass left no gradient. The weights are at w.
        """
        if closure is None:
            return self._finish_or_initialise()
        try:
            return self._step_with(closure)
        except BaseException:
            self.restore()
            raise

    def _step_with(self, closure: Callable[[], Any]) -> Any:
        if self.native.climbed:
            loss = _with_gradients(closure)
            self._descend()
            return loss
        passes = self._passes(self._descend)
        if self.closure == "both_passes":
            return self._closure_passes.run(passes, closure, self._parameters())[0]
        self._require_a_first_pass()
        next(passes)  # its gradient is there
        return run_passes(passes, lambda _: _with_gradients(closure))[0]

    def passes(self) -> Passes:
        """Return one step as a generator of the gradients it needs.

        It asks for the gradient at w and then for the one at the top, between ``first_step`` and ``step``,
        which clear nothing afterwards. Hooks of ``step`` fire around the update. A first pass that is
        answered with None and leaves no gradient skips the step.

        Example:
            >>> import torch
            >>> from fastsam import SAM
            >>> weight = torch.nn.Parameter(torch.ones(2))
            >>> optimizer = SAM([weight], torch.optim.SGD, lr=0.25, rho=0.0)
            >>> for need in optimizer.passes():
            ...     optimizer.zero_grad()
            ...     weight.square().sum().backward()
            >>> weight.detach()
            tensor([0.5000, 0.5000])
        """
        return self._passes(self.step)

    def _passes(self, descend: Callable[[], Any]) -> Passes:
        loss = yield Need()
        if loss is None and all(p.grad is None for p in self._parameters()):
            return  # a closure leaves this batch out, as Lightning's does without a loss
        try:
            self.first_step(zero_grad=True)
            yield Need()
            descend()
        finally:
            self.restore()

    @untraced
    @torch.no_grad()
    def restore(self) -> None:
        """Gives up a step between its two halves: the weights are back at w, bit for bit.

        Safe to call at any time; without a perturbation it does nothing.
        """
        if self.native.climbed:
            self.native.restore()

    @property
    def skipped_steps(self) -> Tensor:
        """Updates skipped because a gradient was not finite: int64 scalar on the parameters' device.

        Reading its value on the host waits for the device; nothing in a step does.
        """
        return self.native.skipped_steps

    @property
    def ascent_norm(self) -> Tensor:
        """``||T_w g||`` of the last ascent over all groups: float64 scalar on the parameters' device.

        For SAM the 2-norm of the gradients of the first pass as ``first_step`` found them, clipped or not,
        without a scaler's loss scale; for ASAM each is multiplied by ``|w| + eta`` first. Where parameters
        are sharded it is that of all ranks. It comes from the ascent itself, so that nothing is read again
        and nothing waits; not finite where the step was skipped for its first gradient, and 0 before the
        first ascent and after a state dict was loaded.
        """
        return self.native.ascent_norm

    @property
    def unchanged_share(self) -> Tensor:
        """Share of the elements of 16-bit weights that the last ascent was too small to change.

        A float32 scalar on the parameters' device, 0 without 16-bit weights; of this rank's part where
        parameters are sharded. Above one half a warning is given, once, some steps later on CUDA because
        nothing waits for the device.
        """
        return self.native.unchanged_share

    @property
    def ascent(self) -> AscentStep:
        """An optimizer over the same parameters whose ``step()`` is this one's ``first_step()``.

        For ``torch.amp.GradScaler``, which checks an optimizer once per update: call
        ``scaler.step(optimizer.ascent)`` after the first backward pass, ``scaler.step(optimizer)`` after
        the second, and then one ``scaler.update()``.
        """
        if self._ascent is None:
            self._ascent = AscentStep(self, self._climb)
        return self._ascent

    @property
    def skips_nonfinite_steps(self) -> bool:
        """Whether a step with an infinite or NaN gradient leaves the weights as they were.

        False with ``check_finite=False``, where the gradients of the second pass are not looked at.
        """
        return self.check_finite

    # --- what torch calls -----------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group; it may have its own rho, adaptive, eta and stochastic_rounding."""
        self._refuse_midway("add_param_group()")
        check_group(param_group)
        super().add_param_group(param_group)

    def _replace_groups(self, groups: Groups) -> None:
        self._refuse_midway("assigning param_groups")
        for group in groups:
            check_group(group)
        super()._replace_groups(groups)

    def state_dict(self) -> dict[str, Any]:
        """State dict of the base optimizer, SAM's settings in its groups, without any copy of the weights."""
        self._refuse_midway("state_dict()")
        return super().state_dict()

    def _pack(self) -> dict[str, Any]:
        packed = super()._pack()
        for index, names in self._unstarted().items():
            if index in packed["state"]:
                packed["state"][index] = {**packed["state"][index], **dict.fromkeys(names)}
        return packed

    def _unstarted(self) -> dict[int, tuple[str, ...]]:
        """State, by place and names, that no update has reached: torch's first update must find none.

        It copies the gradient where there is no momentum buffer, and dampens it where there is one.
        """
        unstarted = self.native.unstarted()
        return {
            index: unstarted[id(p)]
            for index, p in enumerate(self._parameters())
            if id(p) in unstarted
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class, of the reference implementation, or of the base optimizer.

        Copies of weights in old checkpoints are dropped, and what they lack is filled from the current
        groups; the rest is the base optimizer's ``load_state_dict``.

        Raises:
            RuntimeError: called between ``first_step`` and ``second_step``.
            ValueError: the groups do not match, or a setting in them is not one.
        """
        self._refuse_midway("load_state_dict()")
        super().load_state_dict(state_dict)

    def _unpack(self, state_dict: dict[str, Any]) -> None:
        state = {
            index: {key: value for key, value in entry.items() if key not in _LEGACY_STATE}
            for index, entry in state_dict["state"].items()
        }
        groups = [
            {**{key: value for key, value in current.items() if key != "params"}, **saved}
            for saved, current in zip(state_dict["param_groups"], self.param_groups, strict=False)
        ]
        groups += state_dict["param_groups"][len(groups) :]
        for group in groups:
            check_group(group)
        super()._unpack(
            {
                **state_dict,
                "state": {index: entry for index, entry in state.items() if entry},
                "param_groups": groups,
            }
        )
        self.native.forget()

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_midway("pickling or copying")
        state = super().__getstate__()
        del state["native"]
        state["process_group"] = self.process_group and _Handle(self.process_group)
        return {**state, "unstarted": self._unstarted()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = state.copy()
        unstarted = state.pop("unstarted")
        handle = state["process_group"]
        super().__setstate__({**state, "process_group": handle.group if handle else None})
        self._begin()
        parameters = self._parameters()
        for index, names in unstarted.items():
            self.state[parameters[index]].update(dict.fromkeys(names))

    # --- the two halves -------------------------------------------------------------------------

    def _climb(self, *, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        if self.native.climbed:
            raise RuntimeError(
                "first_step() was called twice: finish the step with second_step(), or give it up "
                "with restore()"
            )
        if self.process_group is not None and any(
            sharding.is_sharded(p) for group in self.param_groups for p in group["params"]
        ):
            raise ValueError(
                "process_group= is for ranks that climb on their own gradients, which needs whole "
                "parameters on every rank; with DTensor parameters (FSDP2, tensor parallel) leave "
                "it out: their norm is that of all ranks"
            )
        self.native.climb(grad_scale=grad_scale, found_inf=found_inf)

    @untraced
    def _require_a_first_pass(self) -> None:
        """A closure for both passes, given where one for the second is meant, would switch SAM off."""
        if all(p.grad is None for p in self._parameters()):
            raise RuntimeError(
                "step(closure) makes the second pass and found no gradient of the first: run the first "
                "forward and backward pass before it, or, for a closure that makes both passes as in "
                'torch.optim, construct SAM(..., closure="both_passes")'
            )

    def _require_a_second_pass(self) -> None:
        if self.native.moved_any() and all(p.grad is None for p in self._parameters()):
            raise RuntimeError(
                "the second pass left no gradient: after first_step(zero_grad=True), run forward and "
                "backward at the perturbed weights, then call second_step(). In Lightning's manual "
                "optimization step() alone makes no pass: call first_step(zero_grad=True), "
                "manual_backward(loss), then second_step()"
            )

    @untraced
    @torch.no_grad()
    def _descend(self) -> None:
        self._require_a_second_pass()
        self.native.descend(
            check_finite=self.check_finite,
            process_group=self.process_group,
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
        )

    # Hooks are those of step(), which second_step() may not call: a wrapper has another.
    _hooked_descend = Optimizer.profile_hook_step(_descend)

    @untraced
    def step_without_ascent(self) -> None:
        """Make the base optimizer's update with the gradients there are, skipped if one is not finite."""
        self._refuse_midway("step_without_ascent()")
        self.native.stay()
        self._hooked_descend()

    @untraced
    def _finish_or_initialise(self) -> None:
        if self.native.climbed:
            self._descend()
            return
        if self._is_blank():
            self.base_optimizer.step()
            return
        raise RuntimeError(
            "step() without a closure is the second half of a step and needs first_step() before it; "
            "call first_step(), run a second forward and backward pass, then second_step()"
        )

    def _is_blank(self) -> bool:
        """Whether a step would only create state: how torch.distributed.checkpoint fills a new optimizer."""
        gradients = [p.grad for p in self._parameters()]
        present = [sharding.local(gradient) for gradient in gradients if gradient is not None]
        return (
            not self.state
            and all(float(group.get("lr", 0.0)) == 0.0 for group in self.param_groups)
            and bool(present)
            and not any(bool(gradient.any()) for gradient in present)
        )

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _refuse_midway(self, what: str) -> None:
        if self.native.climbed:
            raise RuntimeError(
                f"{what} between first_step() and second_step(): the weights are perturbed. Finish the "
                "step, or give it up with restore(), first"
            )


def _made(
    base_optimizer: Callable[..., Any],
    params: Iterable[Any],
    own: Iterable[str],
    kwargs: dict[str, Any],
) -> Optimizer:
    """The base optimizer that a class, or another callable, makes of ``params``."""
    if not callable(base_optimizer) or (
        isinstance(base_optimizer, type) and not issubclass(base_optimizer, Optimizer)
    ):
        raise TypeError(
            f"base_optimizer must be an optimizer class such as torch.optim.SGD, or a callable that makes an "
            f"optimizer of the parameters, got {base_optimizer!r}; pass a ready instance as "
            "SAM(optimizer=...)"
        )
    # Before it is called: an optimizer writes its defaults into the dicts of the groups it is given.
    _refuse_lbfgs(base_optimizer)
    refuse_clashes("SAM", own, base_optimizer)
    optimizer = base_optimizer(params, **kwargs)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"base_optimizer must make a torch.optim.Optimizer of the parameters, got {optimizer!r} of "
            f"{base_optimizer!r}"
        )
    return optimizer


def _refuse_lbfgs(made_by: Callable[..., Any]) -> None:
    if isinstance(made_by, type) and issubclass(made_by, LBFGS):
        raise TypeError(
            "LBFGS evaluates the loss as often as it likes within one step() and needs a closure for it; "
            "SAM makes two evaluations a step: choose an optimizer whose step() needs no closure"
        )


def _with_gradients(closure: Callable[[], Any]) -> Any:
    with torch.enable_grad():
        return closure()


class _Handle:
    """A process group on its way through a copy: the copy has the same one, and no file can have it."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> _Handle:
        return self

    def __reduce__(self) -> str:
        raise TypeError(
            "an optimizer with process_group= cannot be pickled, because the group belongs to this "
            "process; save its state_dict() instead"
        )
