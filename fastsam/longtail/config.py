"""Every setting of a training run, and which of them a given method, optimizer or data set has."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, TypeVar

from fastsam.longtail.data import DATASETS, IMBALANCE_KINDS, ImbalanceKind
from fastsam.longtail.data.catalog import (
    CIFAR,
    FROM_FILES,
    GIVEN,
    MADE_LONG_TAILED,
    OWN,
    is_given,
)
from fastsam.longtail.data.files import CORRUPT_POLICIES
from fastsam.longtail.data.pixels import EXIF, Exif
from fastsam.longtail.errors import UsageError, unknown
from fastsam.longtail.losses import MEANS, Mean
from fastsam.longtail.methods import Method
from fastsam.longtail.models import HEAD_INITS, HEADS, Head, HeadInit, check_model
from fastsam.optim.variants.pgd import NOISE_ON
from fastsam.records import build

OPTIMIZERS: dict[str, str] = {
    "sgd": "stochastic gradient descent with momentum",
    "sam": "sharpness-aware minimization on SGD",
    "asam": "adaptive sharpness-aware minimization on SGD",
    "looksam": "SAM at every k-th step, its direction reused in between",
    "pgd": "perturbed gradient descent: isotropic noise on gradient or weights",
    "lpf-sgd": "low-pass-filtered SGD: gradients averaged over filter-normalised noise",
    "entropy-sgd": "descent on the local entropy by Langevin dynamics",
}
SAM_FAMILY = ("sam", "asam", "looksam")

LR_SCHEDULES = ("multistep", "cosine")
COSINE_STARTS = ("first-epoch", "after-warmup")
RHO_SCHEDULES = ("constant", "step", "linear", "deferred")
PRECISIONS = ("float32", "bfloat16")
SELECTIONS = ("last", "best-validation")
SAMPLINGS = ("class-balanced", "square-root", "progressive")
WEIGHTINGS = ("effective", "inverse", "algorithm1")
PLACE = ("device", "data_root", "download", "workers", "corrupt")
"""Settings of where a run takes place and of what it does if a file is broken there.

Others do not make it another run; results list the images that were skipped.
"""


def _only(
    help_text: str, *, before: Any = None, optional: bool = False, **owners: tuple[str, ...]
) -> dict[str, Any]:
    """Metadata of a setting that exists only where one of ``owners`` is chosen.

    Args:
        help_text: what the setting means.
        before: its value in runs that were stored before there was such a setting.
        optional: whether it may be None where it exists.
        **owners: for a choice (data, optimizer, loss, rule, or another setting) the values that
            bring this setting with them.
    """
    return {"help": help_text, "owners": owners, "before": before, "optional": optional}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The settings of one run; every value is final. A setting that does not apply is None.

    :func:`fastsam.longtail.recipe` fills in published values; build a config by hand only to leave
    them. Each field's meaning is in its metadata, from which the command line takes its help.

    Raises:
        UsageError: for an unknown name, a value out of range, a setting that is missing, or one
            that the chosen data, method or optimizer does not have.
    """

    data: str = field(metadata={"help": "data set"})
    method: str = field(metadata={"help": "loss[-rule], for instance ce, ce-drw, ldam-drw, vs"})
    optimizer: str = field(metadata={"help": "optimizer"})

    imbalance: float | None = field(
        default=None,
        metadata=_only(
            "imbalance factor: largest over smallest class count", data=MADE_LONG_TAILED
        ),
    )
    kind: ImbalanceKind | None = field(
        default=None, metadata=_only("shape of the imbalance: exp or step", data=MADE_LONG_TAILED)
    )
    subset_seed: int | None = field(
        default=None,
        metadata=_only(
            "seed of the subset, apart from the seed of the training", data=MADE_LONG_TAILED
        ),
    )
    data_root: str | None = field(
        default=None, metadata=_only("folder with the data", data=(*CIFAR, *FROM_FILES))
    )
    download: bool | None = field(
        default=None, metadata=_only("fetch the archive if it is not there", data=CIFAR)
    )
    image_size: int | None = field(
        default=None, metadata=_only("height and width of the network's input", data=FROM_FILES)
    )
    workers: int | None = field(
        default=None, metadata=_only("processes that read images", data=FROM_FILES)
    )
    corrupt: str | None = field(
        default=None,
        metadata=_only(
            "at an image that cannot be read: stop, or skip it and count it", data=FROM_FILES
        ),
    )
    exif: Exif | None = field(
        default=None,
        metadata=_only(
            "EXIF orientation of images: transpose (turn them by it) or ignore",
            before="ignore",
            data=OWN,
        ),
    )
    value_range: tuple[float, float] | None = field(
        default=None,
        metadata=_only(
            "values that become black and white in images of more than 8 bits; by default 0 and "
            "65535 for 16 bits, 0 and 1 for floats",
            optional=True,
            data=OWN,
        ),
    )

    model: str = field(metadata={"help": "network"})
    head: Head = field(metadata={"help": "classifier: linear or cosine"})
    head_init: HeadInit | None = field(
        default=None,
        metadata=_only(
            "initial weights of a linear head: he (He et al.'s normal) or torch (nn.Linear's own)",
            before="he",
            head=("linear",),
        ),
    )
    epochs: int = field(metadata={"help": "passes over the training set"})
    batch_size: int = field(metadata={"help": "images in a batch"})
    augment: bool = field(metadata={"help": "draw the data set's training augmentation"})

    lr: float = field(metadata={"help": "learning rate after warm-up"})
    momentum: float = field(metadata={"help": "momentum of SGD"})
    nesterov: bool = field(default=False, metadata={"help": "Nesterov momentum"})
    weight_decay: float = field(metadata={"help": "L2 penalty of SGD, on every parameter"})
    warmup_epochs: int = field(
        metadata={"help": "epochs of linear warm-up: lr * epoch / warmup_epochs"}
    )
    lr_schedule: str = field(metadata={"help": "after warm-up: multistep or cosine"})
    lr_milestones: tuple[int, ...] | None = field(
        default=None,
        metadata=_only(
            "last epoch of each phase of a multistep schedule", lr_schedule=("multistep",)
        ),
    )
    lr_factors: tuple[float, ...] | None = field(
        default=None,
        metadata=_only("factor on lr after each milestone", lr_schedule=("multistep",)),
    )

    cosine_start: str | None = field(
        default=None,
        metadata=_only(
            "where a cosine schedule begins: at the first-epoch, of which warm-up replaces a part, "
            "or after-warmup",
            before="first-epoch",
            lr_schedule=("cosine",),
        ),
    )

    defer_epoch: int | None = field(
        default=None,
        metadata=_only(
            "last epoch before drw, drs or ib take effect", rule=("drw", "drs"), loss=("ib",)
        ),
    )
    weighting: str | None = field(
        default=None,
        metadata=_only(
            "class weights: effective (number of samples) or inverse (frequency), both summing to "
            "the number of classes, mean over the batch's weights; algorithm1: 1/n, mean over "
            "samples",
            rule=("rw", "drw"),
        ),
    )
    beta: float | None = field(
        default=None,
        metadata=_only("beta of the effective number of samples", weighting=("effective",)),
    )
    sampling: str | None = field(
        default=None,
        metadata=_only(
            "how classes are re-sampled: class-balanced; square-root (of the count); progressive "
            "(from the counts to class-balanced over the run)",
            rule=("rs", "drs"),
        ),
    )
    max_margin: float | None = field(
        default=None, metadata=_only("margin of the smallest class", loss=("ldam",))
    )
    scale: float | None = field(
        default=None, metadata=_only("factor on cosine logits", loss=("ldam",))
    )
    focal_gamma: float | None = field(
        default=None, metadata=_only("exponent of the focal loss", loss=("focal",))
    )
    focal_mean: Mean | None = field(
        default=None,
        metadata=_only(
            "what focal losses with class weights are divided by: samples (their number) or weights "
            "(their sum)",
            before="weights",
            loss=("focal",),
        ),
    )
    gamma: float | None = field(
        default=None, metadata=_only("exponent of the logits' divisors", loss=("vs", "cdt"))
    )
    tau: float | None = field(
        default=None, metadata=_only("factor on the log prior", loss=("vs", "la"))
    )
    eql_threshold: float | None = field(
        default=None, metadata=_only("frequency below which a class is rare", loss=("eql",))
    )
    eql_drop: float | None = field(
        default=None,
        metadata=_only("probability of leaving a rare class out of a denominator", loss=("eql",)),
    )
    ib_alpha: float | None = field(
        default=None, metadata=_only("factor of the influence-balanced loss", loss=("ib",))
    )

    paco_alpha: float | None = field(
        default=None, metadata=_only("weight of a contrasted positive", loss=("paco",))
    )
    paco_temperature: float | None = field(
        default=None, metadata=_only("temperature of the contrasts", loss=("paco",))
    )
    paco_queue: int | None = field(
        default=None, metadata=_only("places in the queue of keys", loss=("paco",))
    )
    paco_projection: int | None = field(
        default=None, metadata=_only("length of the projected vectors", loss=("paco",))
    )
    paco_batch_norm: bool | None = field(
        default=None,
        metadata=_only("batch normalization in the projection", before=False, loss=("paco",)),
    )

    rho: tuple[float, ...] | None = field(
        default=None,
        metadata=_only(
            "radius of the ascent step: one value, or one per phase of the rho schedule",
            optimizer=SAM_FAMILY,
        ),
    )
    rho_schedule: str | None = field(
        default=None,
        metadata=_only(
            "constant; step (at rho_milestones); linear (first to last epoch); deferred (second "
            "value after defer_epoch, as Algorithm 1)",
            optimizer=SAM_FAMILY,
        ),
    )
    rho_milestones: tuple[int, ...] | None = field(
        default=None,
        metadata=_only("last epoch of each phase of a stepped rho", rho_schedule=("step",)),
    )

    look_every: int | None = field(
        default=None,
        metadata=_only("steps from one SAM step to the next", optimizer=("looksam",)),
    )
    look_alpha: float | None = field(
        default=None, metadata=_only("weight of the reused direction", optimizer=("looksam",))
    )
    noise_sigma: float | None = field(
        default=None, metadata=_only("standard deviation of the noise", optimizer=("pgd",))
    )
    noise_on: str | None = field(
        default=None, metadata=_only("noise on gradient or weights", optimizer=("pgd",))
    )
    lpf_gamma: float | None = field(
        default=None,
        metadata=_only("noise relative to the norm of each filter", optimizer=("lpf-sgd",)),
    )
    lpf_parts: int | None = field(
        default=None,
        metadata=_only("parts of a batch with their own noise", optimizer=("lpf-sgd",)),
    )
    entropy_steps: int | None = field(
        default=None, metadata=_only("Langevin steps, a batch each", optimizer=("entropy-sgd",))
    )
    entropy_lr: float | None = field(
        default=None, metadata=_only("step size of the dynamics", optimizer=("entropy-sgd",))
    )
    entropy_gamma: float | None = field(
        default=None,
        metadata=_only("pull towards the weights of the step", optimizer=("entropy-sgd",)),
    )
    entropy_noise: float | None = field(
        default=None, metadata=_only("thermal noise", optimizer=("entropy-sgd",))
    )
    entropy_alpha: float | None = field(
        default=None, metadata=_only("memory of the running mean", optimizer=("entropy-sgd",))
    )

    select: str = field(
        default="last",
        metadata={"help": "weights that are judged: last epoch, or best-validation epoch"},
    )
    posthoc_tau: float = field(
        default=0.0,
        metadata={"help": "post-hoc logit adjustment at test time: minus tau times log prior"},
    )
    seed: int = field(default=0, metadata={"help": "seed of weights, order and augmentation"})
    precision: str = field(
        default="float32",
        metadata={"help": "of the passes in training: float32, or bfloat16 by autocast"},
    )
    channels_last: bool = field(
        default=False,
        metadata={
            "help": "keep the channels of images and filters together in memory: the order that "
            "convolutions in bfloat16 want on a GPU, and often the faster one on a CPU"
        },
    )
    device: str = field(default="cpu", metadata={"help": "device: cpu, cuda, cuda:1, ..."})
    threads: int = field(default=0, metadata={"help": "CPU threads; 0 leaves torch's own choice"})

    def __post_init__(self) -> None:
        _check_names(self)
        _check_owners(self)
        _check_head(self)
        _check_values(self)
        _check_schedules(self)

    @property
    def parsed_method(self) -> Method:
        """The method, taken apart."""
        return Method.parse(self.method)

    def as_dict(self) -> dict[str, Any]:
        """Plain values that JSON and ``torch.load(weights_only=True)`` accept."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of :meth:`as_dict`.

        Raises:
            UsageError: for a setting that does not exist, is missing, or is of a wrong type.
        """
        known = {item.name: item for item in fields(cls)}
        for name in values:
            if name not in known:
                raise unknown("setting", name, sorted(known))
        values = {**values, **_before(values)}
        for name, item in known.items():
            if name not in values and item.default is MISSING:
                raise UsageError(f"{name} is missing: {item.metadata['help']}")
        try:
            return build(cls, values)
        except UsageError:
            raise
        except ValueError as error:
            raise UsageError(str(error)) from error


def _before(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the settings were that ``values``, perhaps of an older version, do not name."""
    if any(name not in values for name in ("data", "method", "optimizer")):
        return {}
    choices = choices_of(values)
    return {
        item.name: item.metadata["before"]
        for item in fields(TrainConfig)
        if item.name not in values
        and item.metadata.get("before") is not None
        and applies(item.name, choices)
    }


def differences(
    one: Mapping[str, Any], other: Mapping[str, Any], *, same_content: bool = False
) -> list[str]:
    """Names of the settings that make two runs different ones.

    Those of :data:`PLACE` do not, unless the data are the user's own and their folder is all that
    says which. A setting that one of them lacks, as of an older version, has the value that it had
    before it became a setting, or its default.

    Args:
        one: settings as :meth:`TrainConfig.as_dict` gives them.
        other: the same of another run, perhaps of another version of this package.
        same_content: whether the contents of the data are known and are compared otherwise.
    """
    one, other = {**one, **_before(one)}, {**other, **_before(other)}
    own = not same_content and one.get("data") in OWN
    place = {name for name in PLACE if name != "data_root" or not own}
    defaults = {item.name: item.default for item in fields(TrainConfig)}
    return [
        name
        for name in {**one, **other}
        if name not in place
        and one.get(name, defaults.get(name, MISSING))
        != other.get(name, defaults.get(name, MISSING))
    ]


_Value = TypeVar("_Value")


def given(value: _Value | None) -> _Value:
    """A setting that the checks of :class:`TrainConfig` guarantee to be there."""
    if value is None:
        raise AssertionError("TrainConfig accepts no run without this setting")
    return value


def choices_of(values: Mapping[str, Any]) -> dict[str, str]:
    """What decides which settings exist: the names chosen in ``values``, where they count.

    Args:
        values: settings by name; at least ``data``, ``method`` and ``optimizer``.
    """
    method = Method.parse(values["method"])
    choices = {
        "data": values["data"],
        "optimizer": values["optimizer"],
        "loss": method.loss,
        "rule": method.rule,
        "head": values.get("head"),
        "lr_schedule": values.get("lr_schedule"),
        "weighting": values.get("weighting") if method.weighted else None,
        "rho_schedule": (values.get("rho_schedule") if values["optimizer"] in SAM_FAMILY else None),
    }
    return {kind: name for kind, name in choices.items() if name is not None}


def applies(name: str, choices: Mapping[str, str]) -> bool:
    """Whether the setting called ``name`` exists under ``choices``; one fitting owner is enough.

    Raises:
        UsageError: if there is no such setting at all.
    """
    by_name = {item.name: item for item in fields(TrainConfig)}
    if name not in by_name:
        raise unknown("setting", name, sorted(by_name))
    owners: dict[str, tuple[str, ...]] = by_name[name].metadata.get("owners", {})
    return not owners or any(choices.get(kind) in names for kind, names in owners.items())


def check_applies(name: str, choices: Mapping[str, str]) -> None:
    """Raise :class:`UsageError` unless the setting called ``name`` exists under ``choices``."""
    if not applies(name, choices):
        owners = next(f for f in fields(TrainConfig) if f.name == name).metadata["owners"]
        reasons = " or ".join(f"{kind} {', '.join(names)}" for kind, names in owners.items())
        chosen = ", ".join(f"{kind} {choices.get(kind, 'none')}" for kind in owners)
        raise UsageError(f"{name} needs {reasons}, but the run has {chosen}")


def _check_names(config: TrainConfig) -> None:
    check_model(config.model)
    choices: tuple[tuple[str, str | None, Iterable[str]], ...] = (
        ("data", None if is_given(config.data) else config.data, (*DATASETS, f"{GIVEN}NAME")),
        ("optimizer", config.optimizer, tuple(OPTIMIZERS)),
        ("head", config.head, HEADS),
        ("head_init", config.head_init, HEAD_INITS),
        ("lr_schedule", config.lr_schedule, LR_SCHEDULES),
        ("cosine_start", config.cosine_start, COSINE_STARTS),
        ("focal_mean", config.focal_mean, MEANS),
        ("kind", config.kind, IMBALANCE_KINDS),
        ("corrupt", config.corrupt, CORRUPT_POLICIES),
        ("exif", config.exif, EXIF),
        ("rho_schedule", config.rho_schedule, RHO_SCHEDULES),
        ("weighting", config.weighting, WEIGHTINGS),
        ("sampling", config.sampling, SAMPLINGS),
        ("noise_on", config.noise_on, NOISE_ON),
        ("select", config.select, SELECTIONS),
        ("precision", config.precision, PRECISIONS),
    )
    for kind, name, valid in choices:
        if name is not None and name not in valid:
            raise unknown(kind, name, valid)


def _check_owners(config: TrainConfig) -> None:
    choices = choices_of(vars(config))
    for item in fields(config):
        value = getattr(config, item.name)
        if value is not None:
            check_applies(item.name, choices)
        elif applies(item.name, choices) and not item.metadata.get("optional", False):
            raise UsageError(f"{item.name} is missing: {item.metadata['help']}")


def _check_head(config: TrainConfig) -> None:
    loss = config.parsed_method.loss
    if (config.head == "cosine") != (loss == "ldam"):
        raise UsageError(
            f"head {config.head} does not go with {loss}: ldam alone scales its logits, so it needs "
            "cosines, and no other loss can learn from them"
        )


def _check_values(config: TrainConfig) -> None:
    def check(name: str, *, low: float, high: float = math.inf, open_low: bool = False) -> None:
        given = getattr(config, name)
        values = given if isinstance(given, tuple) else () if given is None else (given,)
        for value in values:
            fits = math.isfinite(value) and value <= high
            if not (fits and (value > low if open_low else value >= low)):
                bound = f"above {low:g}" if open_low else f"at least {low:g}"
                if math.isinf(low):
                    bound = "finite"
                limit = "" if math.isinf(high) else f" and at most {high:g}"
                raise UsageError(f"{name} must be {bound}{limit}, got {value}")

    check("epochs", low=1, high=10**6)
    check("batch_size", low=1, high=2**31 - 1)
    check("lr", low=0, open_low=True)
    check("momentum", low=0, high=1)
    check("weight_decay", low=0)
    check("warmup_epochs", low=0, high=config.epochs)
    check("lr_milestones", low=1)
    check("lr_factors", low=0)
    check("defer_epoch", low=0)
    check("beta", low=0, high=1)
    check("max_margin", low=0)
    check("scale", low=0, high=10**6, open_low=True)
    check("focal_gamma", low=0)
    check("gamma", low=0, high=1000)
    check("tau", low=0, high=1000)
    check("eql_threshold", low=0, high=1)
    check("eql_drop", low=0, high=1)
    check("ib_alpha", low=0, open_low=True)
    check("paco_alpha", low=0)
    check("paco_temperature", low=0, open_low=True)
    check("paco_queue", low=1, high=2**20)
    check("paco_projection", low=1, high=2**14)
    check("rho", low=0)
    check("rho_milestones", low=1)
    check("posthoc_tau", low=-1000, high=1000)
    check("imbalance", low=1)
    check("image_size", low=1, high=4096)
    check("workers", low=0, high=1024)
    check("look_every", low=1, high=10**9)
    check("look_alpha", low=0)
    check("noise_sigma", low=0)
    check("lpf_gamma", low=0)
    check("lpf_parts", low=1, high=config.batch_size)
    check("entropy_steps", low=1, high=10**6)
    check("entropy_lr", low=0, open_low=True)
    check("entropy_gamma", low=0, open_low=True)
    check("entropy_noise", low=0)
    check("entropy_alpha", low=0, high=1)
    check("seed", low=0, high=2**63 - 1)
    check("threads", low=0, high=1024)
    check("subset_seed", low=0, high=2**32 - 1)
    check("value_range", low=-math.inf)
    if config.value_range is not None and not (
        len(config.value_range) == 2 and config.value_range[0] < config.value_range[1]
    ):
        raise UsageError(f"value_range needs two rising values, got {config.value_range}")


def _check_schedules(config: TrainConfig) -> None:
    def rising(name: str) -> tuple[int, ...]:
        milestones: tuple[int, ...] = getattr(config, name) or ()
        if list(milestones) != sorted(milestones) or any(m > config.epochs for m in milestones):
            raise UsageError(
                f"{name} must rise and be at most epochs ({config.epochs}), got {milestones}"
            )
        return milestones

    if config.defer_epoch is not None and config.defer_epoch >= config.epochs:
        raise UsageError(
            f"defer_epoch must be below epochs ({config.epochs}), got {config.defer_epoch}: "
            f"{config.method} would never take effect"
        )
    if config.nesterov and config.momentum == 0:
        raise UsageError("nesterov needs a momentum above 0")
    milestones = rising("lr_milestones")
    if len(milestones) != len(config.lr_factors or ()):
        raise UsageError(
            f"lr_factors needs one value per milestone: {len(milestones)} expected, "
            f"got {len(config.lr_factors or ())}"
        )
    if config.rho is not None:
        expected = {"constant": 1, "linear": 2, "deferred": 2}
        steps = len(rising("rho_milestones")) + 1
        needed = expected.get(config.rho_schedule or "", steps)
        if len(config.rho) != needed:
            raise UsageError(
                f"rho needs {needed} value(s) with rho_schedule {config.rho_schedule}, "
                f"got {len(config.rho)}; for a fixed radius choose rho_schedule constant"
            )
        if config.rho_schedule == "deferred" and config.defer_epoch is None:
            raise UsageError(
                "rho_schedule deferred needs a method with a deferral epoch (drw, drs)"
            )
