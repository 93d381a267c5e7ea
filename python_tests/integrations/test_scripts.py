"""The scripts under examples/ that use another library have the bits of a plain loop."""

from __future__ import annotations

import runpy
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastsam import SAM
from fastsam.optim import frozen_batch_norm_statistics
from python_tests.ranks import run_launched

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

Weights = dict[str, Tensor]
Batches = Sequence[tuple[Tensor, Tensor]]


@pytest.fixture(autouse=True)
def _folder_and_state_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Isolate each test: libraries write logs to the working directory, and Accelerate has global state."""
    monkeypatch.chdir(tmp_path)
    yield
    try:
        from accelerate.state import AcceleratorState, GradientState
    except ImportError:
        return
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run(script: str, package: str | None = None) -> Weights:
    """Return the weights that a script trains; skip if its package is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if package is not None:
            reason = f"{package} is not installed: pip install {package}"
            pytest.importorskip(package, reason=reason, exc_type=ImportError)
        weights: Weights = runpy.run_path(str(EXAMPLES / script))["main"]()
    return weights


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))


def samples() -> tuple[Tensor, Tensor]:
    return torch.randn(256, 8), torch.randint(2, (256,))


def train(
    model: nn.Module,
    batches: Batches,
    *,
    epochs: int = 1,
    parts: int = 1,
    loss_of: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
    start: int = 0,
    **options: Any,
) -> nn.Module:
    """Train with a plain loop of SAM steps, with ``parts`` micro-batches per batch in both passes."""
    loss_of = loss_of or (lambda net, x, y: nn.functional.cross_entropy(net(x), y))
    optimizer = SAM(
        model.parameters(),
        torch.optim.SGD,
        rho=0.05,
        start=start,
        **(options or {"lr": 0.1, "momentum": 0.9}),
    )
    for _ in range(epochs):
        for x, y in batches:
            ascends = optimizer.ascent_due
            for half in (optimizer.first_step, optimizer.second_step)[not ascends :]:
                for inputs, targets in zip(x.chunk(parts), y.chunk(parts), strict=True):
                    (loss_of(model, inputs, targets) / parts).backward()
                half(zero_grad=True)
    return model


def assert_same_bits(found: Weights, wanted: Weights) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name


@pytest.mark.parametrize(
    ("script", "package", "parts"),
    [
        ("lightning_manual.py", "lightning", 1),
        ("lightning_automatic.py", "lightning", 1),
        ("lightning_accumulation.py", "lightning", 4),
        ("fabric_sam.py", "lightning", 1),
        ("accelerate_sam.py", "accelerate", 1),
    ],
)
def test_loops_of_other_libraries(script: str, package: str, parts: int) -> None:
    found = run(script, package)
    torch.manual_seed(0)
    model = network()
    x, y = samples()
    train(model, list(zip(x.split(32), y.split(32), strict=True)), epochs=2, parts=parts)
    assert_same_bits(found, model.state_dict())


@pytest.mark.parametrize("script", ["lightning_manual.py", "lightning_accumulation.py"])
def test_lightning_counts_the_steps_of_manual_optimization(script: str, tmp_path: Path) -> None:
    """Otherwise it would not stop after ``max_steps``, and would save no checkpoint."""
    lightning = pytest.importorskip(
        "lightning", reason="lightning is not installed: pip install lightning"
    )
    model = runpy.run_path(str(EXAMPLES / script))["Classifier"]()
    data = DataLoader(TensorDataset(*samples()), batch_size=8)
    trainer = lightning.Trainer(
        max_epochs=2, max_steps=3, accelerator="cpu", default_root_dir=tmp_path
    )
    trainer.fit(model, data)
    assert trainer.global_step == 3
    assert [*tmp_path.rglob("*.ckpt")]


def test_lightning_logs_and_normalizes_in_the_first_pass_only() -> None:
    pytest.importorskip("lightning")
    state, logged = runpy.run_path(str(EXAMPLES / "lightning_first_pass.py"))["main"]()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 2))
    x, y = samples()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
    for _ in range(2):
        losses = []
        for inputs, targets in zip(x.split(32), y.split(32), strict=True):
            loss = nn.functional.cross_entropy(model(inputs), targets)
            losses.append(loss.item())
            loss.backward()
            optimizer.first_step(zero_grad=True)
            with frozen_batch_norm_statistics(model):
                nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.second_step(zero_grad=True)
    assert_same_bits(state, model.state_dict())
    assert logged == pytest.approx(sum(losses) / len(losses), abs=1e-6)


def test_a_callback_chooses_the_first_ascent() -> None:
    found = run("lightning_late_start.py", "lightning")
    torch.manual_seed(0)
    model = network()
    x, y = samples()
    batches = list(zip(x.split(32), y.split(32), strict=True))
    train(model, batches, epochs=2, start=12, lr=0.1)
    assert_same_bits(found, model.state_dict())


def test_lightning_checkpoints_keep_the_curvature(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    script = runpy.run_path(str(EXAMPLES / "lightning_curvature.py"), run_name="script")
    torch.manual_seed(0)
    x, y = samples()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=32)

    def fit(epochs: int, **options: Any) -> Any:
        torch.manual_seed(1)
        model = script["Classifier"]((x, y))
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(model, loader, **options)
        trainer.save_checkpoint(tmp_path / "cut.ckpt")
        return model

    cut = fit(1)
    steps = [point.step for point in cut.tracker.points]
    assert steps[0] == 1
    again = fit(2, ckpt_path=tmp_path / "cut.ckpt")
    assert again.tracker.points[: len(steps)] == cut.tracker.points
    assert again.tracker._next_step == 17  # 2 epochs of 8 steps, from 1
    torch.manual_seed(1)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for inputs, targets in list(zip(x.split(32), y.split(32), strict=True)) * 2:
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same_bits(again.net.state_dict(), model.state_dict())


def test_hugging_face_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain loop reads the micro-batches that the trainer loaded."""
    pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install transformers"
    )
    from transformers import LlamaForCausalLM, Trainer

    seen: list[Any] = []
    begun: list[Weights] = []
    original = Trainer.training_step

    def training_step(self: Any, model: nn.Module, inputs: Any, *args: Any) -> Tensor:
        if not seen:
            begun.append({name: value.clone() for name, value in model.state_dict().items()})
        seen.append(inputs)
        return original(self, model, inputs, *args)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    found = run("hugging_face_sam.py")
    config = runpy.run_path(str(EXAMPLES / "hugging_face_sam.py"))["CONFIG"]
    assert len(seen) == 2 * 2 * 16  # epochs, passes, micro-batches
    model = LlamaForCausalLM(config)
    model.load_state_dict(begun[0])
    optimizer = SAM(model.parameters(), torch.optim.AdamW, weight_decay=0.0, lr=5e-5)
    for step in range(8):
        optimizer.param_groups[0]["lr"] = 5e-5 * (8 - step) / 8
        parts = seen[8 * step : 8 * step + 4]
        for half in (optimizer.first_step, optimizer.second_step):
            for part in parts:
                text = part["input_ids"]
                words = model(input_ids=text).logits[:, :-1].flatten(0, 1)
                loss = nn.functional.cross_entropy(words, text[:, 1:].flatten(), reduction="sum")
                (loss / (16 * 5)).backward()  # texts of a step, targets of a text
            if half == optimizer.second_step:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            half(zero_grad=True)
    assert_same_bits(found, model.state_dict())


def test_timm() -> None:
    """The plain loop does not scale the loss, because powers of two scale without rounding."""
    found = run("timm_sam.py", "timm")
    import timm
    from timm.optim import create_optimizer_v2

    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    batches = [(torch.randn(8, 3, 32, 32), torch.randint(3, (8,))) for _ in range(4)]
    base = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    optimizer = SAM(optimizer=base, rho=0.05)
    for lr in (1e-4, 7.5e-4, 2.5e-4):  # warm-up; then half a cosine over 3 epochs
        for group in optimizer.param_groups:
            group["lr"] = lr
        for x, y in batches:
            for half in (optimizer.first_step, optimizer.second_step):
                nn.functional.cross_entropy(model(x), y).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                half(zero_grad=True)
    assert_same_bits(found, model.state_dict())


class LoRA(nn.Module):
    """``W x + b + 2 B A x``, the formula of Hu et al. (ICLR 2022)."""

    def __init__(self, adapters: Weights, layer: str) -> None:
        super().__init__()
        prefix = f"base_model.model.{layer}"
        frozen = [adapters[f"{prefix}.base_layer.{name}"] for name in ("weight", "bias")]
        self.weight, self.bias = (nn.Parameter(value, requires_grad=False) for value in frozen)
        self.a, self.b = (
            nn.Parameter(adapters[f"{prefix}.lora_{name}.default.weight"]) for name in "AB"
        )

    def forward(self, inputs: Tensor) -> Tensor:
        linear = nn.functional.linear
        return linear(inputs, self.weight, self.bias) + linear(linear(inputs, self.a), self.b) * 2


def test_lora_adapters() -> None:
    found = run("peft_lora.py", "peft")
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"])
    start = get_peft_model(network(), settings).state_dict()
    start = {name: value.clone() for name, value in start.items()}
    batches = [(torch.randn(32, 8), torch.randint(2, (32,))) for _ in range(8)]
    model = train(nn.Sequential(LoRA(start, "0"), nn.Tanh(), LoRA(start, "2")), batches)
    for layer in "02":
        prefix = f"base_model.model.{layer}"
        for name in "AB":
            weight = found[f"{prefix}.lora_{name}.default.weight"]
            assert torch.equal(weight, model.get_parameter(f"{layer}.{name.lower()}"))
        assert torch.equal(
            found[f"{prefix}.base_layer.weight"], model.get_parameter(f"{layer}.weight")
        )


def _rank(rank: int, script: str, folder: str) -> None:
    torch.save(run(script), Path(folder) / str(rank))


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
@pytest.mark.parametrize("script", ["ddp.py", "fsdp2.py", "zero.py"])
def test_two_processes(script: str, tmp_path: Path) -> None:
    """The plain loop adds gradients of half batches, because halving does not round."""
    run_launched(_rank, 2, script, str(tmp_path))
    torch.manual_seed(0)
    model = network()
    batches = [(torch.randn(32, 8), torch.randint(2, (32,))) for _ in range(8)]
    wanted = train(model, batches, parts=2).state_dict()
    for rank in range(2):
        assert_same_bits(torch.load(tmp_path / str(rank)), wanted)


def test_scripts_are_short() -> None:
    for script in EXAMPLES.glob("*.py"):
        assert len(script.read_text().splitlines()) <= 45, script.name
