"""Invalid numbers and booleans in options are refused before anything changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop

from fastsam import SAM
from fastsam.optim import LPFSGD, PGD, EntropySGD, FunctionSchedule, LookSAM, RhoScheduler
from fastsam.optim.variants.base import WrappedOptimizer

NAN = float("nan")
NO_NUMBERS = {
    "nan": NAN,
    "inf": float("inf"),
    "numpy nan": np.float32("nan"),
    "tensor nan": torch.tensor(NAN),
    "True": True,
    "False": False,
    "numpy True": np.bool_(True),
    "tensor True": torch.tensor(True),
    "string": "0.1",
    "two elements": torch.ones(2),
    "negative": -0.5,
}
OWN: dict[str, Callable[..., Any]] = {
    "SAM rho": lambda p, v: SAM(p, SGD, rho=v, lr=0.1),
    "SAM eta": lambda p, v: SAM(p, SGD, eta=v, lr=0.1),
    "SAM group rho": lambda p, v: SAM([{"params": p, "rho": v}], SGD, lr=0.1),
    "SAM group eta": lambda p, v: SAM([{"params": p, "eta": v}], SGD, lr=0.1),
    "SAM ready rho": lambda p, v: SAM(optimizer=SGD(p, lr=0.1), rho=v),
    "LookSAM rho": lambda p, v: LookSAM(SGD(p, lr=0.1), rho=v),
    "LookSAM alpha": lambda p, v: LookSAM(SGD(p, lr=0.1), alpha=v),
    "LookSAM every": lambda p, v: LookSAM(SGD(p, lr=0.1), every=v),
    "PGD sigma": lambda p, v: PGD(SGD(p, lr=0.1), sigma=v),
    "PGD seed": lambda p, v: PGD(SGD(p, lr=0.1), sigma=0.1, seed=v),
    "LPFSGD gamma": lambda p, v: LPFSGD(SGD(p, lr=0.1), gamma=v),
    "LPFSGD parts": lambda p, v: LPFSGD(SGD(p, lr=0.1), parts=v),
    "LPFSGD seed": lambda p, v: LPFSGD(SGD(p, lr=0.1), seed=v),
    "EntropySGD steps": lambda p, v: EntropySGD(SGD(p, lr=0.1), steps=v),
    "EntropySGD inner_lr": lambda p, v: EntropySGD(SGD(p, lr=0.1), inner_lr=v),
    "EntropySGD gamma": lambda p, v: EntropySGD(SGD(p, lr=0.1), gamma=v),
    "EntropySGD noise": lambda p, v: EntropySGD(SGD(p, lr=0.1), noise=v),
    "EntropySGD alpha": lambda p, v: EntropySGD(SGD(p, lr=0.1), alpha=v),
    "EntropySGD seed": lambda p, v: EntropySGD(SGD(p, lr=0.1), seed=v),
    "schedule of rho": lambda p, v: RhoScheduler(
        SAM(p, SGD, lr=0.1), FunctionSchedule(lambda epoch: v)
    ),
}
BASE_OPTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD lr": (SGD, {"lr": NAN}),
    "SGD lr inf": (SGD, {"lr": float("inf")}),
    "SGD lr True": (SGD, {"lr": True}),
    "SGD lr tensor": (SGD, {"lr": torch.tensor(NAN)}),
    "SGD lr numpy": (SGD, {"lr": np.float64("nan")}),
    "SGD momentum": (SGD, {"lr": 0.1, "momentum": NAN}),
    "SGD dampening": (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": NAN}),
    "SGD weight decay": (SGD, {"lr": 0.1, "weight_decay": NAN}),
    "Adam lr": (Adam, {"lr": NAN}),
    "Adam betas": (Adam, {"lr": 0.1, "betas": (0.9, NAN)}),
    "AdamW weight decay": (AdamW, {"weight_decay": NAN}),
    "AdamW eps": (AdamW, {"eps": NAN}),
    "RMSprop alpha": (RMSprop, {"alpha": NAN}),
}
WRAPPERS: dict[str, Callable[..., Any]] = {
    "SAM": lambda base: SAM(optimizer=base),
    "LookSAM": LookSAM,
    "PGD": lambda base: PGD(base, sigma=0.1),
    "LPFSGD": LPFSGD,
    "EntropySGD": EntropySGD,
}


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2))]


@pytest.mark.parametrize("value", NO_NUMBERS)
@pytest.mark.parametrize("option", OWN)
def test_values_that_are_not_numbers_are_refused(option: str, value: str) -> None:
    with pytest.raises(ValueError, match=option.rsplit(" ", 1)[-1]):
        OWN[option](parameters(), NO_NUMBERS[value])


@pytest.mark.parametrize(
    "option", ["LookSAM every", "LPFSGD parts", "EntropySGD steps", "PGD seed"]
)
@pytest.mark.parametrize("value", [1.5, 2.0, np.float32(2.0), 0.5])
def test_counts_must_be_integers(option: str, value: float) -> None:
    with pytest.raises(ValueError, match="integer"):
        OWN[option](parameters(), value)


@pytest.mark.parametrize("option", OWN)
@pytest.mark.parametrize("value", [1, np.int64(1)])
def test_numpy_numbers_are_accepted(option: str, value: Any) -> None:
    OWN[option](parameters(), value)


def test_the_upper_bound_is_checked() -> None:
    with pytest.raises(ValueError, match=r"<= 1, got 1\.5"):
        EntropySGD(SGD(parameters(), lr=0.1), alpha=1.5)


@pytest.mark.parametrize("option", BASE_OPTIONS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_nan_in_the_base_is_refused(wrapper: str, option: str) -> None:
    kind, options = BASE_OPTIONS[option]
    try:
        base = kind(parameters(), **options)
    except ValueError:
        pass  # torch's error is sufficient
    else:
        keys = set(base.defaults)
        with pytest.raises(ValueError, match=r"must be a (finite )?number"):
            WRAPPERS[wrapper](base)
        assert set(base.defaults) == keys
        assert set(base.param_groups[0]) == keys | {"params"}
    with pytest.raises(ValueError, match=r"."):
        SAM(parameters(), kind, **options)


@pytest.mark.parametrize("value", [1, 0, "yes", None, np.bool_(True)])
@pytest.mark.parametrize("option", ["check_finite", "stochastic_rounding"])
def test_values_that_are_not_booleans_are_refused(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=option):
        SAM(parameters(), SGD, lr=0.1, **{option: value})


@pytest.mark.parametrize("value", [1, np.bool_(True), "Weights", None, torch.tensor(True)])
def test_adaptive_is_one_of_three(value: Any) -> None:
    with pytest.raises(ValueError, match="adaptive"):
        SAM(parameters(), SGD, lr=0.1, adaptive=value)


def test_groups_that_come_later_are_checked_too() -> None:
    optimizer = SAM(parameters(), SGD, lr=0.1)
    state = optimizer.state_dict()
    bad = {"lr": NAN, "rho": True, "eta": "1", "adaptive": np.bool_(True)}
    for name, value in bad.items():
        with pytest.raises(ValueError, match=name):
            optimizer.add_param_group({"params": parameters(), name: value})
        with pytest.raises(ValueError, match=name):
            optimizer.load_state_dict(
                {**state, "param_groups": [{**state["param_groups"][0], name: value}]}
            )
        with pytest.raises(ValueError, match=name):
            optimizer.param_groups = [{**optimizer.param_groups[0], name: value}]
        assert len(optimizer.param_groups) == 1
        assert optimizer.param_groups[0]["lr"] == 0.1
    for name, value in bad.items():
        # Loading into the base does not call SAM, so the next step detects it.
        base = SGD(parameters(), lr=0.1)
        optimizer = SAM(optimizer=base)
        base.load_state_dict({**state, "param_groups": [{**state["param_groups"][0], name: value}]})
        base.param_groups[0]["params"][0].grad = torch.ones(2)
        with pytest.raises(ValueError, match=name):
            optimizer.first_step()


VARIANT_KEYS = {
    "LookSAM": "look_alpha",
    "PGD": "sigma",
    "LPFSGD": "lpf_gamma",
    "EntropySGD": "entropy_noise",
}


@pytest.mark.parametrize("wrapper", VARIANT_KEYS)
@pytest.mark.parametrize("value", ["nan", "inf", "string", "negative"])
def test_options_in_the_groups_of_variants_are_checked(wrapper: str, value: str) -> None:
    key, bad = VARIANT_KEYS[wrapper], NO_NUMBERS[value]
    with pytest.raises(ValueError, match=f"{key} must be a finite number"):
        WRAPPERS[wrapper](SGD([{"params": parameters(), key: bad}], lr=0.1))
    optimizer = WRAPPERS[wrapper](SGD([{"params": parameters(), key: 0.5}], lr=0.1))
    state = optimizer.state_dict()
    for name in (key, "lr"):
        with pytest.raises(ValueError, match=name):
            optimizer.add_param_group({"params": parameters(), name: bad})
        with pytest.raises(ValueError, match=name):
            optimizer.load_state_dict(
                {**state, "param_groups": [{**state["param_groups"][0], name: bad}]}
            )
        with pytest.raises(ValueError, match=name):
            optimizer.param_groups = [{**optimizer.param_groups[0], name: bad}]
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert optimizer.param_groups[0][key] == 0.5


def test_the_base_classes_cannot_be_instantiated() -> None:
    with pytest.raises(TypeError, match="abstract"):
        WrappedOptimizer(SGD(parameters(), lr=0.1))  # type: ignore[abstract]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_wrapper_has_skips_nonfinite_steps(wrapper: str) -> None:
    """If it is True, a step with a NaN gradient does not change the weights and is counted."""
    weight = parameters()[0]
    optimizer = WRAPPERS[wrapper](SGD([weight], lr=0.1))
    scale = 1.0

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (weight * scale).sum()
        loss.backward()
        return loss

    def step() -> None:
        if wrapper == "SAM":
            closure()
        optimizer.step(closure)

    step()
    scale, before = NAN, weight.detach().clone()
    for _ in range(2):
        step()
    skips = torch.equal(weight, before)
    assert optimizer.skips_nonfinite_steps is skips
    assert skips is (wrapper in ("SAM", "LookSAM"))
    assert int(optimizer.skipped_steps) == (2 if skips else 0)
    if not skips:
        assert bool(weight.isnan().all())


def test_sam_without_the_check_does_not_claim_to_skip() -> None:
    assert SAM(parameters(), SGD, lr=0.1).skips_nonfinite_steps
    assert not SAM(parameters(), SGD, lr=0.1, check_finite=False).skips_nonfinite_steps
