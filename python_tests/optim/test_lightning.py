"""SAM and its variants in real Lightning loops equal the same steps written by hand."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastsam import SAM
from fastsam.optim import LPFSGD, PGD, EntropySGD, FunctionSchedule, LookSAM, RhoScheduler

with warnings.catch_warnings():  # Lightning's imports use deprecated parts of setuptools
    warnings.simplefilter("ignore")
    import lightning.pytorch as pl
    from lightning.fabric import Fabric
    from lightning.pytorch.plugins.precision import MixedPrecision

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

# Lightning's advice on machines with many cores, and its use of deprecated parts of torch.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]

Settings = dict[str, Any]
BATCHES = 6
BASES: dict[str, tuple[Any, Settings]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"lr": 0.05}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.02}),
}


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(4 * BATCHES, 5, generator=generator)
    return TensorDataset(inputs, torch.randint(3, (4 * BATCHES,), generator=generator))


def batches() -> list[tuple[Tensor, Tensor]]:
    return [tuple(batch) for batch in DataLoader(data(), batch_size=4)]


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    inputs, targets = batch
    return nn.functional.cross_entropy(model(inputs), targets)


def trainer(tmp_path: Path, **settings: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **{"max_epochs": 1, "enable_checkpointing": False, **settings},
    )


class Module(pl.LightningModule):
    """A network whose optimizer the test constructs."""

    def __init__(self, make: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.model = network()
        self.make = make

    def configure_optimizers(self) -> Any:
        return self.make(self.model)

    def train_dataloader(self) -> Any:
        return DataLoader(data(), batch_size=4)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return loss_of(self.model, batch)


class Manual(Module):
    """Two passes written out, finished in one of several ways."""

    def __init__(self, make: Callable[[nn.Module], Any], finish: str) -> None:
        super().__init__(make)
        self.automatic_optimization = False
        self.finish = finish

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(loss_of(self.model, batch))
        optimizer.first_step(zero_grad=True)
        FINISH[self.finish](self, optimizer, lambda: loss_of(self.model, batch))
        optimizer.zero_grad()


def _second_step(module: pl.LightningModule, optimizer: Any, loss: Callable[[], Tensor]) -> None:
    module.manual_backward(loss())
    optimizer.second_step()


def _step(module: pl.LightningModule, optimizer: Any, loss: Callable[[], Tensor]) -> None:
    module.manual_backward(loss())
    optimizer.step()


def _step_closure(module: pl.LightningModule, optimizer: Any, loss: Callable[[], Tensor]) -> None:
    optimizer.step(lambda: module.manual_backward(loss()))


def _raw_second_step(
    module: pl.LightningModule, optimizer: Any, loss: Callable[[], Tensor]
) -> None:
    module.manual_backward(loss())
    optimizer.optimizer.second_step()


FINISH = {
    "second_step": _second_step,
    "step": _step,
    "step(closure)": _step_closure,
    "second_step of the optimizer inside": _raw_second_step,
}


def by_hand(base: str, **options: Any) -> nn.Module:
    model = network()
    kind, settings = BASES[base]
    optimizer = SAM(model.parameters(), kind, rho=0.1, **options, **settings)
    for batch in batches():
        loss_of(model, batch).backward()
        optimizer.first_step(zero_grad=True)
        loss_of(model, batch).backward()
        optimizer.second_step(zero_grad=True)
    return model


def sam(base: str, **options: Any) -> Callable[[nn.Module], SAM]:
    kind, settings = BASES[base]
    return lambda model: SAM(model.parameters(), kind, rho=0.1, **options, **settings)


def assert_same(first: nn.Module, second: nn.Module) -> None:
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("closure", ["second_pass", "both_passes"])
@pytest.mark.parametrize("finish", FINISH)
@pytest.mark.parametrize("base", BASES)
def test_manual_optimization(base: str, finish: str, closure: str, tmp_path: Path) -> None:
    module = Manual(sam(base, closure=closure), finish)
    trainer(tmp_path).fit(module)
    assert_same(module.model, by_hand(base))
    assert not module.trainer.optimizers[0].native_step.climbed


def test_a_scheduler_and_step_hooks_see_every_manual_step(tmp_path: Path) -> None:
    """A scheduler warns if it missed the optimizer's step, and pytest turns warnings into errors."""
    calls: list[str] = []

    class Scheduled(Manual):
        def configure_optimizers(self) -> Any:
            optimizer = self.make(self.model)
            optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
            optimizer.register_step_post_hook(lambda *_: calls.append("after"))
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

        def training_step(self, batch: Any, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            self.lr_schedulers().step()

    for finish in FINISH:
        calls.clear()
        module = Scheduled(sam("sgd"), finish)
        trainer(tmp_path).fit(module)
        assert calls == ["before", "after"] * BATCHES
        assert module.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(
            0.1 * 0.5**BATCHES
        )


def test_two_optimizers_take_turns(tmp_path: Path) -> None:
    """``toggle_optimizer`` freezes parameters that belong only to the other optimizer."""

    class Turns(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.model = network()

        def configure_optimizers(self) -> Any:
            halves = (self.model[0], self.model[2])
            return [SAM(half.parameters(), torch.optim.SGD, rho=0.1, lr=0.1) for half in halves]

        def train_dataloader(self) -> Any:
            return DataLoader(data(), batch_size=4)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for number, optimizer in enumerate(self.optimizers()):
                self.toggle_optimizer(optimizer)
                self.manual_backward(loss_of(self.model, batch))
                optimizer.first_step(zero_grad=True)
                self.manual_backward(loss_of(self.model, batch))
                if (batch_idx + number) % 2:
                    optimizer.step()
                else:
                    optimizer.second_step()
                optimizer.zero_grad()
                self.untoggle_optimizer(optimizer)

    module = Turns()
    trainer(tmp_path).fit(module)
    model = network()
    halves = (model[0], model[2])
    optimizers = [SAM(half.parameters(), torch.optim.SGD, rho=0.1, lr=0.1) for half in halves]
    for batch in batches():
        for optimizer in optimizers:
            model.zero_grad()
            loss_of(model, batch).backward()
            optimizer.first_step()
            model.zero_grad()
            loss_of(model, batch).backward()
            optimizer.second_step()
    assert_same(module.model, model)
    assert all(p.requires_grad for p in module.model.parameters())


def test_a_toggled_model(tmp_path: Path) -> None:
    class Toggled(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            with self.optimizers().toggle_model():
                super().training_step(batch, batch_idx)

    module = Toggled(sam("sgd"), "second_step")
    trainer(tmp_path).fit(module)
    assert_same(module.model, by_hand("sgd"))


@pytest.mark.parametrize("closure", ["second_pass", "both_passes"])
def test_the_error_of_a_plain_step_in_manual_optimization_names_the_calls(
    closure: str, tmp_path: Path
) -> None:
    """Lightning passes a closure that does nothing, which would silently train nothing."""

    class Plain(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss_of(self.model, batch))
            optimizer.step()

    module = Plain(sam("sgd", closure=closure), "step")
    with pytest.raises(RuntimeError, match="first_step"):
        trainer(tmp_path).fit(module)
    assert_same(module.model, network())


def test_the_error_of_a_missing_second_pass_names_it(tmp_path: Path) -> None:
    class Forgotten(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            self.manual_backward(loss_of(self.model, batch))
            optimizer.first_step(zero_grad=True)
            optimizer.step()

    module = Forgotten(sam("sgd"), "step")
    with pytest.raises(RuntimeError, match="second pass"):
        trainer(tmp_path).fit(module)
    assert_same(module.model, network())


# --- automatic optimization ---------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
def test_automatic_optimization(base: str, tmp_path: Path) -> None:
    module = Module(sam(base, closure="both_passes"))
    trainer(tmp_path).fit(module)
    assert_same(module.model, by_hand(base))


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_training_step_may_skip_its_batch(tmp_path: Path) -> None:
    class Skipping(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None

    module = Skipping(sam("sgd", closure="both_passes"))
    trainer(tmp_path).fit(module)
    assert_same(module.model, network())


def test_clipping_reaches_both_passes(tmp_path: Path) -> None:
    module = Module(sam("sgd", closure="both_passes"))
    trainer(tmp_path, gradient_clip_val=0.1).fit(module)
    model = network()
    optimizer = sam("sgd")(model)
    for batch in batches():
        for half in (optimizer.first_step, optimizer.second_step):
            loss_of(model, batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            half(zero_grad=True)
    assert_same(module.model, model)


def test_automatic_accumulation_is_refused(tmp_path: Path) -> None:
    """The closure of the last micro-batch does not include those before it."""
    module = Module(sam("sgd", closure="both_passes"))
    with pytest.raises(RuntimeError, match="accumulate"):
        trainer(tmp_path, accumulate_grad_batches=2).fit(module)
    assert_same(module.model, network())


def test_manual_accumulation(tmp_path: Path) -> None:
    class Accumulating(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            parts = list(zip(*(part.chunk(2) for part in batch), strict=True))
            for finish in (optimizer.first_step, optimizer.second_step):
                for part in parts:
                    self.manual_backward(loss_of(self.model, part) / len(parts))
                finish(zero_grad=True)

    module = Accumulating(sam("sgd"), "second_step")
    trainer(tmp_path).fit(module)
    for a, b in zip(module.model.parameters(), by_hand("sgd").parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "make",
    [
        lambda sgd: LookSAM(sgd, rho=0.1, every=2),
        lambda sgd: PGD(sgd, sigma=0.01),
        lambda sgd: LPFSGD(sgd, gamma=0.01, parts=2),
        lambda sgd: EntropySGD(sgd, steps=2),
    ],
    ids=["looksam", "pgd", "lpf", "entropy"],
)
def test_variants_in_automatic_optimization(make: Callable[..., Any], tmp_path: Path) -> None:
    def build(model: nn.Module) -> Any:
        return make(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))

    module = Module(build)
    trainer(tmp_path).fit(module)
    model = network()
    optimizer = build(model)
    for batch in batches():

        def closure(batch: Any = batch) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert_same(module.model, model)


@pytest.mark.parametrize(
    "make",
    [LookSAM, LPFSGD, EntropySGD, lambda sgd: PGD(sgd, sigma=0.1, noise_on="weights")],
    ids=["looksam", "lpf", "entropy", "pgd"],
)
def test_a_plain_step_of_a_variant_in_manual_optimization(
    make: Callable[..., Any], tmp_path: Path
) -> None:
    class Plain(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(loss_of(self.model, batch))
            self.optimizers().step()

    module = Plain(lambda model: make(torch.optim.SGD(model.parameters(), lr=0.1)), "step")
    with pytest.raises(RuntimeError, match="closure"):
        trainer(tmp_path).fit(module)
    assert_same(module.model, network())


# --- precision, schedules, checkpoints ----------------------------------------------------------


def test_bf16_mixed(tmp_path: Path) -> None:
    for module in (
        Manual(sam("sgd"), "second_step"),
        Manual(sam("sgd"), "step"),
        Module(sam("sgd", closure="both_passes")),
    ):
        trainer(tmp_path, precision="bf16-mixed").fit(module)
        model = network()
        optimizer = sam("sgd")(model)
        for batch in batches():
            for half in (optimizer.first_step, optimizer.second_step):
                with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                    loss = loss_of(model, batch)
                loss.backward()
                half(zero_grad=True)
        if isinstance(module, Manual):
            for a, b in zip(module.model.parameters(), model.parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
        else:
            assert_same(module.model, model)


def test_16_mixed_with_a_scaler(tmp_path: Path) -> None:
    """The scaler checks and unscales the second pass in ``step()``; overflow skips and backs off."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    module = Manual(sam("sgd"), "step")
    trainer(tmp_path, plugins=[plugin], max_epochs=6).fit(module)
    assert scaler.get_scale() < 2.0**40
    assert int(module.trainer.optimizers[0].skipped_steps) > 0
    assert all(bool(p.isfinite().all()) for p in module.model.parameters())
    assert not torch.equal(module.model[0].weight, network()[0].weight)


def test_a_scaler_in_automatic_optimization_is_refused(tmp_path: Path) -> None:
    """Lightning calls the closure once and then ``step()``, so there is no second pass."""
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    module = Module(sam("sgd", closure="both_passes"))
    with pytest.raises(RuntimeError, match="first_step"):
        trainer(tmp_path, plugins=[plugin]).fit(module)
    assert_same(module.model, network())


def test_rho_is_scheduled_through_the_wrapper(tmp_path: Path) -> None:
    seen: list[float] = []

    class Scheduled(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                self.rho = RhoScheduler(
                    self.optimizers(), FunctionSchedule(lambda epoch: 0.1 * epoch)
                )
            super().training_step(batch, batch_idx)
            seen.append(self.trainer.optimizers[0].param_groups[0]["rho"])
            self.rho.step()

    trainer(tmp_path).fit(Scheduled(sam("sgd"), "second_step"))
    assert seen == pytest.approx([0.1 * (step + 1) for step in range(BATCHES)])


@pytest.mark.parametrize("manual", [True, False])
def test_a_run_is_resumed_from_its_checkpoint(manual: bool, tmp_path: Path) -> None:
    def module() -> Module:
        if manual:
            return Manual(sam("sgd"), "second_step")
        return Module(sam("sgd", closure="both_passes"))

    whole = module()
    trainer(tmp_path, max_epochs=4).fit(whole)
    first = trainer(tmp_path, max_epochs=2)
    first.fit(module())
    first.save_checkpoint(tmp_path / "half.ckpt")
    rest = module()
    trainer(tmp_path, max_epochs=4).fit(rest, ckpt_path=tmp_path / "half.ckpt")
    assert_same(whole.model, rest.model)


def test_loads_and_assignments_through_the_wrapper_reach_the_optimizer(tmp_path: Path) -> None:
    """The wrapper stores attributes that are written to it."""

    class Loading(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            wrapped = self.optimizers()
            raw = wrapped.optimizer
            wrapped.load_state_dict(wrapped.state_dict())
            assert wrapped.param_groups is raw.param_groups
            assert wrapped.state is raw.state
            wrapped.param_groups = [{**group, "rho": 0.2} for group in wrapped.param_groups]
            assert raw.param_groups is raw.base_optimizer.param_groups
            assert raw.param_groups[0]["rho"] == 0.2
            super().training_step(batch, batch_idx)

    module = Loading(sam("sgd"), "second_step")
    trainer(tmp_path).fit(module)
    kind, settings = BASES["sgd"]
    model = network()
    optimizer = SAM(model.parameters(), kind, rho=0.2, **settings)
    for batch in batches():
        for half in (optimizer.first_step, optimizer.second_step):
            loss_of(model, batch).backward()
            half(zero_grad=True)
    assert_same(module.model, model)


@pytest.mark.parametrize("closure", ["second_pass", "both_passes"])
@pytest.mark.parametrize("finish", FINISH)
@pytest.mark.parametrize("base", BASES)
def test_fabric(base: str, finish: str, closure: str) -> None:
    """Its wrapper of an optimizer works like that of the Trainer."""
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    plain = network()
    model, optimizer = fabric.setup(plain, sam(base, closure=closure)(plain))

    class Backward:
        manual_backward = staticmethod(fabric.backward)

    for batch in batches():
        fabric.backward(loss_of(model, batch))
        optimizer.first_step(zero_grad=True)
        FINISH[finish](Backward, optimizer, lambda batch=batch: loss_of(model, batch))
        optimizer.zero_grad()
        optimizer.load_state_dict(optimizer.state_dict())
    assert_same(plain, by_hand(base))
