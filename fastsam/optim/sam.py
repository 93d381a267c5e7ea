"""Sharpness-Aware Minimization with a fused native norm, perturbation, restore and update."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from fastsam.optim._engine import sharding
from fastsam.optim._engine.ascent import AscentStep, drop_loss_scale
from fastsam.optim._engine.base_optimizer import resolve_base
from fastsam.optim._engine.between_halves import BetweenHalves
from fastsam.optim._engine.closures import ClosurePasses
from fastsam.optim._engine.policy import COUNTER, agreed_steps
from fastsam.optim._engine.settings import check_flag, check_group, check_number, refuse_clashes
from fastsam.optim._engine.untraced import untraced
from fastsam.optim.passes import Need, Passes, run_passes

_ACCUMULATE = (
    "; or run backward for every micro-batch, call first_step(zero_grad=True), run backward for every "
    "micro-batch again, and call second_step(zero_grad=True)"
)


class SAM(BetweenHalves):
    """Wraps any base optimizer in SAM or ASAM, with the interface of the reference ``sam.py``.

    A step has two passes. ``first_step`` moves the weights from w to ``w + rho g / ||g||`` along the gradient
    of the first pass. ``second_step`` restores w bit for bit and makes the base optimizer's update with the
    gradient computed at the perturbed weights. For ``torch.optim.SGD``, ``Adam`` and ``AdamW`` one native
    pass restores and updates. Any other base optimizer runs its own ``step()`` after a native restore, which
    costs one host synchronization per step.

    Not every step needs an ascent. One is due at attempted step n where ``start <= n < stop``,
    ``(n - start) % interval == 0`` and a perturbed group has a nonzero rho; read it from ``ascent_due``. The
    other steps are the base optimizer's update, with one pass and no backup of the weights. Code that always
    makes two passes stays correct: in those steps ``first_step`` changes nothing.

    Frozen parameters (``requires_grad`` False and no gradient) need no backup and may have any dtype. Freeze
    and unfreeze parameters between steps only.

    If a gradient of either pass is not finite, the weights are restored and the update is skipped.
    ``skipped_steps`` counts these steps on the device.

    Args:
        params: parameters or parameter groups; a group may have its own ``rho``, ``adaptive``, ``eta`` and
            ``stochastic_rounding``. A group with ``perturb=False`` is excluded from the ascent but updated
            like the others; see :func:`fastsam.optim.perturb_only`.
        base_optimizer: optimizer class for the update, such as ``torch.optim.SGD``, or any callable that
            returns an optimizer for ``(params, **kwargs)``, such as ``partial(SGD, lr=0.1)``.
        rho: radius of the perturbation, >= 0; a number or a scalar tensor. It may be changed between steps
            in ``param_groups``. Default 0.05 (Foret et al. 2021, section 3.1).
        adaptive: False for SAM; True for ASAM with every weight normalized by ``|w|``; ``"weights"`` for
            ASAM as in its paper (Kwon et al. 2021): ``|w| + eta`` for weights, 1 for everything else.
            Weights are the parameters with "weight" in their name if names are known (pass
            ``model.named_parameters()``), and tensors of two or more dimensions otherwise.
        eta: ASAM's eta, added to ``|w|``. Default None: 0.01 for ``"weights"`` (Kwon et al. 2021, section
            5) and 0 otherwise.
        stochastic_rounding: in the ascent, round 16-bit weights to one of their two neighbors, the nearer
            one with the higher probability, so that perturbations below their resolution are right on
            average. The rounding depends only on the step's gradient norm and the position of the element:
            all replicas and repeated runs round alike. Wider weights are not affected, and the update always
            rounds to nearest, as torch's optimizers do.
        optimizer: an existing base optimizer, instead of ``params`` and ``base_optimizer``. Values already
            set in its parameter groups win. Arguments fill in missing values.
        start: first attempted step with an ascent, counted from 0; the same in all groups. Default 0: SAM
            from the beginning (Foret et al. 2021). The last part of a run may suffice (Zhou et al. 2025).
        interval: number of steps from one ascent to the next. Default 1: every step.
        stop: attempted step from which on no ascent is due; None for no limit.
        first_attempt: number of attempted steps before this optimizer's first, made without SAM.
        check_finite: check the gradients of the second pass for inf and NaN (4 of the 44 bytes per parameter
            that a step moves). The norm reveals those of the first pass at no cost.
        closure: what the closure of ``step(closure)`` does. ``"second_pass"`` (default): it makes the second
            forward and backward pass; the gradients of the first must exist. ``"both_passes"``, as in
            torch.optim: SAM calls it once per pass and returns the loss of the first. SAM sets the gradients
            to None between the passes, and before the first pass those left by the previous step.
        process_group: ranks that must skip updates together, for ranks that ascend on their own gradients.
            The skip flag (4 bytes) is max-reduced over them before the update. Ranks that train models of
            their own pass a group of one rank, ``new_group([rank], use_local_synchronization=True)``.
        **kwargs: arguments of the base optimizer.

    Raises:
        ValueError: an option is invalid, or an option of the base optimizer is NaN; groups differ in start,
            interval or stop, or all have ``perturb=False``; an option of the base optimizer has the same name
            as one of SAM's (Adadelta's ``rho``); a parameter is sharded by FSDP1; or
            ``ZeroRedundancyOptimizer`` constructs SAM over one rank's part of the parameters.
        TypeError: the base is not an optimizer, is a wrapper such as SAM, or needs a closure (LBFGS); or both
            ``base_optimizer`` and ``optimizer`` were passed, or neither.

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
        rho: float | Tensor = 0.05,
        adaptive: bool | Literal["weights"] = False,
        *,
        eta: float | None = None,
        stochastic_rounding: bool = False,
        start: int = 0,
        interval: int = 1,
        stop: int | None = None,
        first_attempt: int = 0,
        optimizer: Optimizer | None = None,
        check_finite: bool = True,
        closure: Literal["second_pass", "both_passes"] = "second_pass",
        process_group: ProcessGroup | None = None,
        **kwargs: Any,
    ) -> None:
        own: dict[str, Any] = {
            "rho": rho,
            "adaptive": adaptive,
            "eta": eta,
            "stochastic_rounding": stochastic_rounding,
            "perturb": True,
            "start": start,
            "interval": interval,
            "stop": stop,
            COUNTER: first_attempt,
        }
        sharding.refuse_zero_redundancy()
        check_group(own)
        agreed_steps([own])
        check_number("first_attempt", first_attempt, whole=True)
        check_flag("check_finite", check_finite)
        if closure not in ("second_pass", "both_passes"):
            raise ValueError(f"closure must be 'second_pass' or 'both_passes', got {closure!r}")
        optimizer = resolve_base("SAM", params, base_optimizer, optimizer, kwargs)
        refuse_clashes("SAM", own, optimizer)
        for group in optimizer.param_groups:
            check_group(group)
            for parameter in group["params"]:
                sharding.refuse_flattened(parameter)
        agreed_steps({**own, **group} for group in optimizer.param_groups)
        # All checks passed. Only from here on are the base optimizer and its groups modified.
        super().__init__(optimizer, own)
        self.check_finite = check_finite
        self.closure = closure
        self.process_group = process_group
        self.first_attempt = first_attempt
        self._begin()

    def _begin(self) -> None:
        super()._begin()
        self._closure_passes = ClosurePasses(type(self).__name__, _ACCUMULATE, needs_loss=False)
        self._ascent: AscentStep | None = None

    # --- public calls ---------------------------------------------------------------------------

    @untraced
    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Perturb the weights to ``w + T_w^2 rho g / ||T_w g||`` along their gradients, if an ascent is due.

        ``T_w`` is 1 for SAM and ``|w| + eta`` for ASAM. Parameters without a gradient do not move, and no
        parameter moves if no ascent is due.

        Args:
            zero_grad: clear the gradients afterwards.

        Raises:
            RuntimeError: the last step was neither finished nor restored, or no parameter that the ascent
                perturbs has a gradient on this rank.
            ValueError: a gradient does not fit its parameter (sparse, other dtype or device); a rho
                is negative or not finite; or groups or ranks differ in start, interval or stop. Nothing was
                changed.
        """
        self._climb()
        if zero_grad:
            self.zero_grad()

    @untraced
    def second_step(self, zero_grad: bool = False) -> None:
        """Restore w and make the base optimizer's update with the gradients of the perturbed weights.

        If no ascent is due, make the update with the current gradients; ``first_step`` is then optional.

        Args:
            zero_grad: clear the gradients afterwards.

        Raises:
            RuntimeError: an ascent is due and ``first_step`` was not called, or since then a parameter's
                storage was replaced or a frozen parameter was given a gradient; or no parameter has a
                gradient.
            ValueError: a gradient does not fit its parameter. After this error, and where no gradient was
                found, the weights are still perturbed: correct the gradients and call again, or abandon the
                step with ``restore()``.
        """
        self._require_no_ascent("second_step()")
        self._hooked_descend()
        if zero_grad:
            self.zero_grad()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Finish a step that ``first_step`` began, or make a whole step.

        If no ascent is due, a whole step is the base optimizer's update. After ``first_step`` the closure
        makes the second pass. It may do nothing if that pass has been made: existing gradients are used.

        Args:
            closure: makes the second forward and backward pass and returns the loss. It runs with gradients
                enabled. See the constructor's ``closure`` for one that makes both passes.

        Returns:
            The loss that the closure returned, that of the first pass if it makes both. None without a
            closure, or if one for the second pass was not called because no ascent is due. A closure for both
            passes that returns None and leaves no gradient skips the batch: nothing changes.

        Raises:
            RuntimeError: an ascent is due, but neither a closure nor ``first_step`` was called; a closure for
                the second pass was passed without gradients of the first; a closure for both passes did not
                clear the gradients; or the last pass left no gradient. After any error, also one that the
                closure raises, the weights are restored to w; without a closure they stay perturbed.
        """
        try:
            return self._finish_or_initialise() if closure is None else self._step_with(closure)
        except BaseException:
            if closure is not None:
                self.restore()
            drop_loss_scale(self)
            raise

    def _step_with(self, closure: Callable[[], Any]) -> Any:
        if self.policy.begun:
            loss = _with_gradients(closure)
            self._descend()
            return loss
        passes = self._passes(self._descend)
        if self.closure == "both_passes":
            return self._closure_passes.run(passes, closure, self._all_parameters())[0]
        self._require_a_first_pass()
        next(passes)  # the caller has made the first pass
        losses = run_passes(passes, lambda _: _with_gradients(closure))
        return losses[0] if losses else None

    def passes(self) -> Passes:
        """Return one step as a generator that yields a :class:`Need` for each gradient.

        The first is the gradient at w. If an ascent is due, it only sets the direction of the ascent
        (``Need.ascent``), and each rank of ``process_group`` uses its own (``Need.local``); the second is the
        gradient at the perturbed weights. The update and the hooks of ``step`` use the last one. If the first
        pass is answered with None and leaves no gradient, the step is skipped and not counted.

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
        try:
            self._check_ranks()
            due = self.ascent_due
            loss = yield Need(local=due and self.peers is not None, ascent=due)
            if loss is None and self._has_no_gradient():
                return  # Lightning's closure skips a batch this way when training_step returns None
            self.first_step(zero_grad=due)
            if due:
                yield Need()
            descend()
        finally:
            self.restore()

    @property
    def ascent(self) -> AscentStep:
        """An optimizer over the same parameters whose ``step()`` is this one's ``first_step()``.

        For ``torch.amp.GradScaler``, which checks each optimizer once per update: call
        ``scaler.step(optimizer.ascent)`` after the first backward pass, ``scaler.step(optimizer)`` after
        the second, and then ``scaler.update()`` once. If no ascent is due, its ``step()`` changes nothing and
        ``scaler.step(optimizer)`` alone suffices.
        """
        if self._ascent is None:
            self._ascent = AscentStep(self, self._climb)
        return self._ascent

    @property
    def skips_nonfinite_steps(self) -> bool:
        """Whether a step with an infinite or NaN gradient leaves the weights unchanged.

        False with ``check_finite=False``, which leaves the gradients of the second pass unchecked.
        """
        return self.check_finite

    # --- the two halves -------------------------------------------------------------------------

    def _climb(self, *, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        """Begin a step, with an ascent where one is due."""
        if self.policy.begun:
            raise RuntimeError(
                "first_step() was called twice: finish the step with second_step(), or abandon it with "
                "restore()"
            )
        self._check_ranks()
        due = self.ascent_due
        self._require_a_gradient()
        if due:
            self.native_step.climb(grad_scale=grad_scale, found_inf=found_inf)
        self.policy.begun = True

    def _require_no_ascent(self, call: str) -> None:
        """Raise RuntimeError if an ascent is due and ``first_step`` was not called before ``call``."""
        if self.policy.begun:
            return
        self._check_ranks()
        if self.ascent_due:
            raise RuntimeError(
                f"{call} is the second half of a step and needs first_step() before it, because an ascent is "
                "due (optimizer.ascent_due is True): call first_step(), run a second forward and backward "
                f"pass, then {call}"
            )
        self._require_a_gradient()

    def _check_ranks(self) -> None:
        if self.process_group is not None:
            sharding.refuse_local_ascent(self._all_parameters())
        self.policy.agree(self.process_group)

    def _require_a_gradient(self) -> None:
        if self._has_no_gradient():
            raise RuntimeError(
                "no parameter has a gradient: run the first forward and backward pass before the step. "
                "Under FSDP2's set_requires_gradient_sync(False) gradients are not available yet: turn "
                "synchronization on for the last micro-batch of each pass"
            )

    @untraced
    def _require_a_first_pass(self) -> None:
        """Raise RuntimeError without a first gradient: a two-pass closure here would silently disable SAM."""
        if self._has_no_gradient():
            raise RuntimeError(
                "step(closure) makes the second pass and found no gradient of the first: run the first "
                "forward and backward pass before step(). If the closure makes both passes, as in "
                'torch.optim, construct SAM(..., closure="both_passes")'
            )

    @untraced
    @torch.no_grad()
    def _descend(self) -> None:
        self._update()

    # second_step() must fire the hooks of step() but cannot call it: a wrapper may have replaced step().
    _hooked_descend = Optimizer.profile_hook_step(_descend)

    def _update(self) -> None:
        if self.policy.begun and self._has_no_gradient():
            raise RuntimeError(
                "the second pass left no gradient: after first_step(zero_grad=True), run forward and "
                "backward at the perturbed weights, then call second_step(). In Lightning's manual "
                "optimization, step() makes no pass by itself: call first_step(zero_grad=True), "
                "manual_backward(loss), then second_step()"
            )
        if not self.native_step.climbed:
            self.native_step.begin_without_ascent()
        self.native_step.descend(
            check_finite=self.check_finite,
            process_group=self.peers,
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
        )
        self.policy.end()

    @untraced
    @torch.no_grad()
    def _finish_or_initialise(self) -> None:
        if not self.policy.begun and self._is_blank():
            self.base_optimizer.step()
            return
        self._require_no_ascent("step() without a closure")
        self._update()


def _with_gradients(closure: Callable[[], Any]) -> Any:
    with torch.enable_grad():
        return closure()
