"""Runs with late ascents in real training loops: Lightning, Fabric, Accelerate, Trainer, timm."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, SequentialSampler

from fastsam import SAM
from fastsam.integrations.hugging_face import SAMTrainer
from python_tests.optim.late_phase import (
    RHO,
    SGD,
    STEPS,
    Task,
    assert_equals_base_until,
    climbed,
    reference,
    weights,
)
from python_tests.optim.trajectories import assert_same_bits

with warnings.catch_warnings():  # ignore deprecation warnings of their imports
    warnings.simplefilter("ignore")
    import lightning.pytorch as pl
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from lightning.fabric import Fabric

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]

START = 5
BATCHES = 3
"""Steps per epoch: 0 to 2, 3 to 5, ..., so that ``start`` is within an epoch."""
DECAY = 0.9
"""Decay of the learning rate in every step, by a scheduler that would warn if it missed a step."""

History = list[list[Tensor]]


@pytest.fixture(autouse=True)
def _no_state_is_left() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def expected(seed: int) -> History:
    return reference(Task(seed), range(START, STEPS), decay=DECAY, **SGD)


def sam(model: nn.Module, **options: Any) -> SAM:
    return SAM(model.parameters(), torch.optim.SGD, rho=RHO, start=START, **options, **SGD)


def assert_passes(task: Task) -> None:
    assert [task.passes[n] for n in range(STEPS)] == [1] * START + [2] * (STEPS - START)


# --- Lightning ----------------------------------------------------------------------------------


class Module(pl.LightningModule):
    """Automatic optimization, with a closure for both passes."""

    options: ClassVar[dict[str, Any]] = {"closure": "both_passes"}

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.task = Task(seed)
        self.model = self.task.network()
        self.history: History = []

    def configure_optimizers(self) -> Any:
        optimizer = sam(self.model, **self.options)
        scheduler = {"scheduler": ExponentialLR(optimizer, DECAY), "interval": "step"}
        return [optimizer], [scheduler]

    def train_dataloader(self) -> Any:
        return DataLoader(range(BATCHES))  # type: ignore[arg-type]

    def loss(self, batch_idx: int) -> Tensor:
        return self.task.loss(self.model, self.current_epoch * BATCHES + batch_idx)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch_idx)

    def on_train_batch_end(self, *args: Any) -> None:
        self.history.append(weights(self.model))


class Manual(Module):
    """Manual optimization that checks ``ascent_due``."""

    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        self.manual_backward(self.loss(batch_idx))
        if optimizer.ascent_due:
            optimizer.first_step(zero_grad=True)
            self.manual_backward(self.loss(batch_idx))
        optimizer.step()
        optimizer.zero_grad()
        self.lr_schedulers().step()  # type: ignore[union-attr, call-arg]


class ManualClosure(Manual):
    """The second pass is a closure, which is not called where no ascent is due."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        self.manual_backward(self.loss(batch_idx))
        optimizer.step(lambda: self.manual_backward(self.loss(batch_idx)))
        optimizer.zero_grad()
        self.lr_schedulers().step()  # type: ignore[union-attr, call-arg]


class ManualUnchanged(Manual):
    """Two-call code that ignores the policy."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        self.manual_backward(self.loss(batch_idx))
        optimizer.first_step(zero_grad=True)
        self.manual_backward(self.loss(batch_idx))
        optimizer.second_step(zero_grad=True)
        self.lr_schedulers().step()  # type: ignore[union-attr, call-arg]


MODULES = [Module, Manual, ManualClosure, ManualUnchanged]


def trainer(folder: Path, epochs: int = STEPS // BATCHES) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        max_epochs=epochs,
        enable_checkpointing=False,
    )


@pytest.mark.parametrize("kind", MODULES)
def test_lightning(kind: type[Module], expected: History, seed: int, tmp_path: Path) -> None:
    module = kind(seed)
    trainer(tmp_path).fit(module)
    assert_equals_base_until(START, module.history, expected)
    if kind is not ManualUnchanged:
        assert_passes(module.task)
    (optimizer,) = module.trainer.optimizers
    assert optimizer.attempted_steps == STEPS


@pytest.mark.parametrize("epochs", [1, 2, 3])
@pytest.mark.parametrize("kind", MODULES)
def test_lightning_resumes_on_both_sides_of_start(
    kind: type[Module], epochs: int, seed: int, tmp_path: Path
) -> None:
    whole = kind(seed)
    trainer(tmp_path).fit(whole)
    first, begun = trainer(tmp_path, epochs), kind(seed)
    first.fit(begun)
    first.save_checkpoint(tmp_path / "begun.ckpt")
    rest = kind(seed)
    trainer(tmp_path).fit(rest, ckpt_path=tmp_path / "begun.ckpt")
    for found, wanted in zip([*begun.history, *rest.history], whole.history, strict=True):
        assert_same_bits(found, wanted)


# --- Fabric -------------------------------------------------------------------------------------

Backward = Callable[[Tensor], Any]
MakeStep = Callable[[Any, Any, Backward, Callable[[], Tensor]], None]


def _asks(optimizer: Any, inner: Any, backward: Backward, loss: Callable[[], Tensor]) -> None:
    """Make a step that checks ``ascent_due``; ``inner`` is the SAM inside the wrapper ``optimizer``."""
    backward(loss())
    if inner.ascent_due:
        inner.first_step(zero_grad=True)
        backward(loss())
    optimizer.step()
    optimizer.zero_grad()


def _second_pass(
    optimizer: Any, inner: Any, backward: Backward, loss: Callable[[], Tensor]
) -> None:
    backward(loss())
    optimizer.step(lambda: backward(loss()))
    optimizer.zero_grad()


def _both_passes(
    optimizer: Any, inner: Any, backward: Backward, loss: Callable[[], Tensor]
) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        backward(value)
        return value

    optimizer.step(closure)


STEPS_OF: dict[str, tuple[MakeStep, dict[str, Any]]] = {
    "asks": (_asks, {}),
    "closure for the second pass": (_second_pass, {}),
    "closure for both passes": (_both_passes, {"closure": "both_passes"}),
}


@pytest.mark.parametrize("resumed_at", [None, 3, 5, 8])
@pytest.mark.parametrize("way", STEPS_OF)
def test_fabric(
    way: str, resumed_at: int | None, expected: History, seed: int, tmp_path: Path
) -> None:
    one_step, options = STEPS_OF[way]
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    task = Task(seed)

    def setup() -> tuple[nn.Module, Any, Any, Any]:
        plain = task.network()
        model, optimizer = fabric.setup(plain, sam(plain, **options))
        return plain, model, optimizer, ExponentialLR(optimizer, DECAY)

    plain, model, optimizer, scheduler = setup()
    history = []
    for n in range(STEPS):
        if n == resumed_at:
            state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
            fabric.save(tmp_path / "state", state)
            plain, model, optimizer, scheduler = setup()
            state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
            fabric.load(tmp_path / "state", state)
        one_step(optimizer, optimizer, fabric.backward, partial(task.loss, model, n))
        scheduler.step()
        history.append(weights(plain))
    assert_equals_base_until(START, history, expected)
    assert_passes(task)


# --- Accelerate ---------------------------------------------------------------------------------


@pytest.mark.parametrize("resumed_at", [None, 3, 5, 8])
@pytest.mark.parametrize("way", STEPS_OF)
def test_accelerate(
    way: str, resumed_at: int | None, expected: History, seed: int, tmp_path: Path
) -> None:
    """Its wrapper has only the calls of torch; those of SAM are in ``optimizer.optimizer``."""
    one_step, options = STEPS_OF[way]
    task = Task(seed)

    def setup() -> tuple[Any, nn.Module, Any, Any]:
        accelerator = Accelerator(cpu=True)
        model = task.network()
        optimizer = sam(model, **options)
        prepared = accelerator.prepare(model, optimizer, ExponentialLR(optimizer, DECAY))
        return (accelerator, *prepared)

    accelerator, model, optimizer, scheduler = setup()
    history = []
    for n in range(STEPS):
        if n == resumed_at:
            accelerator.save_state(str(tmp_path))
            accelerator, model, optimizer, scheduler = setup()
            accelerator.load_state(str(tmp_path))
        loss = partial(task.loss, model, n)
        one_step(optimizer, optimizer.optimizer, accelerator.backward, loss)
        scheduler.step()
        history.append(weights(model))
    assert_equals_base_until(START, history, expected)
    assert_passes(task)


def test_accelerate_accumulates(seed: int) -> None:
    """A due step replays every micro-batch at the perturbed weights."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    task = Task(seed)
    model = task.network()
    model, optimizer = accelerator.prepare(model, sam(model))
    halves = (slice(0, 6), slice(6, 12))

    def backward(n: int) -> None:
        for part in halves:
            with accelerator.accumulate(model):
                accelerator.backward(task.loss(model, n, part))

    history = []
    for n in range(STEPS):
        backward(n)
        if optimizer.optimizer.ascent_due:
            optimizer.optimizer.first_step(zero_grad=True)
            backward(n)
        optimizer.step()
        optimizer.zero_grad()
        history.append(weights(model))
    quiet = Task(seed)

    def by_hand(model: nn.Module, n: int) -> None:
        for part in halves:
            (quiet.loss(model, n, part) / 2).backward()

    expected = reference(quiet, range(START, STEPS), backward=by_hand, **SGD)
    assert_equals_base_until(START, history, expected)


# --- Hugging Face Trainer -----------------------------------------------------------------------


class _LossOfStep(nn.Module):
    """A model that returns its loss, as the Trainer expects; its input is the number of the step."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task
        self.network = task.network()

    def forward(self, n: Tensor) -> dict[str, Tensor]:
        return {"loss": self.task.loss(self.network, int(n))}


@pytest.mark.slow
@pytest.mark.parametrize("resumed_at", [None, 3, 6])
def test_hugging_face_trainer(
    resumed_at: int | None, expected: History, seed: int, tmp_path: Path
) -> None:
    """A SAM that the caller constructs, with a schedule."""
    transformers = pytest.importorskip("transformers")

    class InOrder(SAMTrainer, transformers.Trainer):  # type: ignore[misc, name-defined]
        def _get_train_sampler(self, *args: Any) -> SequentialSampler:
            return SequentialSampler(range(STEPS))

    class Recorder(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.history: History = []

        def on_step_end(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
            self.history.append(weights(model))

    def fit(**kwargs: Any) -> tuple[Task, History]:
        task = Task(seed)
        model = _LossOfStep(task)
        optimizer = sam(model)
        recorder = Recorder()
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            per_device_train_batch_size=1,
            num_train_epochs=1,
            max_grad_norm=0.0,
            save_steps=3,
            save_strategy="steps",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        InOrder(
            model=model,
            args=arguments,
            train_dataset=[{"n": n} for n in range(STEPS)],
            optimizers=(optimizer, ExponentialLR(optimizer, DECAY)),
            callbacks=[recorder],
        ).train(**kwargs)
        return task, recorder.history

    task, history = fit()
    assert_equals_base_until(START, history, expected)
    assert_passes(task)
    if resumed_at is not None:
        folder = tmp_path / f"checkpoint-{resumed_at}"
        _, rest = fit(resume_from_checkpoint=str(folder))
        for found, wanted in zip(rest, history[resumed_at:], strict=True):
            assert_same_bits(found, wanted)


# --- timm ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("resumed_at", [None, 3, 8])
@pytest.mark.parametrize("opt", ["sgd", "momentum"])
def test_the_loop_of_timm_s_training_script(opt: str, resumed_at: int | None, seed: int) -> None:
    """With its model, optimizer factory (no weight decay on biases and norms), clipping and schedule."""
    timm = pytest.importorskip("timm")
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import dispatch_clip_grad

    loss_fn = nn.CrossEntropyLoss()
    start: dict[str, Tensor] = timm.create_model(
        "test_vit", num_classes=3, img_size=32
    ).state_dict()

    def batch(n: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed + n)
        images = torch.randn(4, 3, 32, 32, generator=generator)
        return images, torch.randint(3, (4,), generator=generator)

    def setup(start_at: int | None) -> tuple[nn.Module, Any, Any]:
        model: nn.Module = timm.create_model("test_vit", num_classes=3, img_size=32)
        model.load_state_dict(start)
        optimizer = create_optimizer_v2(model, opt=opt, lr=0.05, weight_decay=0.01, momentum=0.9)
        assert len(optimizer.param_groups) == 2
        if start_at is not None:
            optimizer = SAM(optimizer=optimizer, rho=0.05, start=start_at)
        schedule = CosineLRScheduler(
            optimizer, t_initial=STEPS, warmup_t=3, warmup_lr_init=0.01, t_in_epochs=False
        )
        return model.train(), optimizer, schedule

    def backward(model: nn.Module, n: int) -> None:
        inputs, targets = batch(n)
        loss_fn(model(inputs), targets).backward()
        dispatch_clip_grad(model.parameters(), value=1.0, mode="norm")

    def train(start_at: int) -> History:
        model, optimizer, schedule = setup(start_at)
        history = []
        for n in range(STEPS):
            if n == resumed_at:
                saved = model.state_dict(), optimizer.state_dict()
                model, optimizer, schedule = setup(STEPS)
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
            backward(model, n)
            if optimizer.ascent_due:
                optimizer.first_step(zero_grad=True)
                backward(model, n)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step_update(num_updates=n + 1)
            history.append(weights(model))
        return history

    def by_hand(start_at: int) -> History:
        model, optimizer, schedule = setup(None)
        history = []
        for n in range(STEPS):
            backward(model, n)
            if n >= start_at:
                with climbed(model, rho=0.05):
                    optimizer.zero_grad()
                    backward(model, n)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step_update(num_updates=n + 1)
            history.append(weights(model))
        return history

    assert_equals_base_until(START, train(START), by_hand(START))
    assert_equals_base_until(STEPS, train(STEPS), by_hand(STEPS))
