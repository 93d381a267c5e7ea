"""Every setting of a training run: common ones, and those of the parts that the run is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any, Literal, get_type_hints

from fastsam.longtail.data.catalog import DATASETS
from fastsam.longtail.errors import UsageError, unknown
from fastsam.longtail.losses.base import LOSSES
from fastsam.longtail.methods import RULES, Method
from fastsam.longtail.models.base import MODELS
from fastsam.longtail.models.heads import HEADS
from fastsam.longtail.optimizers.base import OPTIMIZERS
from fastsam.longtail.registry import Registry, RunPart, registered_settings, registries
from fastsam.longtail.schedules import LR_SCHEDULES
from fastsam.longtail.settings import Settings, check_values, setting, settings_of
from fastsam.records import build

FORMAT = 2
"""Version of the stored form. Version 1 stored a None for every setting that a run does not have."""
_RECORD = ("format", "plugins")
"""What the stored form has besides settings."""

Precision = Literal["float32", "bfloat16"]
Selection = Literal["last", "best-validation"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """The settings of one run; every value is final.

    A run is made of parts: a data set, a loss, a rule, an optimizer, a network, a head, schedules.
    Each part has settings of its own, in ``parts``; they are read like the common ones,
    ``config.rho`` for instance. A setting of a part that the run does not have is None.

    :func:`fastsam.longtail.recipe` fills in published values; :meth:`create` takes all of them by
    hand.

    Attributes:
        parts: the settings of each part by its kind: ``data``, ``loss``, ``rule``, ``optimizer``,
            ``model``, ``head``, ``lr_schedule``, and others that these name.

    Raises:
        UsageError: for an unknown name, a value out of range, a setting that is missing, or one
            that the chosen parts do not have.

    Example:
        >>> from fastsam.longtail import recipe
        >>> config = recipe("digits-lt", "ce-drw", "sam", rho=0.1).config()
        >>> config.rho, config.parts["loss"]
        ((0.1,), NoSettings())
    """

    data: str = setting("data set", names=DATASETS)
    method: str = setting("loss[-rule], for instance ce, ce-drw, ldam-drw, vs")
    optimizer: str = setting("optimizer", names=OPTIMIZERS)

    model: str = setting("network", names=MODELS)
    head: str = setting("classifier: linear or cosine", default="linear", names=HEADS)
    epochs: int = setting("passes over the training set", low=1, high=10**6)
    batch_size: int = setting("images in a batch", low=1, high=2**31 - 1)
    augment: bool = setting("draw the data set's training augmentation", default=True)

    lr: float = setting("learning rate after warm-up", above=0)
    weight_decay: float = setting("L2 penalty of SGD, on every parameter", low=0)
    warmup_epochs: int = setting(
        "epochs of linear warm-up: lr * epoch / warmup_epochs", low=0, scaled=0
    )
    lr_schedule: str = setting("after warm-up: multistep or cosine", names=LR_SCHEDULES)

    select: Selection = setting(
        "weights that are judged: last epoch, or best-validation epoch",
        default="last",
        before="last",
    )
    validate_every: int = setting(
        "epochs from one evaluation on the validation set to the next; the last epoch always has one",
        default=1,
        before=1,
        low=1,
    )
    ema: float | None = setting(
        "decay of an exponential average of the weights and the running statistics, at least 0 and below "
        "1, updated after every step: the average is judged in place of the weights, which train on. 0 "
        "judges the weights; by default there is no average",
        optional=True,
        low=0,
    )
    posthoc_tau: float = setting(
        "post-hoc logit adjustment at test time: minus tau times log prior",
        default=0.0,
        before=0.0,
        low=-1000,
        high=1000,
    )
    seed: int = setting(
        "seed of weights, order and augmentation", default=0, before=0, low=0, high=2**63 - 1
    )
    precision: Precision = setting(
        "of the passes in training: float32, or bfloat16 by autocast",
        default="float32",
        before="float32",
    )
    channels_last: bool = setting(
        "keep the channels of images and filters together in memory: the order that "
        "convolutions in bfloat16 want on a GPU, and often the faster one on a CPU",
        default=False,
        before=False,
    )
    device: str = setting("device: cpu, cuda, cuda:1, ...", default="cpu", before="cpu", place=True)
    threads: int = setting(
        "CPU threads; 0 leaves torch's own choice", default=0, before=0, low=0, high=1024
    )

    parts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        flat = self.flat()
        chosen = chosen_parts(flat)
        for kind, part in chosen.items():
            if type(self.parts.get(kind)) is not part.settings:
                raise UsageError(
                    f"the settings of {kind} {part.name} are missing; use TrainConfig.create() or "
                    "config.replace(), which find them by name"
                )
        run = {**flat, "parts": self.parts}
        if self.warmup_epochs > self.epochs:
            raise UsageError(
                f"warmup_epochs must be at least 0 and at most {self.epochs}, got {self.warmup_epochs}"
            )
        if self.ema is not None and self.ema >= 1:
            raise UsageError(
                f"ema must be below 1, got {self.ema:g}: the average would never move; try 0.99"
            )
        needed = chosen["loss"].head
        if needed is not None and self.head != needed:
            raise UsageError(
                f"loss {self.parsed_method.loss!r} requires head={needed!r}, got {self.head!r}"
            )
        for settings in self.parts.values():
            settings.check(run)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and name != "parts":
            for settings in self.parts.values():
                if name in settings.__dataclass_fields__:
                    return getattr(settings, name)
            if name in registered_settings():
                return None
        raise AttributeError(f"there is no setting {name!r}")

    def flat(self) -> dict[str, Any]:
        """Every setting of the run by name."""
        values = {item.name: getattr(self, item.name) for item in settings_of(TrainConfig)}
        for settings in self.parts.values():
            for item in settings_of(type(settings)):
                values[item.name] = getattr(settings, item.name)
        return values

    def replace(self, **values: Any) -> TrainConfig:
        """The same run with some settings changed; settings of parts that change must be given."""
        return TrainConfig.create(**{**self.flat(), **values})

    @property
    def run(self) -> dict[str, Any]:
        """:meth:`flat` and ``parts``, as the parts of a run are given it."""
        return {**self.flat(), "parts": self.parts}

    @property
    def parsed_method(self) -> Method:
        """The method, taken apart."""
        return Method.parse(self.method)

    def as_dict(self) -> dict[str, Any]:
        """The stored form: plain values that JSON and ``torch.load(weights_only=True)`` accept."""
        values = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in self.flat().items()
            if value is not None
        }
        outside = {
            f"{kind} {part.name}": part.package
            for kind, part in chosen_parts(values).items()
            if part.package != "fastsam"
        }
        return {"format": FORMAT, **values, **({"plugins": outside} if outside else {})}

    @classmethod
    def create(cls, **values: Any) -> TrainConfig:
        """A run of its settings by name; every setting that its parts have must be given.

        Raises:
            UsageError: for a setting that does not exist, is missing, or is of a wrong type.
        """
        values = {name: value for name, value in values.items() if value is not None}
        common = {item.name: item for item in settings_of(cls)}
        for name in ("data", "method", "optimizer"):
            if name not in values:
                raise UsageError(f"{name} is missing: {common[name].metadata['help']}")
            if not isinstance(values[name], str):
                raise UsageError(f"{name} must be str, got {values[name]!r:.60}")
        chosen = chosen_parts(values)
        for name in values:
            check_applies(name, chosen)
        values |= before(values)
        check_values(cls, values)  # first those that others depend on
        settings = {kind: _built(part.settings, values) for kind, part in chosen.items()}
        config: TrainConfig = _built(cls, values, parts=settings)
        return config

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of :meth:`as_dict`, also of older versions.

        Raises:
            UsageError: for a setting that does not exist, is missing, or is of a wrong type, or a
                plug-in that is missing.
        """
        if not isinstance(values, Mapping):
            raise UsageError(f"settings must be a mapping, got {values!r:.60}")
        values = dict(values)
        version, plugins = values.pop("format", 1), values.pop("plugins", {})
        if version not in (1, FORMAT):
            raise UsageError(
                f"settings have format {version!r:.20}, this version reads 1 and {FORMAT}"
            )
        try:
            return cls.create(**values)
        except UsageError as error:
            missing = plugins if isinstance(plugins, dict) else {}
            if not missing:
                raise
            what = ", ".join(f"{part} of package {package}" for part, package in missing.items())
            raise UsageError(f"{error}; the run was made with plug-ins: {what}") from error


def _built(cls: type[Any], values: Mapping[str, Any], **more: Any) -> Any:
    """A settings dataclass of those of ``values`` that are its own."""
    own: dict[str, Any] = {}
    for item in settings_of(cls):
        if item.name in values:
            own[item.name] = values[item.name]
        elif item.default is MISSING:
            raise UsageError(f"{item.name} is missing: {item.metadata['help']}")
    try:
        return build(cls, own, **more)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error


def chosen_parts(values: Mapping[str, Any]) -> dict[str, Any]:
    """The parts that settings name, by kind, and those that settings of these parts name in turn.

    Args:
        values: settings by name; at least ``data``, ``method`` and ``optimizer``. A part whose name
            is not among them is left out.

    Raises:
        UsageError: for an unknown name.
    """
    method = Method.parse(values["method"])
    chosen: dict[str, RunPart] = {"loss": LOSSES[method.loss], "rule": RULES[method.rule]}

    def add(settings: type[Settings]) -> None:
        for item in settings_of(settings):
            registry: Registry[Any] | None = item.metadata["names"]
            if registry is not None and values.get(item.name) is not None:
                chosen[registry.kind] = registry[values[item.name]]
                add(chosen[registry.kind].settings)

    add(TrainConfig)
    for part in list(chosen.values()):
        add(part.settings)
    return chosen


def applies(name: str, chosen: Mapping[str, RunPart]) -> bool:
    """Whether a run of these parts has the setting called ``name``.

    Raises:
        UsageError: if there is no such setting at all.
    """
    if name in TrainConfig.__dataclass_fields__ and name != "parts":
        return True
    if any(name in part.settings.__dataclass_fields__ for part in chosen.values()):
        return True
    if name in registered_settings() or name in registered_settings(plugins=True):
        return False
    common = (item.name for item in settings_of(TrainConfig))
    raise unknown("setting", name, sorted({*common, *registered_settings()}))


def check_applies(name: str, chosen: Mapping[str, RunPart]) -> None:
    """Raise :class:`UsageError` unless a run of these parts has the setting called ``name``."""
    if not applies(name, chosen):
        owners = {
            registry.kind: names
            for registry in registries()
            if (
                names := [
                    shown
                    for shown, part in registry.examples().items()
                    if name in part.settings.__dataclass_fields__
                ]
            )
        }
        reasons = " or ".join(f"{kind} {', '.join(names)}" for kind, names in owners.items())
        have = ", ".join(
            f"{kind} {chosen[kind].name if kind in chosen else 'none'}" for kind in owners
        )
        raise UsageError(f"{name} needs {reasons}, but the run has {have}")


def find_setting(name: str) -> tuple[Any, Any]:
    """Field and type of a setting, common or of a part.

    Raises:
        UsageError: if there is no such setting.
    """
    hints = get_type_hints(TrainConfig)
    known = {item.name: (item, hints[item.name]) for item in settings_of(TrainConfig)}
    if name not in known:
        known |= registered_settings(plugins=name not in registered_settings())
    if name not in known:
        raise unknown("setting", name, sorted(known))
    return known[name]


def before(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the settings were that ``values``, perhaps of an older version, do not name."""
    if any(name not in values for name in ("data", "method", "optimizer")):
        return {}
    found = {}
    for cls in (TrainConfig, *(part.settings for part in chosen_parts(values).values())):
        for item in settings_of(cls):
            if values.get(item.name) is None and item.metadata["before"] is not None:
                found[item.name] = item.metadata["before"]
    return found


def place_settings() -> Iterator[str]:
    """Names of the settings that say only where a run takes place."""
    every = {item.name: item for item in settings_of(TrainConfig)}
    every |= {name: item for name, (item, _) in registered_settings().items()}
    return (name for name, item in every.items() if item.metadata["place"])


def differences(
    one: Mapping[str, Any], other: Mapping[str, Any], *, same_content: bool = False
) -> list[str]:
    """Names of the settings that make two runs different ones.

    Settings of where a run takes place do not, unless the data are the user's own and their folder
    is all that says which. A setting that one of them lacks, as of an older version, has the value
    that it had before it became a setting.

    Args:
        one: settings as :meth:`TrainConfig.as_dict` gives them, perhaps of another version.
        other: the same of another run.
        same_content: whether the contents of the data are known and are compared otherwise.
    """
    one, other = ({**settings_in(values), **_known_before(values)} for values in (one, other))
    own = not same_content and is_own(str(one.get("data")))
    place = {name for name in place_settings() if name != "data_root" or not own}
    return [
        name for name in {**one, **other} if name not in place and one.get(name) != other.get(name)
    ]


def settings_in(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a stored form of any version, without those that the run does not have."""
    return {k: v for k, v in stored.items() if k not in _RECORD and v is not None}


def is_own(data: str) -> bool:
    """Whether a data set is whatever lies in the folder that it is given."""
    part = DATASETS.get(data)
    return part is not None and bool(part.own)


def _known_before(values: Mapping[str, Any]) -> dict[str, Any]:
    """:func:`before`, empty where a part is not known here."""
    try:
        return before(values)
    except UsageError:
        return {}
