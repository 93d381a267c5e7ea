"""Sharpness-Aware Minimization whose norm, perturbation, restore and update are fused native kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from fastsam.kernels import native
from fastsam.kernels import sam as kernels
from fastsam.optim import sharding
from fastsam.optim.bucket import Bucket
from fastsam.optim.fused import FusedRule, fused_rule
from fastsam.optim.rounding import LostAscent

_LEGACY_STATE = ("old_p", "e_w")
"""Copies of the weights that checkpoints of other SAM implementations carry; nobody needs them."""

_NUMBERS = frozenset({float, int, bool})
_RHO = native.HYPER_COLUMNS.index("rho") if native.HYPER_COLUMNS else 0


class SAM(Optimizer):
    """SAM and ASAM around any base optimizer, with the calls of the file that people copy today.

    A step has two passes. ``first_step`` climbs from w to ``w + rho g / ||g||`` along the gradient of the
    first pass; ``second_step`` goes back to w, bit for bit, and lets the base optimizer use the gradient
    found at the top. ``torch.optim.SGD``, ``Adam`` and ``AdamW`` are updated in the same native pass that
    restores the weights; any other base optimizer runs its own ``step()`` after a native restore, at the
    price of one flag read by the host per step.

    A gradient that is not finite, in either pass, restores the weights and skips the update.
    ``skipped_steps`` counts that on the device.

    Args:
        params: parameters or parameter groups; a group may have its own ``rho``, ``adaptive``, ``eta``.
        base_optimizer: class of the optimizer that makes the descent step, such as ``torch.optim.SGD``.
        rho: radius of the perturbation, >= 0; a number or a scalar tensor, and free to change between
            steps through ``param_groups``. Default 0.05 (Foret et al. 2021, section 3.1).
        adaptive: False for SAM; True for ASAM with every weight normalised by ``|w|``; ``"weights"`` for
            ASAM as in its paper (Kwon et al. 2021): ``|w| + eta`` for weights, 1 for everything else.
            Weights are parameters with "weight" in their name where names are known (pass
            ``model.named_parameters()``), tensors of two or more dimensions otherwise.
        eta: ASAM's eta, added to ``|w|``. Default 0.01 for ``"weights"`` (Kwon et al. 2021, section 5)
            and 0 otherwise.
        optimizer: a ready base optimizer, instead of ``params`` and ``base_optimizer``.
        check_finite: look for inf and NaN in the gradients of the second pass (4 of the 44 bytes per
            parameter that a step moves). Those of the first pass show in the norm at no cost.
        closure: what the closure of ``step(closure)`` does. ``"second_pass"`` (default): only the second
            forward and backward, the gradient of the first being there already. ``"both_passes"``, as in
            torch.optim: it is called for each pass and the loss of the first is returned.
        process_group: ranks that must skip together, for ranks that climb on their own gradients; the
            flag (4 bytes) is max-reduced over them before the update.
        **kwargs: arguments of the base optimizer.

    Raises:
        ValueError: rho is negative or not finite, or an option is unknown.
        TypeError: ``base_optimizer`` is not an optimizer class.

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

    _climbed: bool
    _ascent: AscentStep | None

    def __init__(
        self,
        params: Iterable[Any] | None = None,
        base_optimizer: type[Optimizer] | None = None,
        rho: float | Tensor = 0.05,
        adaptive: bool | Literal["weights"] = False,
        *,
        eta: float | None = None,
        optimizer: Optimizer | None = None,
        check_finite: bool = True,
        closure: Literal["second_pass", "both_passes"] = "second_pass",
        process_group: ProcessGroup | None = None,
        **kwargs: Any,
    ) -> None:
        _check_rho(rho)
        _check_adaptive(adaptive)
        if closure not in ("second_pass", "both_passes"):
            raise ValueError(f"closure must be 'second_pass' or 'both_passes', got {closure!r}")
        eta = (0.01 if adaptive == "weights" else 0.0) if eta is None else eta
        if not eta >= 0.0:
            raise ValueError(f"eta must be >= 0, got {eta}")
        own = {"rho": rho, "adaptive": adaptive, "eta": eta}
        if optimizer is not None:
            if params is not None or base_optimizer is not None or kwargs:
                raise TypeError(
                    "pass either optimizer= (a ready base optimizer, which has its parameters and "
                    "settings already) or params and base_optimizer, not both"
                )
            for group in optimizer.param_groups:
                for key, value in own.items():
                    group.setdefault(key, value)
            super().__init__(optimizer.param_groups, own)
            self.base_optimizer = optimizer
        else:
            if params is None or base_optimizer is None:
                raise TypeError("SAM needs params and base_optimizer, or optimizer=")
            if not (isinstance(base_optimizer, type) and issubclass(base_optimizer, Optimizer)):
                raise TypeError(
                    f"base_optimizer must be an optimizer class such as torch.optim.SGD, got "
                    f"{base_optimizer!r}; pass a ready instance as SAM(optimizer=...)"
                )
            super().__init__(params, {**own, **kwargs})
            self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.check_finite = check_finite
        self._closure_makes_both = closure == "both_passes"
        self.process_group = process_group
        # The base knows SAM's defaults, so that groups may be added through either object.
        self.base_optimizer.defaults.update(own)
        self.defaults = self.base_optimizer.defaults
        self._skipped: dict[torch.device, Tensor] = {}
        self._ascent = None
        self._share_with_base()
        for group in self.param_groups:
            _check_rho(group["rho"])
            _check_adaptive(group["adaptive"])

    # --- what a user calls ----------------------------------------------------------------------

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Climbs to ``w + T_w^2 rho g / ||T_w g||`` along the gradients that the parameters have now.

        Parameters without a gradient stay. Without any gradient nothing moves, and the step can be
        finished all the same.

        Args:
            zero_grad: clear the gradients afterwards.

        Raises:
            RuntimeError: the last ascent was neither finished nor restored.
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
            RuntimeError: there was no ``first_step``, or a parameter's storage was replaced since.
            ValueError: a gradient does not fit its parameter. The weights are still perturbed then:
                mend the gradient and call again, or give the step up with ``restore()``.
        """
        if not self._climbed:
            raise RuntimeError(
                "second_step() needs a first_step() before it: the gradients must be those of the "
                "perturbed weights"
            )
        self.step()
        if zero_grad:
            self.zero_grad()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The second step after a first step; or, with a closure, everything from the gradient on.

        Args:
            closure: makes the second forward and backward pass and returns the loss; it is run with
                gradients enabled. See the constructor's ``closure`` for one that makes both passes.

        Returns:
            None without a closure, else the loss that the closure returned (that of the first pass where
            it makes both). Whatever the closure raises, the weights are back at w.

        Raises:
            RuntimeError: no closure was given and there was no ``first_step``.
        """
        if closure is None:
            return self._finish_or_initialise()
        with torch.enable_grad():
            loss = closure() if self._closure_makes_both else None
        self.first_step(zero_grad=not self._closure_makes_both)
        try:
            with torch.enable_grad():
                second = closure()
            self._descend()
        except BaseException:
            if self._climbed:
                self.restore()
            raise
        return loss if self._closure_makes_both else second

    @torch.no_grad()
    def restore(self) -> None:
        """Gives up a step between its two halves: the weights are back at w, bit for bit.

        Safe to call at any time; without a perturbation it does nothing.
        """
        if self._climbed:
            for bucket in self._buckets:
                bucket.restore()
            self._climbed = False
            _forget_casts()

    @property
    def skipped_steps(self) -> Tensor:
        """Updates skipped because a gradient was not finite: int64 scalar on the parameters' device.

        Reading its value on the host waits for the device; nothing in a step does.
        """
        if not self._skipped:
            return torch.zeros((), dtype=torch.int64)
        return next(iter(self._skipped.values()))[0]

    @property
    def unchanged_share(self) -> Tensor:
        """Share of the elements of 16-bit weights that the last ascent was too small to change.

        A float32 scalar on the parameters' device, 0 without 16-bit weights; of this rank's part where
        parameters are sharded. Above one half a warning is given, once, some steps later on CUDA because
        nothing waits for the device.
        """
        if not self._lost:
            return torch.zeros(())
        device = next(iter(self._lost))
        unchanged = sum(lost.unchanged.to(device)[0] for lost in self._lost.values())
        elements = sum(lost.elements for lost in self._lost.values())
        return torch.as_tensor(unchanged / max(elements, 1), dtype=torch.float32)

    @property
    def ascent(self) -> AscentStep:
        """An optimizer over the same parameters whose ``step()`` is this one's ``first_step()``.

        For ``torch.amp.GradScaler``, which checks an optimizer once per update: call
        ``scaler.step(optimizer.ascent)`` after the first backward pass, ``scaler.step(optimizer)`` after
        the second, and then one ``scaler.update()``.
        """
        if self._ascent is None:
            self._ascent = AscentStep(self)
        return self._ascent

    # --- what torch calls -----------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group; it may have its own rho, adaptive and eta."""
        if "base_optimizer" not in self.__dict__:  # called by Optimizer.__init__
            super().add_param_group(param_group)
            return
        self._refuse_midway("add_param_group()")
        _check_rho(param_group.get("rho", self.defaults["rho"]))
        _check_adaptive(param_group.get("adaptive", self.defaults["adaptive"]))
        self.base_optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """State of SAM and of the base optimizer, without any copy of the weights."""
        self._refuse_midway("state_dict()")
        packed = super().state_dict()
        rule = fused_rule(self.base_optimizer)
        if rule is None or rule.step_key is not None:
            return packed
        # torch's first update copies the gradient only where there is no momentum buffer.
        unstarted = self._unstarted()
        parameters = (p for group in self.param_groups for p in group["params"])
        for index, parameter in enumerate(parameters):
            if id(parameter) in unstarted and index in packed["state"]:
                packed["state"][index] = dict.fromkeys(packed["state"][index])
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class, of the reference implementation, or of the base optimizer.

        Copies of weights in old checkpoints are dropped, and what they lack is filled from the current
        groups.

        Raises:
            RuntimeError: called between ``first_step`` and ``second_step``.
            ValueError: the groups do not match.
        """
        self._refuse_midway("load_state_dict()")
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
            _check_rho(group.get("rho", 0.0))
        super().load_state_dict(
            {
                **state_dict,
                "state": {index: entry for index, entry in state.items() if entry},
                "param_groups": groups,
            }
        )
        self.base_optimizer.__setstate__({"state": self.state, "param_groups": self.param_groups})
        self._share_with_base()

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_midway("pickling or copying")
        return {
            **super().__getstate__(),
            "base_optimizer": self.base_optimizer,
            "check_finite": self.check_finite,
            "_closure_makes_both": self._closure_makes_both,
            "process_group": self.process_group and _Handle(self.process_group),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "base_optimizer" in state:
            handle = state["process_group"]
            self.process_group = handle.group if handle else None
            self._skipped = {}
            self._ascent = None
            self._share_with_base()

    # --- the two halves -------------------------------------------------------------------------

    def _climb(self, *, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        if self._climbed:
            raise RuntimeError(
                "first_step() was called twice: finish the step with second_step(), or give it up "
                "with restore()"
            )
        self._prepare()
        gradients = [bucket.take_gradients() for bucket in self._buckets]
        self._write_hyper(fused_rule(self.base_optimizer))
        for bucket in self._buckets:
            bucket.norm()
        self._share_norms()
        for device, lost in self._lost.items():
            lost.begin(
                sum(
                    bucket.elements(taken)
                    for bucket, taken in zip(self._buckets, gradients, strict=True)
                    if bucket.device == device and bucket.is_16_bit
                )
            )
        self._climbed = True
        try:
            for bucket, taken in zip(self._buckets, gradients, strict=True):
                bucket.perturb(taken, grad_scale=_on(grad_scale, bucket.device))
        except BaseException:
            self.restore()
            raise
        for device, scalars in self._scalars.items():
            _raise_flag(scalars.found_inf, _on(found_inf, device))
        _forget_casts()
        if self._lost and any(row[_RHO] != 0.0 for row in self._written_rows):
            for lost in self._lost.values():
                lost.end()

    def _finish_or_initialise(self) -> None:
        if self._climbed:
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
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        present = [sharding.local(gradient) for gradient in gradients if gradient is not None]
        return (
            not self.state
            and all(float(group.get("lr", 0.0)) == 0.0 for group in self.param_groups)
            and bool(present)
            and not any(bool(gradient.any()) for gradient in present)
        )

    @torch.no_grad()
    def _descend(self) -> None:
        if any(bucket.moved() for bucket in self._buckets):
            raise RuntimeError(
                "the storage of a parameter was replaced between first_step() and second_step() "
                "(p.data = ... or model.to(...)): call restore(), which finds the new storage, and "
                "begin the step again"
            )
        grad_scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        gradients = [bucket.take_gradients() for bucket in self._buckets]
        rule = fused_rule(self.base_optimizer)
        self._write_hyper(rule)
        if rule is not None:
            for bucket, taken in zip(self._buckets, gradients, strict=True):
                bucket.bind_state(taken, rule, self.param_groups, self.state)
        self._agree_to_skip(found_inf)
        self._climbed = False
        if rule is None:
            self._descend_with_base(grad_scale)
        else:
            for bucket, taken in zip(self._buckets, gradients, strict=True):
                bucket.update(taken, rule, grad_scale=_on(grad_scale, bucket.device))
        _forget_casts()
        # Schedulers on the base optimizer ask whether it was stepped.
        self.base_optimizer._opt_called = True  # type: ignore[attr-defined]

    def _agree_to_skip(self, found_inf: Tensor | None) -> None:
        """Sets every device's and rank's flag where one of them saw a gradient that is not finite."""
        for bucket in self._buckets:
            flag = self._scalars[bucket.device].found_inf
            if found_inf is not None:
                _raise_flag(flag, _on(found_inf, bucket.device))
            elif self.check_finite:
                kernels.check(bucket.table, flag)
            sharding.reduce_max(flag, bucket.shard_groups)
        flags = [scalars.found_inf for scalars in self._scalars.values()]
        if self.process_group is not None:
            for flag in flags:
                sharding.reduce_max(flag, (self.process_group,))
        if len(flags) > 1:
            for flag in flags:
                for other in flags:
                    torch.maximum(flag, other.to(flag.device, non_blocking=True), out=flag)

    def _descend_with_base(self, grad_scale: Tensor | None) -> None:
        for bucket in self._buckets:
            bucket.restore()
        flags = [scalars.found_inf for scalars in self._scalars.values()]
        if flags and bool(
            flags[0].item()
        ):  # the one host read of a base optimizer without a kernel
            for skipped in self._skipped.values():
                skipped += 1
            return
        if grad_scale is not None:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.div_(_on(grad_scale, p.grad.device))
        self.base_optimizer.step()

    # --- native memory --------------------------------------------------------------------------

    def _share_with_base(self) -> None:
        """One set of groups and states for both optimizers; native memory is rebuilt when next used."""
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state
        self._buckets: list[Bucket] = []
        self._scalars: dict[torch.device, kernels.Scalars] = {}
        self._lost: dict[torch.device, LostAscent] = {}
        self._written_rows: list[list[float]] = []
        self._written_options: list[dict[str, Any]] = []
        self._layout: list[tuple[Any, ...]] = []
        self._climbed = False
        if self._ascent is not None:
            self._ascent.param_groups = self.param_groups
            self._ascent.state = self.state

    @torch.no_grad()
    def prepare(self) -> None:
        """Creates native memory and the base optimizer's state now, and takes changed settings over.

        A step does all of it by itself; a captured one cannot.
        """
        self._prepare()
        rule = fused_rule(self.base_optimizer)
        self._write_hyper(rule)
        if rule is not None:
            for bucket in self._buckets:
                trained = [p if p.requires_grad else None for p in bucket.parameters]
                bucket.bind_state(trained, rule, self.param_groups, self.state)

    def _unstarted(self) -> set[int]:
        return {id(p) for bucket in self._buckets for p in bucket.unstarted()}

    def started_state(self) -> dict[Tensor, dict[str, Any]]:
        """The state of the parameters that an update has reached."""
        unstarted = self._unstarted()
        return {p: entry for p, entry in self.state.items() if id(p) not in unstarted}

    def native_memory(self) -> tuple[int, ...]:
        """Identity of all addresses that the kernels work on: it changes when a captured step is stale."""
        if any(bucket.moved() for bucket in self._buckets):
            return ()
        return tuple(
            part for bucket in self._buckets for part in (id(bucket), *bucket.state_addresses())
        )

    def _prepare(self) -> None:
        """Makes the buckets, once, and again when the parameters or their storage have changed."""
        layout = [
            (len(group["params"]), group["adaptive"], *map(id, group["params"]))
            for group in self.param_groups
        ]
        if layout == self._layout and not any(bucket.moved() for bucket in self._buckets):
            return
        members: dict[tuple[Any, ...], list[tuple[Tensor, int, bool]]] = {}
        for index, group in enumerate(self.param_groups):
            adaptive = _normalised(group)
            for parameter, flag in zip(group["params"], adaptive, strict=True):
                part = sharding.local(parameter)
                if self.process_group is not None and sharding.is_sharded(parameter):
                    raise ValueError(
                        "process_group= is for ranks that climb on their own gradients, which needs whole "
                        "parameters on every rank; with DTensor parameters (FSDP2, tensor parallel) leave "
                        "it out: their norm is that of all ranks"
                    )
                if part.dtype not in native.DTYPE_CODES:
                    raise ValueError(
                        f"a parameter of shape {tuple(parameter.shape)} is {part.dtype}; SAM knows "
                        "float32, float64, bfloat16 and float16"
                    )
                key = (part.device, part.dtype, sharding.shard_groups(parameter))
                members.setdefault(key, []).append((parameter, index, flag))
        for bucket in self._buckets:
            for parameter in bucket.unstarted():
                self.state[parameter] = dict.fromkeys(self.state[parameter])
        self._buckets = [
            Bucket(
                [parameter for parameter, _, _ in rows],
                groups=[group for _, group, _ in rows],
                adaptive=[flag for _, _, flag in rows],
                slot=slot,
            )
            for slot, rows in enumerate(members.values())
        ]
        self._lost = {
            device: self._lost.get(device) or LostAscent(device)
            for device in dict.fromkeys(b.device for b in self._buckets if b.is_16_bit)
        }
        self._scalars = {
            device: kernels.Scalars(
                hyper=torch.zeros(
                    len(self.param_groups),
                    len(native.HYPER_COLUMNS),
                    dtype=torch.float64,
                    device=device,
                ),
                squared_norms=torch.zeros(len(self._buckets), dtype=torch.float64, device=device),
                found_inf=torch.zeros(1, dtype=torch.float32, device=device),
                skipped_steps=self._skipped.setdefault(
                    device, torch.zeros(1, dtype=torch.int64, device=device)
                ),
                unchanged=self._lost[device].unchanged if device in self._lost else None,
            )
            for device in dict.fromkeys(bucket.device for bucket in self._buckets)
        }
        counted: set[torch.device] = set()
        for bucket in self._buckets:
            bucket.attach(self._scalars[bucket.device], counts_skips=bucket.device not in counted)
            counted.add(bucket.device)
        self._written_rows = []
        self._written_options = []
        self._layout = layout

    def _write_hyper(self, rule: FusedRule | None) -> None:
        """Refreshes the block of hyper-parameters on every device, where a value has changed."""
        options = [
            {"rho": group["rho"], "eta": group["eta"], **(rule.hyper(group) if rule else {})}
            for group in self.param_groups
        ]
        # Other types, tensors above all, may change their value and stay the same object.
        fixed = all(type(value) in _NUMBERS for row in options for value in row.values())
        if fixed and options == self._written_options:
            return
        rows: list[list[float]] = []
        on_device: list[tuple[int, int, Tensor]] = []
        for index, values in enumerate(options):
            _check_rho(values["rho"])
            row = [0.0] * len(native.HYPER_COLUMNS)
            for name, value in values.items():
                column = native.HYPER_COLUMNS.index(name)
                if isinstance(value, Tensor) and value.device.type != "cpu":
                    on_device.append((index, column, value))
                else:
                    row[column] = float(value)
            rows.append(row)
        for device, scalars in self._scalars.items():
            if rows != self._written_rows:
                fresh = torch.tensor(rows, dtype=torch.float64, pin_memory=device.type == "cuda")
                scalars.hyper.copy_(fresh, non_blocking=True)
            for index, column, value in on_device:
                scalars.hyper[index, column].copy_(value, non_blocking=True)
        self._written_rows = rows
        self._written_options = options if fixed else []

    def _share_norms(self) -> None:
        """Gives every device the squared norms of the buckets on the others."""
        if len(self._scalars) < 2:
            return
        for bucket in self._buckets:
            part = self._scalars[bucket.device].squared_norms[bucket.slot]
            for device, scalars in self._scalars.items():
                if device != bucket.device:
                    scalars.squared_norms[bucket.slot].copy_(part, non_blocking=True)

    def _refuse_midway(self, what: str) -> None:
        if getattr(self, "_climbed", False):
            raise RuntimeError(
                f"{what} between first_step() and second_step(): the weights are perturbed. Finish the "
                "step, or give it up with restore(), first"
            )


class AscentStep(Optimizer):
    """The first half of a SAM step as an optimizer of its own; see :attr:`SAM.ascent`."""

    _step_supports_amp_scaling = True

    def __init__(self, sam: SAM) -> None:
        super().__init__(sam.param_groups, {})
        self._sam = sam
        self.param_groups = sam.param_groups
        self.state = sam.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """``first_step()``, with gradients that may still carry a scaler's loss scale."""
        if closure is not None:
            raise TypeError(
                "the ascent step takes no closure: run the first backward pass before it"
            )
        with torch.no_grad():
            self._sam._climb(
                grad_scale=getattr(self, "grad_scale", None),
                found_inf=getattr(self, "found_inf", None),
            )


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


def _check_rho(rho: float | Tensor) -> None:
    if isinstance(rho, Tensor) and rho.device.type != "cpu":
        return  # reading it would wait for the device; a value that is not finite skips the step there
    value = float(rho)
    if not (value >= 0.0 and math.isfinite(value)):
        raise ValueError(f"rho must be a finite number >= 0, got {value}")


def _check_adaptive(adaptive: object) -> None:
    if not (isinstance(adaptive, bool) or adaptive == "weights"):
        raise ValueError(f"adaptive must be True, False or 'weights', got {adaptive!r}")


def _normalised(group: dict[str, Any]) -> Sequence[bool]:
    """Which parameters of a group ASAM normalises."""
    if group["adaptive"] != "weights":
        return [bool(group["adaptive"])] * len(group["params"])
    names = group.get("param_names")
    if names is not None:
        return ["weight" in name for name in names]
    return [p.dim() >= 2 for p in group["params"]]


def _on(scalar: Tensor | None, device: torch.device) -> Tensor | None:
    """A gradient scaler's scalar where the kernels of ``device`` can read it, as float32."""
    return None if scalar is None else scalar.to(device, torch.float32, non_blocking=True)


def _raise_flag(flag: Tensor, other: Tensor | None) -> None:
    """Sets ``flag`` where ``other`` is set, without reading either."""
    if other is not None:
        torch.maximum(flag, other.reshape(1), out=flag)


def _forget_casts() -> None:
    """Autocast keeps 16-bit copies of weights while its context lasts; after a write they are stale."""
    torch.clear_autocast_cache()
