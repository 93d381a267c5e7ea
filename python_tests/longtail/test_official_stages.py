"""The transition to the last stage, its steps and its trained parameters, against the official codes.

fastsam trains all stages. The official code then trains its second stage from the weights of the first one
of fastsam, on the same batches. The features are those of fastsam's network: the codes take any. Lists
without an official code are compared with plain torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional

from fastsam.longtail import Checkpoint, TrainConfig, fit_stages, recipe
from fastsam.longtail.build import build_network
from fastsam.longtail.samplers import IMAGES_PER_VISIT
from fastsam.longtail.stage_plan import plan_stages
from fastsam.longtail.stages import STAGES
from fastsam.longtail.start import Start
from fastsam.longtail.training import StageTrainer, Step
from python_tests.longtail.official_codes import (
    Agreement,
    Meter,
    file,
    needs,
    no_accuracy,
    official,
    statements,
)
from python_tests.longtail.test_trainer import FEW

D, C, EPOCHS = 64, 10, 2
RTOL = 2e-5
"""Largest deviation of float32 weights after the stage."""

pytestmark = pytest.mark.usefixtures("on_cpu")


@dataclass
class Seen:
    """A step of the last stage: epoch, learning rate, images and their classes."""

    epoch: int
    lr: float
    images: Tensor
    targets: Tensor


@dataclass
class LastStage:
    """The last stage of a run of fastsam.

    Attributes:
        config: its settings.
        before: weights after the stage before, or those that the run starts from.
        start: weights at its beginning.
        after: weights after it.
        trained: number of parameters that it trains.
        steps: its steps.
    """

    config: TrainConfig
    before: dict[str, Tensor]
    start: dict[str, Tensor]
    after: dict[str, Tensor]
    trained: int
    steps: list[Seen]

    def features(self) -> nn.Module:
        """Return the features before the stage."""
        network = build_network(self.config, C, 1).features
        network.load_state_dict(self.part("features."))
        return network

    def part(self, prefix: str, weights: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return the entries with a prefix, by default of the weights before the stage."""
        chosen = self.before if weights is None else weights
        return {
            name.removeprefix(prefix): value.clone()
            for name, value in chosen.items()
            if name.startswith(prefix)
        }


Run = Callable[..., LastStage]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def last_stage(name: str, *settings: str) -> LastStage:
        options = {
            "epochs": 1,
            "batch_size": 64,
            "lr": 0.05,
            "warmup_epochs": 0,
            "model": "resnet8",
        }
        changes = (f"{STAGES[name].stages[-1].name}.epochs={EPOCHS}", *settings)
        config = recipe(
            "digits-lt", "ce", "sgd", stages=name, stage_set=changes, **options
        ).config()
        planned = plan_stages(config)
        given = None
        if STAGES[name].needs_weights:
            weights = build_network(planned[0].config.replace(seed=7), C, 1).state_dict()
            given = Start("given", weights)
        steps: list[Seen] = []
        images: list[Tensor] = []
        found: dict[str, Any] = {}

        def watch(one: StageTrainer) -> None:
            if not one.last:
                return
            trainer = one.trainer
            network = trainer.model
            found["start"] = {k: v.clone() for k, v in network.state_dict().items()}
            found["trained"] = sum(p.numel() for p in network.parameters() if p.requires_grad)

            def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                if module.training:
                    images.append(inputs[0].clone())

            def on_step(step: Step) -> None:
                lr = max(group["lr"] for group in trainer.optimizer.param_groups)
                steps.append(Seen(step.epoch, lr, images[-1], step.targets.clone()))

            network.features.register_forward_pre_hook(keep)
            trainer.on_step = on_step

        fit_stages(
            config, data=FEW, out=tmp_path / "run", progress=False, on_stage=watch, start=given
        )
        assert len(images) == len(steps)
        first = tmp_path / "run" / "stage-1"
        return LastStage(
            planned[-1].config,
            Checkpoint.load(first).model if len(planned) > 1 else dict(given.weights),  # type: ignore[union-attr]
            after=Checkpoint.load(tmp_path / "run").model,
            steps=steps,
            **found,
        )

    return last_stage


def trained(*modules: nn.Module) -> int:
    return sum(p.numel() for m in modules for p in m.parameters() if p.requires_grad)


def compare(
    ours: LastStage, features: nn.Module, head: dict[str, Tensor], agreement: Agreement
) -> None:
    """Compare all weights and running statistics after the stage."""
    assert ours.steps
    names = {name for name in ours.after if name.startswith("head.")}
    assert names == {f"head.{name}" for name in head}
    for name, value in features.state_dict(prefix="features.").items():
        agreement(ours.after[name].float(), value.float(), rtol=RTOL)
    change = [float((ours.after[name] - ours.start[name]).abs().max()) for name in names]
    assert max(change) > 1e-3  # something was trained
    for name, value in head.items():
        agreement(
            ours.after[f"head.{name}"], value.reshape(ours.after[f"head.{name}"].shape), rtol=RTOL
        )


# ---- cRT, LWS and decoupled balanced softmax: the trainer of Kang et al. and its copy by Ren et al. ----

FEATURES = "the features of fastsam"


class WithMaps(nn.Module):
    """Features as the trainer expects them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        return self.network(images), None


KANG = [
    pytest.param(name, repository, settings, marks=needs(repository))
    for name, repository, settings in (
        ("crt", "classifier-balancing", "cls_crt.yaml"),
        ("lws", "classifier-balancing", "cls_lws.yaml"),
        (
            "decoupled-bs",
            "BalancedMetaSoftmax-Classification",
            "decouple_balanced_softmax_resnet10.yaml",
        ),
    )
]


@pytest.mark.parametrize(("name", "repository", "settings"), KANG)
def test_the_second_stage_of_kang(
    name: str, repository: str, settings: str, run: Run, tmp_path: Path, agreement: Agreement
) -> None:
    ours = run(name)
    config = yaml.safe_load(file(repository, f"config/ImageNet_LT/{settings}").read_text())
    sampler = config["training_opt"]["sampler"]
    assert (ours.config.sampling == "class-aware") is (sampler is not None)
    assert sampler is None or sampler["num_samples_cls"] == IMAGES_PER_VISIT

    features, classifier = config["networks"]["feat_model"], config["networks"]["classifier"]
    features["def_file"] = FEATURES
    classifier["params"] |= {"num_classes": C, "feat_dim": D}
    for part in (features, classifier):
        part["optim_params"] |= {
            "momentum": ours.config.momentum, "weight_decay": ours.config.weight_decay
        }  # fmt: skip
    if name == "decoupled-bs":
        counts = tmp_path / "counts.json"
        counts.write_text(json.dumps(FEW.counts.tolist()))
        config["criterions"]["PerformanceLoss"]["loss_params"]["freq_path"] = str(counts)

    def source_import(where: str) -> SimpleNamespace:
        if where == FEATURES:
            return SimpleNamespace(create_model=lambda **_: WithMaps(ours.features()))
        return official(repository, where, _Loss=nn.modules.loss._Loss, json=json)

    parallel = SimpleNamespace(**{**vars(nn), "DataParallel": lambda network: network})
    kind = official(
        repository, "run_networks.py", "model",
        source_import=source_import, nn=parallel, optim=torch.optim,
    ).model  # fmt: skip
    runner = object.__new__(kind)
    runner.__dict__ |= {
        "config": config, "training_opt": config["training_opt"], "test_mode": False,
        "meta_sample": False, "scheduler_params": {},
    }  # fmt: skip
    runner.init_models()
    runner.init_criterions()
    runner.model_optimizer, _ = runner.init_optimizers(runner.model_optim_params_list)
    weights = {f"fc.{key}": value for key, value in ours.part("head.").items()}
    checkpoint = tmp_path / "stage-one.pth"
    torch.save(
        {
            "state_dict_best": {
                "feat_model": WithMaps(ours.features()).state_dict(),
                "classifier": weights,
            }
        },
        checkpoint,
    )
    runner.load_model(str(checkpoint))

    head = runner.networks["classifier"]
    kept = all(torch.equal(head.get_parameter(key), value) for key, value in weights.items())
    assert kept is (name == "lws")
    initial = ours.part("head.", ours.start)
    if kept:
        pairs = {"linear.weight": "fc.weight", "linear.bias": "fc.bias", "scale": "scales"}
    else:  # both heads are new, with the same distribution
        pairs = {"weight": "fc.weight", "bias": "fc.bias"}
        for key, value in initial.items():
            theirs = head.get_parameter(pairs[key])
            for values in (value, theirs.detach()):
                assert 0.6 * D**-0.5 < float(values.abs().max()) <= D**-0.5
            theirs.data.copy_(value)
    for key, value in initial.items():
        assert torch.equal(value, head.get_parameter(pairs[key]))
    assert trained(*runner.networks.values()) == ours.trained

    for step in ours.steps:
        for network in runner.networks.values():
            network.train()
        for group in runner.model_optimizer.param_groups:
            group["lr"] = step.lr  # the schedule of the code is one epoch ahead
        runner.batch_forward(step.images, step.targets)
        runner.batch_loss(step.targets)
        runner.batch_backward()
    found = {key: head.get_parameter(other) for key, other in pairs.items()}
    compare(ours, runner.networks["feat_model"].network, found, agreement)


# ---- MiSLAS ----


class Loader(list[Any]):
    """Batches with the attributes that the code reads."""

    def __init__(self, steps: list[Seen]) -> None:
        super().__init__((step.images, step.targets) for step in steps)
        self.batch_size = len(steps[0].targets)
        self.dataset = range(sum(len(step.targets) for step in steps))


@needs("MiSLAS")
@pytest.mark.parametrize("shift_bn", [True, False])
def test_the_second_stage_of_mislas(shift_bn: bool, run: Run, agreement: Agreement) -> None:
    ours = run("mislas", f"classifier.batch_norm={'train' if shift_bn else 'frozen'}")
    features, methods = ours.features(), official("MiSLAS", "methods.py")
    init = official("MiSLAS", "models/resnet_cifar.py", "_weights_init", init=nn.init)
    classifier = official(
        "MiSLAS", "models/resnet_cifar.py", "Classifier", **vars(init)
    ).Classifier(D, C)
    classifier.load_state_dict({f"fc.{k}": v for k, v in ours.part("head.").items()})
    scaling = methods.LearnableWeightScaling(C)
    las = (ours.config.las_head, ours.config.las_tail)
    criterion = methods.LabelAwareSmoothing(FEW.counts.tolist(), *las)
    optimizer = torch.optim.SGD(
        [{"params": classifier.parameters()}, {"params": scaling.parameters()}],
        ours.config.lr, momentum=ours.config.momentum, weight_decay=ours.config.weight_decay,
    )  # fmt: skip
    settings = SimpleNamespace(
        dataset="cifar100", shift_bn=shift_bn, mixup=False, gpu=None, print_freq=1000,
        lr=ours.config.lr, num_epochs=EPOCHS,
        lr_factor=float(ours.config.lr_scale[0].rpartition("=")[2]),
    )  # fmt: skip
    start = {
        "linear.weight": classifier.fc.weight, "linear.bias": classifier.fc.bias,
        "scale": scaling.learned_norm[0],
    }  # fmt: skip
    for name, value in ours.part("head.", ours.start).items():
        assert torch.equal(value, start[name])
    assert trained(classifier, scaling) == ours.trained
    code = official(
        "MiSLAS", "train_stage2.py", "train", "adjust_learning_rate",
        AverageMeter=Meter, ProgressMeter=Meter, accuracy=no_accuracy,
    )  # fmt: skip
    for epoch in range(EPOCHS):
        steps = [step for step in ours.steps if step.epoch == epoch + 1]
        code.adjust_learning_rate(optimizer, epoch, settings)
        code.train(
            Loader(steps),
            features,
            classifier,
            scaling,
            criterion,
            optimizer,
            epoch,
            settings,
            None,
        )
    found = {name: value.detach() for name, value in start.items() if name != "scale"}
    compare(ours, features, {**found, "scale": scaling.learned_norm}, agreement)


# ---- DisAlign ----


@needs("DisAlign", "cvpods")
def test_the_second_stage_of_disalign(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, agreement: Agreement
) -> None:
    ours = run("disalign")
    layer = official("cvpods", "cvpods/layers/wrappers.py", "DisAlignLinear").DisAlignLinear
    loss = official(
        "cvpods", "cvpods/modeling/losses/grw_loss.py", _WeightedLoss=nn.modules.loss._WeightedLoss
    ).GRWCrossEntropyLoss
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "counts.json").write_text(
        json.dumps({"train_shots": FEW.counts.tolist()})
    )
    for name, values in (
        ("cvpods", {"__file__": str(tmp_path / "cvpods" / "__init__.py")}),
        ("cvpods.modeling", {}),
        ("cvpods.modeling.losses", {"GRWCrossEntropyLoss": loss}),
        ("cvpods.utils", {"PathManager": SimpleNamespace(open=open)}),
    ):
        module = ModuleType(name)
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, module)

    class Classification(nn.Module):
        """The classifier of cvpods, with the features of fastsam."""

        def __init__(self, settings: Any) -> None:
            super().__init__()
            self.device = "cpu"
            self.network = nn.Module()
            self.network.features = ours.features()
            self.network.linear = layer(D, C)

        def forward(self, images: Tensor) -> Tensor:
            return self.network.linear(self.network.features(images))

    folder = (
        "classification/imagenetlt/resnext50/resx50.scratch.imagenet_lt.224size.90e.disalign.10e"
    )
    code = official(
        "DisAlign", f"{folder}/net.py", "build_model",
        Classification=Classification, build_backbone=None,
        logging=SimpleNamespace(
            getLogger=lambda _: SimpleNamespace(info=lambda *_: None)
        ),
    )  # fmt: skip
    network = code.build_model(
        SimpleNamespace(
            DATASETS=SimpleNamespace(JSON_PATH="counts.json"),
            MODEL=SimpleNamespace(RESNETS=SimpleNamespace(NUM_CLASSES=C), GRW_SCALE=1.2),
        )
    )
    linear = network.network.linear
    linear.load_state_dict(ours.part("head."), strict=False)
    pairs = {
        "linear.weight": linear.weight,
        "linear.bias": linear.bias,
        "scale": linear.logit_scale,
        "offset": linear.logit_bias,
        "confidence.weight": linear.confidence_layer.weight,
        "confidence.bias": linear.confidence_layer.bias,
    }
    for name, value in ours.part("head.", ours.start).items():
        theirs = pairs[name].detach()
        if name == "confidence.bias":  # the only random one
            theirs.copy_(value)
        assert torch.equal(value.reshape(theirs.shape), theirs), name
    assert ours.config.weight_power == 1.2
    assert trained(network) == ours.trained
    optimizer = torch.optim.SGD(
        [value for value in network.parameters() if value.requires_grad],
        momentum=ours.config.momentum, weight_decay=ours.config.weight_decay,
    )  # fmt: skip
    network.train()
    for step in ours.steps:
        optimizer.param_groups[0]["lr"] = step.lr
        optimizer.zero_grad()
        network.loss_evaluator(network(step.images), step.targets).backward()
        optimizer.step()
    compare(ours, network.network.features, pairs, agreement)


# ---- weight balancing ----


@needs("LTR-weight-balancing")
def test_the_second_stage_of_weight_balancing(run: Run, agreement: Agreement) -> None:
    """The code limits norms after each epoch. Here it does so after each step, as fastsam and the paper."""
    ours = run("weight-balancing")
    repository = "LTR-weight-balancing"
    model = nn.Module()
    model.encoder = nn.Module()
    model.encoder.features, model.encoder.fc = ours.features(), nn.Linear(D, C)
    model.encoder.fc.load_state_dict(ours.part("head."))
    script = statements(
        repository, "demo2_second-stage-training.py", "thresh", "optimizer",
        model=model, optim=torch.optim, nClasses=C, device="cpu",
        img_num_per_cls=FEW.counts.tolist(),
        **{
            kind: getattr(official(repository, f"utils/{name}.py"), kind)
            for name, kind in (("regularizers", "MaxNorm_via_PGD"), ("class_balanced_loss", "CB_loss"))
        },
    )  # fmt: skip
    head = model.encoder.fc
    assert trained(model) == ours.trained
    assert all(
        torch.equal(v, head.get_parameter(k)) for k, v in ours.part("head.", ours.start).items()
    )
    (group,) = script.optimizer.param_groups
    assert group["weight_decay"] == ours.config.weight_decay
    model.train()
    for step in ours.steps:
        group["lr"] = step.lr
        script.optimizer.zero_grad()
        logits = head(model.encoder.features(step.images))
        script.CB_lossFunc(logits, step.targets).backward()
        script.optimizer.step()
        script.pgdFunc.PGD(model)
    compare(ours, model.encoder.features, dict(head.named_parameters()), agreement)


# ---- lists without an official code ----


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear-probe", "fine-tuning"])
def test_a_pretrained_network_is_trained_as_in_plain_torch(name: str, run: Run) -> None:
    ours = run(name)
    features, head = ours.features(), nn.Linear(D, C)
    head.load_state_dict(ours.part("head."))
    assert all(torch.equal(value, ours.start[key]) for key, value in ours.before.items())
    groups: list[dict[str, Any]] = [{"params": [*head.parameters()], "scale": 1.0}]
    if name == "fine-tuning":
        groups.append({"params": [*features.parameters()], "scale": 0.1})
        features.train()
    else:
        features.eval().requires_grad_(requires_grad=False)
    assert trained(features, head) == ours.trained
    config = ours.config
    optimizer = torch.optim.SGD(
        groups,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=bool(config.nesterov),
    )
    for step in ours.steps:
        for group in optimizer.param_groups:
            group["lr"] = step.lr * group["scale"]
        optimizer.zero_grad()
        functional.cross_entropy(head(features(step.images)), step.targets).backward()
        optimizer.step()
    compare(ours, features, dict(head.named_parameters()), Agreement())
