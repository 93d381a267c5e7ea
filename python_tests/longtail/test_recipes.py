"""Settings: recipes, overrides, checks, schedules."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch

from fastsam.longtail import TrainConfig, recipe
from fastsam.longtail.build import build_network, build_schedules
from fastsam.longtail.data import DATASETS, load_dataset
from fastsam.longtail.data.worker_count import cores_of_rank, default_workers
from fastsam.longtail.errors import UsageError
from fastsam.longtail.losses import LOSSES
from fastsam.longtail.methods import RULES, Method
from fastsam.longtail.named_recipes import NAMED_RECIPES, STANDARD
from fastsam.longtail.optimizers import OPTIMIZERS
from fastsam.longtail.registry import registered_settings
from fastsam.longtail.stage_plan import plan_stages
from fastsam.longtail.trainable import freeze, trained_parameters

METHODS = [
    loss if rule == "none" else f"{loss}-{rule}"
    for loss in LOSSES
    for rule in RULES
    if not (LOSSES[loss].balances_classes and rule in ("rw", "drw"))
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_every_combination_has_a_complete_recipe(method: str, optimizer: str) -> None:
    for data in DATASETS:
        chosen = recipe(data, method, optimizer)
        config = chosen.config()
        assert Method.parse(method).name == method
        assert TrainConfig.from_dict(json.loads(json.dumps(config.as_dict()))) == config
        applied = config.as_dict().keys() - {"format"}
        named = {"data", "method", "optimizer"}
        assert applied - named <= set(chosen.entries)
        assert all(entry.source for entry in chosen.entries.values())


@pytest.mark.parametrize(
    ("method", "optimizer", "overrides", "message"),
    [
        (
            "ce",
            "sgd",
            {"rho": (0.1,)},
            "rho requires optimizer asam, looksam, sam.*run has optimizer sgd",
        ),
        ("ce", "sam", {"rho": (-0.1,)}, "rho must be at least 0, got -0.1"),
        ("ce", "sam", {"rho": (math.nan,)}, "rho must be at least 0, got nan"),
        ("ce", "sam", {"rho": (math.inf,)}, "rho must be"),
        ("ce", "sam", {"rho": (0.1, 0.2)}, "rho must have 1 value"),
        ("ce", "sam", {"rho_schedule": "step"}, "rho_milestones is missing"),
        ("ce", "sam", {"rho_schedule": "steps"}, "constant, deferred, linear, step"),
        ("ce", "sam", {"rho_schedule": "deferred", "rho": (0.1, 0.2)}, "deferral epoch"),
        ("ce", "sam", {"rho_milestones": (3,)}, "rho_milestones requires rho_schedule step"),
        ("ce", "sgd", {"tau": 1.0}, "tau requires loss la, vs.*run has loss ce"),
        ("ce", "sgd", {"beta": 0.9}, "beta requires weighting effective"),
        (
            "ce-drw",
            "sgd",
            {"beta": 0.9, "weighting": "inverse"},
            "beta requires weighting effective",
        ),
        ("ce-drw", "sgd", {"defer_epoch": 100}, "would never begin"),
        ("ce", "sgd", {"defer_epoch": 10}, "defer_epoch requires loss ib or rule drs, drw"),
        ("ce", "sgd", {"epochs": 0}, "epochs must be at least 1"),
        ("ce", "sgd", {"batch_size": 0}, "batch_size"),
        ("ce", "sgd", {"lr": 0.0}, "lr must be above 0"),
        ("ce", "sgd", {"lr": math.nan}, "lr must be above 0"),
        ("ce", "sgd", {"imbalance": 0.5}, "imbalance"),
        ("ce", "sgd", {"kind": "linear"}, "exp, step"),
        ("ce", "sgd", {"lr_milestones": (90, 80)}, "must be in ascending order"),
        ("ce", "sgd", {"lr_milestones": (90, 101)}, "at most epochs"),
        ("ce", "sgd", {"lr_milestones": (90,)}, "one value for each"),
        ("ce", "sgd", {"lr_schedule": "cosine", "lr_factors": (1.0,)}, "lr_schedule multistep"),
        ("ce", "sgd", {"model": "resnet1"}, "resnet8"),
        ("ce", "sgd", {"learning_rate": 1.0}, "unknown setting 'learning_rate'"),
        (
            "ce",
            "assam",
            {},
            r"unknown optimizer 'assam', did you mean 'asam'\? valid: adam, adamw, asam, .*sgd",
        ),
        ("cee", "sgd", {}, "unknown method 'cee'.*ce, eql, focal"),
        (
            "ce-dr",
            "sgd",
            {},
            r"unknown method 'ce-dr', did you mean 'ce-drw'\? expected LOSS or LOSS-RULE",
        ),
        ("lda-drw", "sgd", {}, r"unknown method 'lda-drw', did you mean 'ldam-drw'\? expected"),
        (
            "ib-rww",
            "sgd",
            {},
            r"unknown method 'ib-rww', did you mean 'ib-rs'\? expected",
        ),  # ib-rw is invalid
        ("zzzzz", "sgd", {}, "unknown method 'zzzzz'; expected LOSS or LOSS-RULE"),
        ("ce-", "sgd", {}, "unknown method"),
        ("ce", "sgd", {"head": "cosine"}, "loss 'ce' requires head='linear', got 'cosine'"),
        ("ldam", "sgd", {"head": "linear"}, "loss 'ldam' requires head='cosine', got 'linear'"),
        ("ce", "entropy-sgd", {"nesterov": True}, "nesterov requires a momentum above 0"),
        ("ib-drw", "sgd", {}, "balances classes twice"),
    ],
)
def test_invalid_settings_are_rejected(
    method: str, optimizer: str, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        recipe("digits-lt", method, optimizer, **overrides).config()


def test_unknown_data_lists_the_valid_names() -> None:
    with pytest.raises(UsageError, match="digits-lt"):
        recipe("mnist", "ce", "sgd")


def test_an_unknown_setting_has_a_suggestion_and_no_list() -> None:
    with pytest.raises(UsageError, match=r"unknown setting 'epoch', did you mean 'epochs'\?$"):
        recipe("digits-lt", "ce", "sgd", epoch=3)
    with pytest.raises(
        UsageError, match=r"^data set folder has no setting 'root'; did you mean 'data_root'\?$"
    ):
        load_dataset("folder", root="x")
    with pytest.raises(UsageError, match=r"has no setting 'zzz'; valid: .*data_root"):
        load_dataset("folder", zzz=1)


def test_the_default_number_of_workers_fits_the_machine() -> None:
    entry = registered_settings()["workers"][0].metadata["default"]
    assert entry.value == default_workers(cores_of_rank())
    assert 1 <= entry.value <= 16


def test_a_stored_config_must_be_complete() -> None:
    values = recipe("digits-lt", "ce", "sgd").config().as_dict()
    with pytest.raises(UsageError, match="epochs is missing"):
        TrainConfig.from_dict({k: v for k, v in values.items() if k != "epochs"})
    with pytest.raises(UsageError, match="unknown setting 'epoch'"):
        TrainConfig.from_dict({**values, "epoch": 1})


def test_the_recipe_of_paco_names_what_is_published_for_the_data_set() -> None:
    known = {
        data: {
            name: value
            for name, value in recipe(data, "paco", "sgd").sources.items()
            if name in ("paco_alpha", "paco_temperature", "paco_queue", "paco_projection")
        }
        for data in ("cifar100-lt", "imagenet-lt", "inaturalist18", "places-lt", "digits-lt")
    }
    borrowed = known.pop("digits-lt").values()
    assert all("not a published value" in source for source in borrowed)
    assert all("Cui et al. 2021" in source for source in borrowed)
    published = {source for sources in known.values() for source in sources.values()}
    assert published == {"code of Cui et al. 2021"}
    places = recipe("places-lt", "paco", "sgd").config()
    assert (places.epochs, places.batch_size, places.warmup_epochs) == (30, 128, 5)
    assert (places.lr, places.weight_decay, places.lr_scale) == (0.02, 5e-4, ())


def test_paco_on_places_trains_the_last_block_and_all_batch_normalization() -> None:
    values = {"model": "resnet50", "pretrained": None, "head_init": "torch"}
    config = recipe("places-lt", "paco", "sgd", **values).config()
    network = build_network(config, 5, 3)
    names = [name for name, _ in network.named_parameters() if "key_encoder" not in name]
    frozen = [n for n in names if any(fnmatchcase(n, pattern) for pattern in config.freeze)]
    convolutions = [n for n in names if re.search(r"network\..*(conv\d|downsample\.0)\.weight", n)]
    last = [name for name in convolutions if "layer4.2." in name]
    assert sorted(frozen) == sorted(set(convolutions) - set(last))
    assert len(convolutions) == 53
    assert len(last) == 3


def test_runs_of_format_1_are_read() -> None:
    """Format 1 stored None for every setting that a run does not have, and no format."""
    for names in (("digits-lt", "ldam-drw", "sam"), ("cifar100-lt", "paco", "sgd")):
        config = recipe(*names).config()
        values = {k: v for k, v in config.as_dict().items() if k != "format"}
        older = {**dict.fromkeys(registered_settings()), **values}
        assert None in older.values()
        assert TrainConfig.from_dict(older) == config
    with pytest.raises(UsageError, match="format 3, but this version of fastsam reads 1 and 2"):
        TrainConfig.from_dict({**values, "format": 3})


def test_settings_are_read_by_their_flat_names() -> None:
    config = recipe("digits-lt", "ce-drw", "sgd").config()
    assert (config.beta, config.momentum, config.rho) == (0.9999, 0.9, None)
    with pytest.raises(AttributeError, match="no setting 'rhoo'"):
        _ = config.rhoo
    assert config.replace(beta=0.5).beta == 0.5
    assert replace(config, seed=5).seed == 5
    with pytest.raises(UsageError, match="beta must be at least 0 and at most 1"):
        config.replace(beta=2.0)
    with pytest.raises(
        UsageError, match=r"settings of rule drs are missing; call TrainConfig.create"
    ):
        replace(config, method="ce-drs")


def test_overrides_replace_value_and_source_and_nothing_else() -> None:
    plain, changed = (
        recipe("digits-lt", "vs", "sam", **kw) for kw in ({}, {"tau": 0.5, "seed": 7})
    )
    different = {n for n in plain.entries if plain.entries[n] != changed.entries[n]}
    assert different == {"tau", "seed"}
    assert changed.sources["tau"] == "given"
    assert "not a published value" in plain.sources["tau"]


def test_other_epochs_move_the_schedule_in_proportion() -> None:
    config = recipe("digits-lt", "ce-drw", "sgd", epochs=50).config()
    assert (config.warmup_epochs, config.lr_milestones, config.defer_epoch) == (3, (40, 45), 40)
    tiny = recipe("digits-lt", "ce-drw", "sgd", epochs=1).config()
    assert (tiny.warmup_epochs, tiny.lr_milestones, tiny.defer_epoch) == (1, (1, 1), 0)
    kept = recipe("digits-lt", "ce-drw", "sgd", epochs=50, defer_epoch=7).config()
    assert kept.defer_epoch == 7


def config_with(**settings: Any) -> TrainConfig:
    return recipe("digits-lt", "ce-drw", "sam", **settings).config()


def test_looksam_s_weight_is_ours_and_stored_runs_keep_theirs() -> None:
    chosen = recipe("digits-lt", "ce", "looksam")
    entry = chosen.entries["look_alpha"]
    assert entry.value == 0.3
    assert entry.source.startswith("ours")
    for version in (1, 2):
        stored = {**chosen.config().as_dict(), "look_alpha": 0.7, "format": version}
        assert TrainConfig.from_dict(stored).look_alpha == 0.7


def test_multistep_learning_rate() -> None:
    config = config_with(
        epochs=200,
        lr=0.1,
        warmup_epochs=5,
        lr_milestones=(160, 180),
        lr_factors=(0.01, 0.0001),
        defer_epoch=160,
    )
    expected = {1: 0.02, 4: 0.08, 5: 0.1, 6: 0.1, 160: 0.1, 161: 0.001, 180: 0.001, 181: 1e-5}
    assert {e: build_schedules(config)["lr"](e) for e in expected} == pytest.approx(expected)


def test_cosine_learning_rate_is_that_of_torch() -> None:
    config = config_with(epochs=9, lr=0.2, warmup_epochs=0, lr_schedule="cosine")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=9)
    for epoch in range(1, 10):
        assert build_schedules(config)["lr"](epoch) == pytest.approx(
            optimizer.param_groups[0]["lr"]
        )
        optimizer.step()
        scheduler.step()


def test_rho_schedules() -> None:
    constant = config_with(rho=(0.3,))
    assert {build_schedules(constant)["rho"](e) for e in (1, 50, 100)} == {0.3}
    step = config_with(rho=(0.05, 0.1, 0.5, 0.6), rho_schedule="step", rho_milestones=(5, 60, 75))
    radii = [build_schedules(step)["rho"](e) for e in (1, 5, 6, 60, 61, 75, 76)]
    assert radii == [0.05, 0.05, 0.1, 0.1, 0.5, 0.5, 0.6]
    linear = config_with(rho=(0.05, 0.8), rho_schedule="linear")
    assert build_schedules(linear)["rho"](1) == 0.05
    assert build_schedules(linear)["rho"](100) == pytest.approx(0.8)
    assert build_schedules(linear)["rho"](34) == pytest.approx(0.05 + 0.75 / 3)
    deferred = config_with(rho=(0.1, 0.5), rho_schedule="deferred", defer_epoch=80)
    assert [build_schedules(deferred)["rho"](e) for e in (80, 81)] == [0.1, 0.5]
    assert "rho" not in build_schedules(recipe("digits-lt", "ce", "sgd").config())


def test_a_number_will_do_for_a_setting_of_phases() -> None:
    chosen = recipe("digits-lt", "ce", "sam", rho=0.2, lr_milestones=3, lr_factors=1)
    config = chosen.config()
    assert (config.rho, config.lr_milestones, config.lr_factors) == ((0.2,), (3,), (1,))
    assert (
        config
        == recipe(
            "digits-lt", "ce", "sam", rho=(0.2,), lr_milestones=(3,), lr_factors=(1,)
        ).config()
    )
    with pytest.raises(UsageError, match="rho must have 2 value"):
        recipe("digits-lt", "ce", "sam", rho=0.2, rho_schedule="linear").config()


# (recipe, data, method): epochs, batch, lr, weight decay, warm-up, milestones, factors, mixer, augmentation;
# from the authors' codes, and whether all of them but the augmentation are published there.
NAMED: dict[tuple[str, str, str], tuple[Any, ...]] = {
    ("mixup", "cifar100-lt", "ce"): (
        400,
        128,
        0.1,
        2e-4,
        5,
        (320, 360),
        (1e-2, 1e-4),
        "mixup",
        True,
    ),
    ("mixup", "cifar10-lt", "bs"): (
        400,
        128,
        0.1,
        2e-4,
        5,
        (320, 360),
        (1e-2, 1e-4),
        "mixup",
        False,
    ),
    ("mixup", "imagenet-lt", "ce"): (180, 256, 0.1, 5e-4, 0, None, None, "mixup", True),
    ("mixup", "inaturalist18", "ce"): (200, 256, 0.1, 1e-4, 0, None, None, "mixup", True),
    ("mixup", "places-lt", "ce"): (90, 256, 0.1, 5e-4, 0, None, None, "mixup", True),
    ("cmo", "cifar100-lt", "ce-drw"): (
        200,
        128,
        0.1,
        2e-4,
        5,
        (160, 180),
        (1e-2, 1e-4),
        "cmo",
        True,
    ),
    ("cmo", "cifar10-lt", "ce-drw"): (
        200,
        128,
        0.1,
        2e-4,
        5,
        (160, 180),
        (1e-2, 1e-4),
        "cmo",
        False,
    ),
    ("cmo", "imagenet-lt", "bs"): (100, 128, 0.1, 2e-4, 5, (60, 80), (0.1, 0.01), "cmo", True),
    ("cmo", "inaturalist18", "bs"): (100, 256, 0.1, 2e-4, 5, (75,), (0.1,), "cmo", True),
    ("cmo-long", "cifar100-lt", "bs"): (
        400,
        128,
        0.1,
        2e-4,
        10,
        (321, 361),
        (0.1, 0.01),
        "cmo",
        True,
    ),
    ("cmo-long", "cifar100-lt", "ce"): (
        400,
        128,
        0.1,
        2e-4,
        10,
        (321, 361),
        (0.1, 0.01),
        "cmo",
        False,
    ),
    ("cmo-long", "imagenet-lt", "bs"): (400, 128, 0.02, 5e-4, 10, None, None, "cmo", True),
    ("cmo-long", "inaturalist18", "bs"): (400, 128, 0.02, 1e-4, 10, None, None, "cmo", True),
    ("long", "cifar100-lt", "paco"): (
        400,
        128,
        0.05,
        5e-4,
        10,
        (321, 361),
        (0.1, 0.01),
        "none",
        True,
    ),
    ("long", "cifar10-lt", "ce-drw"): (
        400,
        128,
        0.05,
        5e-4,
        10,
        (321, 361),
        (0.1, 0.01),
        "none",
        False,
    ),
}


@pytest.mark.parametrize("key", NAMED, ids=str)
def test_named_recipes_have_the_published_values(key: tuple[str, str, str]) -> None:
    name, data, method = key
    *expected, published = NAMED[key]
    chosen = recipe(data, method, "sgd", recipe=name)
    c = chosen.config()
    found = (c.epochs, c.batch_size, c.lr, c.weight_decay, c.warmup_epochs)
    assert (*found, c.lr_milestones, c.lr_factors, c.mixer) == tuple(expected)
    assert c.recipe == name
    assert all(chosen.entries[n].known for n in ("epochs", "lr", "weight_decay")) is published
    assert (c.augment == "randaugment") is ("long" in name)
    assert c.augment == "default" or not chosen.entries["augment"].known
    if method.endswith("drw"):
        assert c.defer_epoch == c.epochs * 4 // 5


@pytest.mark.slow
def test_every_named_recipe_makes_runs_of_every_optimizer_on_its_data() -> None:
    assert {name for name, _, _ in NAMED} == set(NAMED_RECIPES) - {STANDARD}
    for name in {name for name, _, _ in NAMED}:
        for data in NAMED_RECIPES[name].data:
            for optimizer in ("sam", "adamw"):
                config = recipe(data, "ce-drw", optimizer, recipe=name).config()
                assert TrainConfig.from_dict(config.as_dict()) == config
    assert recipe("cifar10-lt", "ce", "adamw", recipe="long").config().lr < 0.01  # not that of SGD


def test_given_settings_override_a_named_recipe_and_epochs_scale_it() -> None:
    config = recipe("cifar100-lt", "ce", "sgd", recipe="mixup", epochs=40, lr=0.3).config()
    assert (config.lr, config.lr_milestones, config.warmup_epochs) == (0.3, (32, 36), 1)
    long = recipe("cifar100-lt", "ce-drw", "sgd", recipe="long")
    assert long.override(epochs=200).config().defer_epoch == 160
    mild = recipe("cifar100-lt", "ce", "sgd", recipe="mixup", imbalance=10.0)
    assert not mild.entries["epochs"].known  # the code has no configuration of this factor


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        ("digits-lt", {"recipe": "long"}, "'long' has no values for data set 'digits-lt'.*omit"),
        ("cifar10-lt", {"recipe": "longer"}, "unknown recipe 'longer', did you mean 'long'"),
        ("cifar10-lt", {"recipe": "long", "stages": "mislas"}, "both set lr_milestones"),
        ("imagenet-lt", {"recipe": "cmo", "stages": "crt"}, "both set .*epochs"),
    ],
)
def test_wrong_named_recipes_are_refused(data: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recipe(data, "ce", "sgd", **settings)


def test_places_trains_the_last_block_and_the_head_of_a_pretrained_network() -> None:
    config = recipe("places-lt", "ce", "sgd").config()
    assert (config.model, config.pretrained, config.epochs) == ("resnet152", "IMAGENET1K_V1", 30)
    with torch.device("meta"):
        network = build_network(config, 365, 3)
    freeze(network, config)
    trained = {n for n, p in network.named_parameters() if p.requires_grad}
    last = {n for n in dict(network.named_parameters()) if ".layer4.2." in n}
    assert trained == last | {"head.weight", "head.bias"}
    factors = {
        name: g["lr"] for g in trained_parameters(network, config) for name, _ in g["params"]
    }
    assert factors == pytest.approx({n: 0.1 if n.startswith("head.") else 0.01 for n in trained})
    for stages, epochs in (("crt", 10), ("lws", 5), ("decoupled-bs", 10), ("linear-probe", None)):
        plan = plan_stages(recipe("places-lt", "ce", "sgd", stages=stages).config())
        assert plan[-1].config.freeze == ("features.*",)
        assert plan[-1].config.lr_scale == ()
        assert epochs is None or (plan[0].config.epochs, plan[1].config.epochs) == (30, epochs)


def test_other_start_weights_replace_the_pretrained_ones_of_places() -> None:
    own = recipe("places-lt", "ce", "sgd", init="start.pt", stages="crt").config()
    assert [stage.config.pretrained for stage in plan_stages(own)] == [None, None]
    small = recipe("places-lt", "ce", "sgd", model="resnet18").config()
    assert (small.pretrained, small.freeze, small.lr_scale) == (None, (), ())


def test_lade_on_inaturalist_has_the_values_of_its_code() -> None:
    """Hong et al., config/iNaturalist18/lade.yaml: weight 0.05, remine_lambda 0.5; elsewhere 0.1."""
    for data, values in {"inaturalist18": (0.05, 0.5), "imagenet-lt": (0.1, 0.1)}.items():
        config = recipe(data, "lade", "sgd").config().flat()
        assert (config["lade_alpha"], config["lade_lambda"]) == values


def test_cmo_long_begins_its_cosine_after_the_warm_up() -> None:
    """As PaCo's schedule, which the code of Park et al. uses on the large sets."""
    config = recipe("imagenet-lt", "bs", "sgd", recipe="cmo-long").config().flat()
    assert config["cosine_start"] == "after-warmup"
