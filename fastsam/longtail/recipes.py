"""Recipes: the published settings of a data set, a method and an optimizer, with their sources.

Each part declares its published values next to its code. A recipe is merged from these values and from the
table of exact combinations below, which overrides them. ``[paper]`` is Rangwani et al., "Escaping Saddle
Points for Effective Generalization on Class-Imbalanced Data" (NeurIPS 2022), ``[code]`` is the code of its
authors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastsam.longtail.base_optimizers.base import BASE_OPTIMIZERS
from fastsam.longtail.config import (
    TrainConfig,
    applies,
    check_applies,
    chosen_parts,
    find_setting,
)
from fastsam.longtail.data.catalog import DATASETS
from fastsam.longtail.data.shared_recipes import (
    CODE,
    LAST_BLOCK,
    MISLAS,
    PACO,
    PACO_CIFAR100,
    SMOOTHING,
    STARTING_POINTS,
)
from fastsam.longtail.errors import UsageError
from fastsam.longtail.losses.base import LOSSES
from fastsam.longtail.methods import RULES, Method
from fastsam.longtail.models.base import MODELS
from fastsam.longtail.named_recipes import NAMED_RECIPES, STANDARD
from fastsam.longtail.optimizers.base import OPTIMIZERS, base_of
from fastsam.longtail.settings import (
    Entry,
    Layer,
    Settings,
    borrowed,
    current_value,
    factor_text,
    layer,
    matching,
    settings_of,
)
from fastsam.longtail.stages.base import STAGES

_RUNS = "[code] run.sh"


def _stepped(source: str, *rho: float, known: bool = True) -> dict[str, Entry]:
    """Return a stepped rho with values for epochs 1-5, 6-60, 61-75 and 76-90."""
    return layer(source, known=known, rho=rho, rho_schedule="step", rho_milestones=(5, 60, 75))


_LIKE_DRW = "rho of ce-drw"
_PACO_CIFAR100: Layer = {
    **PACO_CIFAR100,
    **layer(PACO, paco_alpha=0.01, paco_temperature=0.05, paco_queue=1024, paco_projection=32),
}
_PACO_LARGE: Layer = layer(
    PACO,
    lr=0.02,
    epochs=400,
    batch_size=128,
    warmup_epochs=10,
    lr_schedule="cosine",
    cosine_start="after-warmup",
    paco_alpha=0.05,
    paco_temperature=0.2,
    paco_queue=8192,
    paco_projection=128,
)
_PACO_STEPS: Layer = layer("scaled from 90 epochs", known=False, rho_milestones=(23, 267, 334))
_IB: Layer = layer(
    "code of Park et al. 2021",
    lr_milestones=(100, 160, 180),
    lr_factors=(0.01, 1e-4, 1e-6),
    defer_epoch=100,
)


def _rho(*values: float) -> dict[str, Entry]:
    return layer(_RUNS, rho=values)


# (data, method, optimizer) with shell wildcards; later entries override earlier ones.
EXACT: dict[tuple[str, str, str], Layer] = {
    ("digits-lt", "*", "sam"): layer(
        "chosen for runs of a few seconds; not tuned (compared in docs/results.md)",
        rho=(0.05,),
    ),
    ("cifar10-lt", "ce", "sam"): _rho(0.1),
    ("cifar10-lt", "ce-drw", "sam"): _rho(0.5),
    ("cifar10-lt", "ldam-drw", "sam"): _rho(0.8),
    ("cifar100-lt", "ce", "sam"): _rho(0.2),
    ("cifar100-lt", "ce-drw", "sam"): _rho(0.8),
    ("cifar100-lt", "ldam-drw", "sam"): _rho(0.8),
    ("imagenet-lt", "*", "sam"): _stepped(_LIKE_DRW, 0.05, 0.1, 0.5, 0.5, known=False),
    ("inaturalist18", "*", "sam"): _stepped(_LIKE_DRW, 0.05, 0.1, 0.1, 0.2, known=False),
    ("imagenet-lt", "ce-drw", "sam"): _stepped(_RUNS, 0.05, 0.1, 0.5, 0.5),
    ("imagenet-lt", "ldam-drw", "sam"): _stepped(_RUNS, 0.05, 0.1, 0.5, 0.5),
    ("inaturalist18", "ce-drw", "sam"): _stepped(_RUNS, 0.05, 0.1, 0.1, 0.2),
    ("inaturalist18", "ldam-drw", "sam"): _stepped(_RUNS, 0.05, 0.1, 0.5, 0.5),
    ("imagenet-lt", "ldam*", "*"): layer(CODE, max_margin=0.3),
    ("inaturalist18", "ldam*", "*"): layer(CODE, max_margin=0.3, weight_decay=1e-4),
    ("inaturalist18", "lade*", "*"): layer(
        "code of Hong et al. 2021", lade_alpha=0.05, lade_lambda=0.5
    ),
    ("cifar*-lt", "ib*", "*"): _IB,
    ("cifar10-lt", "paco*", "*"): borrowed(_PACO_CIFAR100, "the CIFAR-100-LT recipe"),
    ("cifar100-lt", "paco*", "*"): _PACO_CIFAR100,
    ("imagenet-lt", "paco*", "*"): {**_PACO_LARGE, **layer(PACO, weight_decay=5e-4)},
    ("inaturalist18", "paco*", "*"): {**_PACO_LARGE, **layer(PACO, weight_decay=1e-4)},
    ("places-lt", "paco*", "*"): {
        **_PACO_LARGE,
        **layer(PACO, epochs=30, warmup_epochs=5, weight_decay=5e-4),
    },
    ("imagenet-lt", "paco*", "sam"): _PACO_STEPS,
    ("inaturalist18", "paco*", "sam"): _PACO_STEPS,
}

_YUN = "code of Yun et al. 2019 (ImageNet)"
EXACT |= {
    (data, "*", "*"): layer(MISLAS, mixup_alpha=0.2) | layer(_YUN, cutmix_probability=1.0)
    for data in ("imagenet-lt", "inaturalist18", "places-lt")
}

# rho of CIFAR-10-LT, as starting points for other data sets of real images.
EXACT |= {
    (data, method, optimizer): borrowed(values, "the recipe of cifar10-lt; not tuned")
    for data in ("fashion-mnist-lt", "torchvision:*")
    for (known, method, optimizer), values in EXACT.items()
    if known == "cifar10-lt" and optimizer == "sam"
}

# (data, imbalance factor, method)
FACTORS: dict[tuple[str, str, str], Layer] = {
    (data, factor, "las*"): values for (data, factor), values in SMOOTHING.items()
}
"""Values of methods that depend on the imbalance factor, with their sources."""

# (data, network, method)
NETWORKS: dict[tuple[str, str, str], Layer] = {
    # ResNets with three blocks in the last layer. Other networks start from random weights.
    ("places-lt", "resnet50", "*"): LAST_BLOCK,
    ("places-lt", "resnet101", "*"): LAST_BLOCK,
    ("places-lt", "resnet152", "*"): LAST_BLOCK,
}
# PaCo's code freezes the convolutions before the last block, and trains all batch normalization.
NETWORKS |= {
    (data, network, "paco*"): layer(
        PACO,
        freeze=(
            "features.network.conv1.*",
            "features.network.layer[123].*.conv*",
            "features.network.layer[123].*.downsample.0.*",
            "features.network.layer4.[01].conv*",
            "features.network.layer4.0.downsample.0.*",
        ),
        lr_scale=(),
    )
    for data, network, _ in tuple(NETWORKS)
}
"""Start weights and trained parameters of a network on a data set, with their sources."""

NAMES = ("data", "method", "optimizer")
"""Settings that determine a recipe."""
GIVEN = "given"
"""Source of values that the user passes."""


@dataclass(frozen=True)
class Recipe:
    """The settings of a data set, method and optimizer, and their sources.

    Attributes:
        data: name of the data set.
        method: method, ``LOSS`` or ``LOSS-RULE``.
        optimizer: name of the optimizer.
        entries: every setting of the run, by name.
    """

    data: str
    method: str
    optimizer: str
    entries: dict[str, Entry]

    def override(self, **values: Any) -> Recipe:
        """Return a copy with some settings replaced.

        A new number of ``epochs`` scales milestones and other epochs of the recipe in proportion, rounded up,
        unless they are passed too.

        Raises:
            UsageError: if a setting does not exist, or does not belong to this data, method or optimizer.
        """
        given = {name: e.value for name, e in self.entries.items() if e.source == GIVEN}
        return recipe(self.data, self.method, self.optimizer, **(given | values))

    def config(self) -> TrainConfig:
        """Create the configuration of a run.

        Raises:
            UsageError: if a value is out of range, or a setting has no value.
        """
        return TrainConfig.create(**self._names | self._values)

    @property
    def sources(self) -> dict[str, str]:
        """Source of each setting, by name. Values that were not published are marked."""
        return {
            name: entry.source + ("" if entry.known else " (not a published value)")
            for name, entry in self.entries.items()
        }

    @property
    def _names(self) -> dict[str, Any]:
        return {"data": self.data, "method": self.method, "optimizer": self.optimizer}

    @property
    def _values(self) -> dict[str, Any]:
        return {name: entry.value for name, entry in self.entries.items()}


def recipe(data: str, method: str, optimizer: str, **overrides: Any) -> Recipe:
    """Return the recipe of a data set, method and optimizer: its published settings.

    Args:
        data: one of :data:`fastsam.longtail.data.DATASETS`, or ``own:NAME`` for your own data, which
            you pass to :class:`~fastsam.longtail.Trainer`.
        method: method, ``LOSS`` or ``LOSS-RULE``; see :mod:`fastsam.longtail.methods`.
        optimizer: one of :data:`fastsam.longtail.optimizers.OPTIMIZERS`.
        **overrides: settings that replace the published ones. A setting with one value per phase also
            accepts a single number, for one phase.

    Raises:
        UsageError: if a name is unknown, or a setting does not belong to the combination.

    Example:
        >>> recipe("digits-lt", "ce-drw", "sam", rho=0.1).config().rho
        (0.1,)
    """
    names = {"data": data, "method": method, "optimizer": optimizer}
    for name in names.keys() & overrides.keys():
        raise UsageError(f"got two values for {name}; pass it once")
    data_part, optimizer_part, parsed = DATASETS[data], OPTIMIZERS[optimizer], Method.parse(method)
    entries: dict[str, Entry] = {
        **_starting_points(data_part.recipe),
        **data_part.recipe,
        **LOSSES[parsed.loss].recipe,
        **RULES[parsed.rule].recipe,
        **optimizer_part.recipe,
    }
    entries |= matching(EXACT, data, method, optimizer)
    start = entries.get("imbalance", Entry(None, ""))
    imbalance = overrides.get("imbalance", start.value)
    entries |= matching(FACTORS, data, factor_text(imbalance), method)
    named = NAMED_RECIPES[overrides.get("recipe") or STANDARD].values(data, imbalance, method)
    entries = _with_layer(names, entries, named)
    network = overrides.get("model") or entries.get("model", Entry("", "")).value
    entries |= matching(NETWORKS, data, network, method)
    if overrides.get("init") is not None:
        entries.pop("pretrained", None)
    base = overrides.get("base_optimizer", optimizer_part.base)
    if base is not None:  # learning rates of SGD do not suit others
        entries |= BASE_OPTIMIZERS[base].recipe
    stage = STAGES[overrides.get("stages") or "none"].first(data, imbalance, base)
    both = sorted(n for n in named.keys() & stage if named[n].value != stage[n].value)
    if both:
        raise UsageError(
            f"recipe {overrides['recipe']!r} and stages {overrides['stages']!r} both set {', '.join(both)}; "
            "omit one of them, and pass what you want of its settings"
        )
    entries = _with_layer(names, entries, stage)
    given = {name: Entry(_converted(name, v), GIVEN) for name, v in overrides.items()}
    published = _completed(names, entries)
    if "epochs" in given:
        entries |= rescaled(published, given["epochs"].value)
    entries = _completed(names, entries | given)
    chosen = chosen_parts(names | {name: entry.value for name, entry in entries.items()})
    for name in given:
        check_applies(name, chosen)
    kept = {name: entry for name, entry in entries.items() if applies(name, chosen)}
    return Recipe(data, method, optimizer, kept)


def inherited_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that another run may take over, by name: all but ``NAMES`` and stages.

    The base optimizer is among them, also if the run has no ascent.
    """
    left_out = (*NAMES, "stages", "stage_set")
    found = {k: v for k, v in config.flat().items() if k not in left_out and v is not None}
    base = base_of(config)
    return found if base is None else {"base_optimizer": base, **found}


def inherited_recipe(
    names: Mapping[str, str], inherited: Mapping[str, Any], overrides: Mapping[str, Any]
) -> Recipe:
    """Return the recipe of a run that takes over settings of another run.

    Args:
        names: data set, method and optimizer.
        inherited: settings of the other run. Those that the run does not have are left out.
        overrides: settings that replace them.

    Raises:
        UsageError: if a setting of ``overrides`` does not belong to the run.
    """
    # None, too: the recipe of a data set may name weights.
    inherited = {"pretrained": None, **inherited}
    chosen = chosen_parts({**inherited, **overrides, **names})
    kept = {name: value for name, value in inherited.items() if applies(name, chosen)}
    return recipe(**names, **{**kept, **overrides})


def _starting_points(recipe: Layer) -> Layer:
    """Return default training settings for a recipe without any, scaled to its number of epochs."""
    if "lr_schedule" in recipe:
        return {}
    start = dict(STARTING_POINTS)
    return start | rescaled(start, recipe["epochs"].value) if "epochs" in recipe else start


def _completed(names: Mapping[str, Any], entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Complete ``entries`` by the recipe of the network and the defaults of every part's settings."""
    entries = dict(entries)
    if "model" in entries:
        entries = {**MODELS[entries["model"].value].recipe, **entries}
    missing = True
    while missing:  # a default may select a part whose settings have defaults too
        chosen = chosen_parts(dict(names) | {name: entry.value for name, entry in entries.items()})
        kinds: list[type[Settings]] = [TrainConfig, *(part.settings for part in chosen.values())]
        defaults = {
            item.name: item.metadata["default"]
            for settings in kinds
            for item in settings_of(settings)
            if isinstance(item.metadata["default"], Entry)
        }
        missing = bool(defaults.keys() - entries.keys())
        entries = {**defaults, **entries}
    return entries


def _with_layer(
    names: Mapping[str, Any], entries: Mapping[str, Entry], values: Layer
) -> dict[str, Entry]:
    """Override ``entries`` by ``values``, whose number of epochs scales the schedules of ``entries``."""
    scaled = {}
    if "epochs" in values:
        scaled = rescaled(_completed(names, entries), values["epochs"].value)
    return {**entries, **scaled, **values}


def _converted(name: str, value: Any) -> Any:
    """Convert a former value, and a number if the setting is a tuple, with one value, or a string."""
    value = current_value(find_setting(name)[0], value)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return value
    hint = find_setting(name)[1]
    if hint is str:
        return str(value)
    return (value,) if "tuple" in str(hint) else value


def rescaled(published: Mapping[str, Entry], epochs: int) -> dict[str, Entry]:
    """Return the epochs in a recipe's schedules, scaled to another number of epochs."""
    length: int = published["epochs"].value
    source = f"scaled from {length} epochs"
    stretched = {}
    for name, entry in published.items():
        after = find_setting(name)[0].metadata["scaled"]
        if after is None or epochs == length:
            continue
        several = isinstance(entry.value, tuple)
        old = entry.value if several else (entry.value,)
        new = tuple(min(math.ceil(e * epochs / length), epochs - after) for e in old)
        stretched[name] = Entry(new if several else new[0], source, entry.known)
    return stretched
