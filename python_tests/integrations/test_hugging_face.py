"""SAMTrainer equals the same steps written by hand: accumulation, late ascents, resumed runs, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastsam import SAM
from fastsam.integrations.hugging_face import SAMTrainer

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install transformers"
)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ROWS = 20
"""Ten micro-batches of two: with four to a step, the third step of an epoch has two."""


class Network(nn.Module):
    """A model that returns its loss, as the trainer expects."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(self.net(x), labels)}


class InOrder(SAMTrainer, transformers.Trainer):  # type: ignore[misc, name-defined]
    def _get_train_sampler(self, *args: Any) -> torch.utils.data.SequentialSampler:
        return torch.utils.data.SequentialSampler(range(ROWS))


def rows(seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(ROWS, 5, generator=generator)
    labels = torch.randint(3, (ROWS,), generator=generator)
    return [{"x": x, "labels": label} for x, label in zip(inputs, labels, strict=True)]


def trainer(seed: int, folder: Path, **options: Any) -> InOrder:
    arguments = transformers.TrainingArguments(
        str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.1,
        save_strategy="steps",
        save_steps=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    return InOrder(model=Network(seed), args=arguments, train_dataset=rows(seed), **options)


def by_hand(seed: int, *, start: int = 0) -> nn.Module:
    """Make six steps of 8, 8 and 4 rows, with the mean loss over the micro-batches of a step."""
    model, data = Network(seed), rows(seed)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    pairs = [
        {name: torch.stack([row[name] for row in data[n : n + 2]]) for name in data[0]}
        for n in range(0, ROWS, 2)
    ]
    for step in range(6):
        parts = (pairs[:4], pairs[4:8], pairs[8:])[step % 3]
        for group in optimizer.param_groups:
            group["rho"] = 0.1 if step >= start else 0.0
        for half in (optimizer.first_step, optimizer.second_step)[step < start :]:
            for part in parts:
                (model(**part)["loss"] / len(parts)).backward()
            if half == optimizer.second_step:
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            half(zero_grad=True)
    return model


def assert_same(first: nn.Module, second: nn.Module) -> None:
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("start", [0, 4])
def test_both_passes_go_over_the_micro_batches(start: int, seed: int, tmp_path: Path) -> None:
    run = trainer(seed, tmp_path, sam={"rho": 0.1, "start": start})
    run.train()
    assert run.state.global_step == 6
    assert_same(run.model, by_hand(seed, start=start))


def test_a_resumed_run_has_the_same_bits(seed: int, tmp_path: Path) -> None:
    trainer(seed, tmp_path, sam={"rho": 0.1, "start": 3}).train()
    resumed = trainer(seed + 1, tmp_path, sam={"rho": 0.1, "start": 3})
    resumed.train_dataset = rows(seed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(resumed.model, by_hand(seed, start=3))


def test_a_training_that_stopped_within_a_step_leaves_nothing(seed: int, tmp_path: Path) -> None:
    class Stop(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = True

    run = trainer(seed, tmp_path, sam={"rho": 0.1})
    run.add_callback(Stop)
    run.train()
    run.remove_callback(Stop)
    run.model.load_state_dict(Network(seed).state_dict())
    run.train()
    assert_same(run.model, by_hand(seed))


def test_callbacks_before_the_update_see_the_weights(seed: int, tmp_path: Path) -> None:
    """Transformers also saves there, if it is asked to stop (``enable_jit_checkpoint``)."""
    seen: list[list[Tensor]] = []

    class Look(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append([p.detach().clone() for p in kwargs["model"].parameters()])
            kwargs["optimizer"].state_dict()

    run = trainer(seed, tmp_path, sam={"rho": 0.5})
    run.args.learning_rate = 0.0
    run.add_callback(Look())
    run.train()
    assert len(seen) == 6
    for weights in seen:
        assert all(map(torch.equal, weights, Network(seed).parameters()))


@pytest.mark.parametrize("failing", [2, 6])
def test_an_error_in_either_pass_leaves_nothing(failing: int, seed: int, tmp_path: Path) -> None:
    """Out of memory with ``auto_find_batch_size``: the trainer then begins again with fewer rows."""
    passes: list[int] = []

    class Failing(InOrder):
        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            passes.append(len(inputs["labels"]))
            if len(passes) == failing:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
            return super().compute_loss(model, inputs, *args, **kwargs)

    start = Network(seed)
    run = trainer(seed, tmp_path, sam={"rho": 0.5})
    failed = Failing(model=start, args=run.args, train_dataset=rows(seed), sam={"rho": 0.5})
    failed.args.auto_find_batch_size = True
    failed.args.learning_rate = 0.0
    failed.train()
    after = passes[failing:]
    assert after[:8] == after[:4] * 2  # both passes of the first step, of the new attempt alone
    assert max(after) < passes[0]
    assert all(map(torch.equal, start.parameters(), Network(seed).parameters()))


def test_the_second_pass_leaves_batch_norm_alone(seed: int, tmp_path: Path) -> None:
    run = trainer(seed, tmp_path, sam={"rho": 0.1})
    norm = nn.BatchNorm1d(7)
    run.model.net.insert(1, norm)
    run.train()
    assert norm.num_batches_tracked == ROWS  # two epochs of ten micro-batches


def test_a_sam_of_the_caller_is_not_wrapped(seed: int, tmp_path: Path) -> None:
    model = Network(seed)
    ready = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    run = trainer(seed, tmp_path, optimizers=(ready, None))
    run.model = model
    assert run.create_optimizer() is ready
    with pytest.raises(ValueError, match="omit sam="):
        trainer(seed, tmp_path, optimizers=(ready, None), sam={"rho": 0.2})


def test_deepspeed_is_refused(seed: int, tmp_path: Path) -> None:
    run = trainer(seed, tmp_path)
    run.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match="does not support DeepSpeed"):
        run.create_optimizer()
