"""Losses, heads, weights and samplers against the official codes of their methods, in float64."""

from __future__ import annotations

from collections import defaultdict, deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastsam.longtail import recipe, samplers
from fastsam.longtail.build import build_mixer
from fastsam.longtail.calibrators import CALIBRATORS, TrainedHead
from fastsam.longtail.classes import class_balanced_weights, inverse_frequency_weights
from fastsam.longtail.features import Features
from fastsam.longtail.losses import LOSSES, ClassStatistics, LabelAwareSmoothingLoss
from fastsam.longtail.losses.las import Shape
from fastsam.longtail.models import DisAlignHead, ScaledHead
from fastsam.longtail.norms import NormLimits
from fastsam.longtail.samplers import ClassSampler
from fastsam.longtail.stage_plan import plan_stages
from python_tests.longtail.official_codes import (
    OFFICIAL_CODES,
    Agreement,
    needs,
    official,
    same_values,
    same_weights,
    statements,
)

COUNTS = [500, 120, 33, 12, 5, 2]
C, D = len(COUNTS), 7

pytestmark = pytest.mark.usefixtures("in_float64")


def labels() -> Tensor:
    return torch.randint(C, (17,))


def test_the_repositories_are_documented() -> None:
    rows = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text().splitlines()
    for name, (owner, commit) in OFFICIAL_CODES.items():
        assert any(
            f"`{owner}/" in row and name in row and f"`{commit[:7]}`" in row for row in rows
        ), name


# ---- losses and class weights ----


@needs("MiSLAS")
@pytest.mark.parametrize("shape", get_args(Shape))
def test_label_aware_smoothing(shape: Shape, agreement: Agreement) -> None:
    theirs = official("MiSLAS", "methods.py").LabelAwareSmoothing(COUNTS, 0.4, 0.1, shape)
    ours = LabelAwareSmoothingLoss(COUNTS, 0.4, 0.1, shape)
    agreement(ours.smoothing, theirs.smooth)
    (one, two), targets = same_values(17, C, scale=3), labels()
    agreement.gradients(ours(one, targets), theirs(two, targets), [(one, two)])


@needs("LTR-weight-balancing")
def test_binary_cross_entropy_of_the_softmax(agreement: Agreement) -> None:
    theirs = official("LTR-weight-balancing", "utils/class_balanced_loss.py").CB_loss
    weight = class_balanced_weights(COUNTS, 0.9999)
    ours = LOSSES["softmax-bce"].build(None, ClassStatistics(COUNTS, weight, "samples"))
    (one, two), targets = same_values(17, C, scale=3), labels()
    expected = theirs(targets, two, COUNTS, C, "softmax", 0.9999, 2.0, "cpu")
    agreement.gradients(ours(one, targets), expected, [(one, two)])


ADJUSTED = [
    pytest.param(name, repository, file, kind, marks=needs(repository), id=f"{name}-{repository}")
    for name, repository, file, kind in (
        ("bs", "BalancedMetaSoftmax-Classification", "loss/BalancedSoftmaxLoss.py", None),
        ("bs", "cmo", "losses.py", "BalancedSoftmaxLoss"),
        ("bs", "LIFT", "utils/losses.py", "BalancedSoftmaxLoss"),
        ("la", "LIFT", "utils/losses.py", "LogitAdjustedLoss"),
    )
]


@pytest.mark.parametrize(("name", "repository", "file", "kind"), ADJUSTED)
def test_adjusted_logits(
    name: str, repository: str, file: str, kind: str | None, agreement: Agreement
) -> None:
    counts = torch.tensor(COUNTS, dtype=torch.float64)
    (one, two), targets = same_values(17, C, scale=3), labels()
    if kind is None:
        loss = official(repository, file, "balanced_softmax_loss").balanced_softmax_loss
        expected = loss(targets, two, counts, "mean")
    else:
        expected = getattr(official(repository, file, kind), kind)(counts)(two, targets)
    ours = LOSSES[name].build(SimpleNamespace(tau=1.0), ClassStatistics(COUNTS))
    agreement.gradients(ours(one, targets), expected, [(one, two)])


@pytest.mark.parametrize(
    "repository", [pytest.param(name, marks=needs(name)) for name in ("cvpods", "LIFT")]
)
def test_cross_entropy_of_disalign(repository: str, agreement: Agreement) -> None:
    weight = inverse_frequency_weights(COUNTS, 1.2)
    ours = LOSSES["ce"].build(None, ClassStatistics(COUNTS, weight))
    if repository == "cvpods":
        kind = official(
            "cvpods",
            "cvpods/modeling/losses/grw_loss.py",
            _WeightedLoss=nn.modules.loss._WeightedLoss,
        ).GRWCrossEntropyLoss
        theirs = kind(num_samples_list=COUNTS, num_classes=C, exp_scale=1.2)
        agreement(weight, theirs.weight)
    else:
        kind = official("LIFT", "utils/losses.py", "GeneralizedReweightLoss")
        theirs = kind.GeneralizedReweightLoss(torch.tensor(COUNTS).double(), 1.2)
        agreement(weight, theirs.per_cls_weights)
    (one, two), targets = same_values(17, C, scale=3), labels()
    agreement.gradients(ours(one, targets), theirs(two, targets), [(one, two)])


@needs("LIFT")
def test_class_balanced_weights(agreement: Agreement) -> None:
    theirs = official("LIFT", "utils/losses.py", "ClassBalancedLoss").ClassBalancedLoss
    expected = theirs(torch.tensor(COUNTS).double()).per_cls_weights
    agreement(class_balanced_weights(COUNTS, 0.9999), expected)


# ---- heads ----

LINEAR = {"fc.weight": "linear.weight", "fc.bias": "linear.bias"}


@needs("classifier-balancing")
def test_the_head_of_lws(agreement: Agreement) -> None:
    kind = official("classifier-balancing", "models/TauNormClassifier.py").DotProduct_Classifier
    ours, theirs = ScaledHead(nn.Linear(D, C)), kind(C, D)
    assert bool((ours.scale == 1).all())
    pairs = same_weights(ours, theirs, {**LINEAR, "scales": "scale"})
    assert len(pairs) == 1
    (one, two), direction = same_values(9, D), torch.randn(9, C)
    found, expected = ours(one), theirs(two)[0]
    agreement(found, expected)
    agreement.gradients((found * direction).sum(), (expected * direction).sum(), pairs)


@needs("MiSLAS")
def test_the_head_of_mislas(agreement: Agreement) -> None:
    weights_init = official("MiSLAS", "models/resnet_cifar.py", "_weights_init", init=nn.init)
    classifier = official("MiSLAS", "models/resnet_cifar.py", "Classifier", **vars(weights_init))
    scaling = official("MiSLAS", "methods.py", "LearnableWeightScaling").LearnableWeightScaling
    theirs = nn.Sequential(classifier.Classifier(D, C), scaling(C))
    ours = ScaledHead(nn.Linear(D, C), trains_vectors=True)
    names = {f"0.{name}": own for name, own in LINEAR.items()}
    pairs = same_weights(ours, theirs, {**names, "1.learned_norm": "scale"})
    assert len(pairs) == 3
    (one, two), direction = same_values(9, D), torch.randn(9, C)
    found, expected = ours(one), theirs(two)
    agreement(found, expected)
    agreement.gradients((found * direction).sum(), (expected * direction).sum(), pairs)


@needs("cvpods")
def test_the_head_of_disalign(agreement: Agreement) -> None:
    kind = official("cvpods", "cvpods/layers/wrappers.py", "DisAlignLinear").DisAlignLinear
    ours, theirs = DisAlignHead(nn.Linear(D, C)), kind(D, C)
    for one, two in (
        (ours.scale, theirs.logit_scale[0]),
        (ours.offset, theirs.logit_bias[0]),
        (ours.confidence.weight, theirs.confidence_layer.weight),
    ):
        agreement(one, two)  # as initialized
    for value in (theirs.weight, theirs.bias):
        value.requires_grad_(requires_grad=False)  # as in the network of DisAlign
    pairs = same_weights(
        ours,
        theirs,
        {
            "weight": "linear.weight",
            "bias": "linear.bias",
            "logit_scale": "scale",
            "logit_bias": "offset",
            "confidence_layer.weight": "confidence.weight",
            "confidence_layer.bias": "confidence.bias",
        },
    )
    assert len(pairs) == 4
    (one, two), direction = same_values(9, D), torch.randn(9, C)
    found, expected = ours(one), theirs(two)
    agreement(found, expected)
    agreement.gradients((found * direction).sum(), (expected * direction).sum(), pairs)


# ---- calibrators ----


def trained_head() -> TrainedHead:
    head = nn.Linear(D, C).requires_grad_(requires_grad=False)
    head.weight.mul_(torch.linspace(4, 0.3, C)[:, None])
    return TrainedHead(head, 1.0, np.array(COUNTS))


def no_features() -> Features:
    raise AssertionError("this calibrator needs no training features")


@needs("classifier-balancing")
def test_tau_norm(agreement: Agreement) -> None:
    trained, values = trained_head(), torch.randn(50, D)
    code = official("classifier-balancing", "tau_norm.py", "pnorm", "dotproduct_similarity")
    part = CALIBRATORS["tau-norm"]
    grid = [dict(found) for found in part.candidates(trained, no_features)]
    agreement([found["tau"] for found in grid], np.linspace(0, 2, 21).tolist())
    for parameters in grid:
        expected = code.pnorm(trained.module.weight, parameters["tau"])
        expected = code.dotproduct_similarity(values, expected)
        agreement(part.build(parameters, trained)(values), expected)


@needs("classifier-balancing")
def test_nearest_class_mean(agreement: Agreement) -> None:
    targets = torch.from_numpy(np.repeat(np.arange(C), COUNTS))
    training = Features(
        (3 + torch.randn(C, D)[targets] + torch.randn(len(targets), D)).relu(), targets
    )
    values = (3 + torch.randn(50, D)).relu()
    runner = SimpleNamespace(
        networks={},
        data={
            "train_plain": [(chunk.values, chunk.targets, None) for chunk in training.chunks(130)]
        },
    )
    runner.batch_forward = lambda inputs, feature_ext: setattr(runner, "features", inputs)
    code = official(
        "classifier-balancing", "run_networks.py", "get_knncentroids", tqdm=lambda batches: batches
    )
    means = code.get_knncentroids(runner)
    kind = official("classifier-balancing", "models/KNNClassifier.py").KNNClassifier
    part = CALIBRATORS["nearest-class-mean"]
    for parameters in part.candidates(trained_head(), lambda: training):
        classifier = kind(D, C, feat_type=parameters["transform"])
        classifier.update(means)
        expected = classifier(values)[0]
        agreement(part.build(parameters, trained_head())(values), expected, rtol=1e-6)


# ---- limits of norms ----


@needs("LTR-weight-balancing")
def test_max_norm(agreement: Agreement) -> None:
    kind = official("LTR-weight-balancing", "utils/regularizers.py").MaxNorm_via_PGD
    head = nn.Linear(D, C)
    with torch.no_grad():
        head.weight.mul_(torch.linspace(4, 0.3, C)[:, None])
    network: Any = nn.Module()
    network.encoder = nn.Module()
    network.encoder.fc = nn.Linear(D, C)
    network.encoder.fc.load_state_dict(head.state_dict())
    theirs = kind(thresh=0.1)
    theirs.setPerLayerThresh(network)
    mine: Any = nn.ModuleDict({"head": head})
    config: Any = SimpleNamespace(max_norm=("head.weight=range:0.1",), parallel="ddp")
    ours = NormLimits.of_run(config, mine, None)
    agreement(ours.limits["head.weight"], theirs.perLayerThresh[0])
    for _ in range(3):
        change = torch.randn(C, D)
        for layer in (head, network.encoder.fc):
            layer.weight.data.add_(change)
        ours.project()
        theirs.PGD(network)
        agreement(head.weight, network.encoder.fc.weight)


# ---- samplers ----


@needs("classifier-balancing")
def test_class_aware_sampling(monkeypatch: pytest.MonkeyPatch, agreement: Agreement) -> None:
    """The official sampler with our shuffles visits the same images in the same order."""
    shuffles: dict[frozenset[int], deque[list[int]]] = defaultdict(deque)

    class Recording:
        def __init__(self, *seeds: int) -> None:
            self.generator = np.random.default_rng(seeds)

        def permutation(self, values: Any) -> Any:
            found = self.generator.permutation(values)
            shuffles[frozenset(found.tolist())].append(found.tolist())
            return found

    def shuffle(values: list[int]) -> None:
        # The classes are shuffled before the first image of any class.
        values[:] = shuffles[frozenset(values)].popleft()

    monkeypatch.setattr(samplers, "numpy_generator", Recording)
    counts = [50, 3, 7, 14]
    targets = np.random.default_rng(0).permutation(np.repeat(np.arange(4), counts))
    # Images have other numbers than classes, so that their shuffles are told apart.
    targets = np.concatenate([targets, [0]])
    order = ClassSampler(targets, np.bincount(targets), strategy="class-aware", seed=3).order(1)
    code = official(
        "classifier-balancing",
        "data/ClassAwareSampler.py",
        Sampler=object,
        random=SimpleNamespace(shuffle=shuffle),
    )
    theirs = code.ClassAwareSampler(SimpleNamespace(labels=targets), num_samples_cls=4)
    found = [index for index, _ in zip(theirs, range(len(targets)), strict=False)]
    agreement(order.astype(float), np.array(found, dtype=float))


@needs("cmo")
@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_foregrounds_of_cmo(power: float, agreement: Agreement) -> None:
    code = official("cmo", "imbalance_data/imbalance_cifar.py", "get_weighted_sampler")
    targets = np.repeat(np.arange(C), COUNTS)
    data = SimpleNamespace(
        get_cls_num_list=lambda: COUNTS, weighted_alpha=power, targets=targets.tolist()
    )
    weights = code.get_weighted_sampler(data).weights
    mixer = build_mixer(
        recipe("digits-lt", "ce", "sgd", mixer="cmo", cmo_power=power).config(), np.array(COUNTS)
    )
    assert mixer is not None
    assert mixer.class_shares is not None
    per_image = (mixer.class_shares / COUNTS)[targets]
    agreement(per_image, weights / weights.sum())


# ---- second stage of weight balancing ----


@needs("LTR-weight-balancing")
def test_the_settings_of_weight_balancing() -> None:
    model = nn.Module()
    model.encoder = nn.Sequential()
    model.encoder.fc = nn.Linear(D, C)
    limits = official("LTR-weight-balancing", "utils/regularizers.py").MaxNorm_via_PGD
    script = statements(
        "LTR-weight-balancing", "demo2_second-stage-training.py", "thresh", "optimizer",
        model=model, MaxNorm_via_PGD=limits, optim=torch.optim,
    )  # fmt: skip
    config = recipe("cifar100-lt", "ce", "sgd", stages="weight-balancing").config()
    stage = plan_stages(config)[1].config
    assert stage.max_norm == (f"head.weight=range:{script.thresh}",)
    (group,) = script.optimizer.param_groups
    assert (stage.lr, stage.momentum, stage.weight_decay, stage.epochs) == (
        group["lr"], group["momentum"], group["weight_decay"], script.total_epoch_num,
    )  # fmt: skip
