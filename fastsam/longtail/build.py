"""Builds data, network, objective, optimizer and sampler from the settings of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from fastsam.longtail.base_optimizers.base import OptimizerInputs
from fastsam.longtail.classes import CLASS_WEIGHTS
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.data import LongTailData
from fastsam.longtail.data.augmentations import AUGMENTATIONS
from fastsam.longtail.data.catalog import load_with
from fastsam.longtail.errors import UsageError
from fastsam.longtail.losses.base import LOSSES, ClassStatistics, Loss
from fastsam.longtail.mixers import MIXERS, Mixer
from fastsam.longtail.models.base import build_model, pretrained_normalization
from fastsam.longtail.models.classifier import Classifier
from fastsam.longtail.objective import Objective, Term, WeightedTerm, group_weightings
from fastsam.longtail.optimizers.base import OPTIMIZERS
from fastsam.longtail.samplers import (
    ClassSampler,
    DeferredSampler,
    FixedSharesSampler,
    HasOrder,
    ShuffledSampler,
)
from fastsam.longtail.schedules import LR_SCHEDULES
from fastsam.longtail.seeds import Stream, derived_seed, global_seed
from fastsam.longtail.trainable import trained_parameters
from fastsam.longtail.tunings import TUNINGS
from fastsam.optim import Schedule, WarmUp

_TUNING = 1
"""Position of the initial weights that a tuning adds, in the stream of the initial weights."""


def load_configured(config: TrainConfig, *, progress: bool = True) -> LongTailData:
    """Load the data set of a configuration.

    Args:
        config: settings of the run.
        progress: show a progress bar if the data set must be prepared first.
    """
    data = load_with(config.data, config.parts["data"], progress=progress)
    if config.normalization != "network":
        return data
    pretrained = pretrained_normalization(config.model, config.pretrained)
    mean, std = pretrained.mean, pretrained.std
    if data.train.channels != len(mean):  # the filters of the three colors are summed
        mean, std = ((sum(values) / len(values),) for values in (mean, std))
    return data.normalized(mean, std).described()


def augmented(config: TrainConfig, data: LongTailData) -> LongTailData:
    """Return a data set whose training images are augmented as the settings say.

    Args:
        config: settings of the run.
        data: the data set, with any augmentation.
    """
    part, settings = AUGMENTATIONS[config.augment], config.parts["augmentation"]
    made = data.augmented(partial(part.build, settings), workers=config.workers or 0)
    if part.chosen is None:
        return made
    return replace(
        made, notes=(*made.notes, f"augment {part.name}: {part.chosen(made.train.frame)}")
    )


def build_network(
    config: TrainConfig,
    num_classes: int,
    channels: int,
    *,
    size: tuple[int, int] | None = None,
    module: nn.Module | None = None,
) -> Classifier:
    """Create the freshly initialized network of a configuration, on the CPU.

    Args:
        config: settings of the run.
        num_classes: number of classes C.
        channels: channels of the input images.
        size: height and width of the input images, for your module; None if unknown.
        module: your module for a network ``own:NAME``. It is copied.
    """
    seed = derived_seed(config.seed, Stream.MODEL)
    network = build_model(
        config.model,
        num_classes,
        head=config.head,
        head_settings=config.parts["head"],
        channels=channels,
        seed=seed,
        settings=config.parts["model"],
        size=size,
        module=module,
    )
    before = network.state_dict().keys()
    with global_seed(derived_seed(config.seed, Stream.MODEL, _TUNING)):
        TUNINGS[config.tune].build(config.parts["tuning"], network.features, num_classes)
    added = frozenset(network.state_dict().keys() - before)
    extend = _loss(config).network
    if extend is not None:
        with global_seed(seed):
            network = extend(config.parts["loss"], network)
    network.added = added
    return network


def build_optimizer(
    config: TrainConfig,
    model: Classifier,
    *,
    steps_per_epoch: int,
    process_group: ProcessGroup | None = None,
) -> Optimizer:
    """Create the optimizer of a configuration for the trainable parameters of ``model``.

    Args:
        config: settings of the run.
        model: the network.
        steps_per_epoch: optimizer steps per epoch.
        process_group: process group of the ranks; None for a single process.

    Raises:
        UsageError: if a pattern matches no parameter, or the optimizer refuses its settings or parameters.
    """
    inputs = OptimizerInputs(
        parameters=trained_parameters(model, config),
        lr=config.lr,
        weight_decay=config.weight_decay,
        seed=derived_seed(config.seed, Stream.NOISE),
        run=config.run,
        steps_per_epoch=steps_per_epoch,
        process_group=process_group,
    )
    try:
        return OPTIMIZERS[config.optimizer].build(config.parts["optimizer"], inputs)
    except UsageError:
        raise
    except (TypeError, ValueError) as error:
        base = config.base_optimizer
        on = "" if base is None else f" with base_optimizer {base}"
        raise UsageError(
            f"optimizer {config.optimizer}{on} cannot train this network: {error}; choose another one"
        ) from error


def build_schedules(config: TrainConfig) -> dict[str, Schedule]:
    """Create the schedules of the parameter groups' options: ``lr``, and ``rho`` for SAM.

    After a linear warm-up, ``lr * epoch / warmup_epochs``, the learning rate follows its schedule.
    """
    after = LR_SCHEDULES[config.lr_schedule].build(config.parts["lr_schedule"], config.run)
    settings = config.parts["optimizer"]
    return {
        "lr": WarmUp(after, config.lr, config.warmup_epochs),
        **settings.schedules(config.run),
    }


def build_objective(
    config: TrainConfig,
    counts: NDArray[np.int64],
    groups: Mapping[str, Sequence[int]] | None = None,
    *,
    weighted: bool = True,
    device: torch.device | str = "cpu",
) -> Objective:
    """Create the objective of a run: its loss in every epoch.

    Args:
        config: settings of the run.
        counts: training images of each class, ``[C]``.
        groups: classes of head, mid and tail. An optimizer may ask for the loss of one group.
        weighted: whether to apply the class weights of the rule.
        device: device of the buffers of the losses.
    """
    loss, method = _loss(config), config.parsed_method
    settings = config.parts["loss"]
    classes = ClassStatistics(counts)
    weighted = weighted and method.weighted
    if weighted:
        weights = CLASS_WEIGHTS[config.weighting]
        tensor = weights.build(config.parts["weighting"], counts)
        classes = ClassStatistics(counts, tensor, weights.mean)
    late = loss.build(settings, classes).to(device)
    early: Term | None = None
    if loss.early is not None:
        early = LOSSES[loss.early].build(None, ClassStatistics(counts)).to(device)
    elif weighted and method.deferred:
        early = loss.build(settings, ClassStatistics(counts, None, classes.mean)).to(device)
    weightings = group_weightings(groups or {}, counts, torch.device(device))
    if early is None:
        return Objective([WeightedTerm(late)], weightings)
    defer: int = config.defer_epoch
    return Objective(
        [
            WeightedTerm(early, lambda epoch: float(epoch <= defer)),
            WeightedTerm(late, lambda epoch: float(epoch > defer)),
        ],
        weightings,
    )


def build_class_weights(
    config: TrainConfig, counts: NDArray[np.int64], *, device: torch.device | str = "cpu"
) -> Callable[[int], Tensor]:
    """Return a function from epoch (counted from 1) to class weights, float64 ``[C]``.

    The weights are 1 up to the deferral epoch of a deferred rule.

    Args:
        config: settings of a run with class weights.
        counts: training images of each class, ``[C]``.
        device: device of the weights.
    """
    scheme = CLASS_WEIGHTS[config.weighting]
    weights = scheme.build(config.parts["weighting"], counts).to(device)
    late = config.parsed_method.deferred or _loss(config).early is not None
    before: int = config.defer_epoch if late else 0
    return lambda epoch: weights if epoch > before else torch.ones_like(weights)


def build_sampler(
    config: TrainConfig, targets: NDArray[np.int64], counts: NDArray[np.int64]
) -> HasOrder:
    """Create the sampler of a configuration, for the images of all ranks.

    Args:
        config: settings of the run.
        targets: class of every training image, int64 ``[N]``.
        counts: training images of each class, int64 ``[C]``.
    """
    method = config.parsed_method
    shuffled = ShuffledSampler(len(targets), seed=config.seed)
    if not method.resampled:
        return shuffled
    classes = ClassSampler(
        targets, counts, strategy=config.sampling, epochs=config.epochs, seed=config.seed
    )
    if not method.deferred:
        return classes
    return DeferredSampler(shuffled, classes, defer_epoch=config.defer_epoch)


def build_mixer(config: TrainConfig, counts: NDArray[np.int64]) -> Mixer | None:
    """Create the mixer of a configuration; return None if batches are not mixed.

    Args:
        config: settings of the run.
        counts: training images of each class, int64 ``[C]``.
    """
    return MIXERS[config.mixer].build(config.parts["mixer"], counts, config.run)


def build_second_sampler(
    config: TrainConfig, mixer: Mixer, targets: NDArray[np.int64], counts: NDArray[np.int64]
) -> HasOrder | None:
    """Create the sampler of a mixer's second stream; return None if it has none.

    Args:
        config: settings of the run.
        mixer: the mixer of the run.
        targets: class of every training image, int64 ``[N]``.
        counts: training images of each class, int64 ``[C]``.
    """
    if mixer.class_shares is None:
        return None
    seed = derived_seed(config.seed, Stream.MIX)
    return FixedSharesSampler(targets, counts, shares=mixer.class_shares, seed=seed)


def double_balance(config: TrainConfig) -> str | None:
    """Describe what balances the classes of a run if more than one thing does; return None otherwise.

    Each of a balancing loss, re-sampling, class weights and a post-hoc adjustment replaces the class prior of
    the training images by a uniform one. Two of them favor rare classes beyond that.
    """
    method, loss, tau = config.parsed_method, _loss(config), config.posthoc_tau
    ways = []
    added = loss.adjusts_logits(config.parts["loss"])
    if added is not None:
        ways.append(f"loss {method.loss} adds {added} in training")
    elif loss.balances_classes:
        ways.append(f"loss {method.loss} balances them itself")
    if method.resampled:
        ways.append(f"rule {method.rule} re-samples them")
    if method.weighted:
        ways.append(f"rule {method.rule} weights them")
    if tau > 0:
        ways.append(f"posthoc_tau {tau:g} subtracts {tau:g} * log prior at test time")
    if len(ways) < 2:
        return None
    return f"classes are balanced {len(ways)} times: {'; '.join(ways)}; keep one of them"


def _loss(config: TrainConfig) -> Loss:
    return LOSSES[config.parsed_method.loss]
