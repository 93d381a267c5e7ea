"""A whole step in one call: eager on the CPU, a graph on CUDA."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.overrides import TorchFunctionMode

from fastsam import SAM
from fastsam.optim import capture, capture_step
from fastsam.optim.obstacles import obstacle
from fastsam.optim.plain import PlainSAM
from fastsam.optim.rehearsal import rehearsal
from python_tests.optim.trajectories import assert_close, assert_same_bits

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BASES = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    (torch.optim.AdamW, {"lr": 0.01, "eps": 1e-3}),
]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(params=BASES, ids=lambda case: case[0].__name__)
def base(request):
    return request.param


def network(seed: int, device: str = "cpu") -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    return model.to(device)


def batches(count: int, seed: int, device: str = "cpu"):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(16, 6, generator=generator)
        yield x.to(device), torch.randint(3, (16,), generator=generator).to(device)


def by_hand(model, optimizer, batch) -> torch.Tensor:
    losses = []
    for finish in (optimizer.first_step, optimizer.second_step):
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        finish(zero_grad=True)
        losses.append(loss.detach())
    return losses[0]


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [t.detach().cpu().clone() for t in (*model.parameters(), *model.buffers())]


def test_the_step_equals_one_made_by_hand(device, base, seed):
    """With plain PyTorch; also with the learning rate and rho changed between calls."""
    models = [network(seed, device) for _ in range(2)]
    optimizers = [
        kind(model.parameters(), base[0], rho=0.1, **base[1])
        for kind, model in zip((SAM, PlainSAM), models, strict=True)
    ]
    first, *rest = batches(6, seed, device)
    step = capture_step(models[0], nn.functional.cross_entropy, optimizers[0], first)
    assert_same_bits(weights(models[0]), weights(models[1]))
    for i, batch in enumerate([first, *rest]):
        for optimizer in optimizers:
            optimizer.param_groups[0].update(lr=base[1]["lr"] / (1 + i), rho=0.1 + 0.2 * i)
        found = step(batch)
        expected = by_hand(models[1], optimizers[1], batch)
        assert not found.requires_grad
        assert float(found) == pytest.approx(float(expected), rel=1e-4)
        assert all(p.grad is None for p in models[0].parameters())
    assert_close(weights(models[0]), weights(models[1]), 1e-5)


def test_autocast_and_scaler(device, seed):
    model = network(seed, device)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    scaler = GradScaler(device, init_scale=256.0, growth_interval=3)
    first, *rest = batches(7, seed, device)
    step = capture_step(
        model, nn.functional.cross_entropy, optimizer, first, autocast=torch.bfloat16, scaler=scaler
    )
    before = weights(model)
    assert scaler.get_scale() == 256.0
    for batch in rest:
        loss = step(batch)
    assert scaler.get_scale() == 1024.0
    assert loss.dtype is torch.float32
    assert not torch.equal(before[0], weights(model)[0])
    assert int(optimizer.skipped_steps) == 0


def test_overflow_lowers_the_scale_once(device, seed):
    model = network(seed, device)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    scaler = GradScaler(device, init_scale=256.0)
    first, x = batches(2, seed, device)
    step = capture_step(model, nn.functional.cross_entropy, optimizer, first, scaler=scaler)
    parameters = [p.detach().clone() for p in model.parameters()]
    x[0][0, 0] = float("inf")
    step(x)
    assert_same_bits([p.detach() for p in model.parameters()], parameters)
    assert scaler.get_scale() == 128.0
    assert int(optimizer.skipped_steps) == 1


def test_the_weights_are_restored_if_a_pass_raises(seed):
    model = network(seed)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
    batch = next(batches(1, seed))
    before = [p.detach().clone() for p in model.parameters()]
    passes = iter((1, 0))

    def failing(outputs, targets):
        first = next(passes)
        assert torch.equal(model[0].weight, before[0]) == first
        if not first:
            raise MemoryError
        return nn.functional.cross_entropy(outputs, targets)

    with pytest.raises(MemoryError):
        capture_step(model, failing, optimizer, batch)(batch)
    assert_same_bits([p.detach() for p in model.parameters()], before)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("failing_pass", [0, 1])
def test_a_step_after_one_that_raised_is_like_any_other(failing_pass, scaled, seed):
    batch, results = next(batches(1, seed)), []
    for fails in (True, False):
        model = network(seed)
        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
        scaler = GradScaler("cpu", init_scale=64.0) if scaled else None
        passes = iter(range(10))

        def failing(gradient, fails=fails, passes=passes):
            if next(passes) == failing_pass and fails:
                raise MemoryError
            return gradient

        # The gradients of the last layer exist when the one of the first layer raises.
        model[0].weight.register_hook(failing)
        step = capture_step(model, nn.functional.cross_entropy, optimizer, batch, scaler=scaler)
        if fails:
            with pytest.raises(MemoryError):
                step(batch)
            for layer in model:
                if isinstance(layer, nn.BatchNorm1d):
                    layer.reset_running_stats()
        step(batch)
        results.append([p.detach() for p in model.parameters()])
        assert scaler is None or scaler.get_scale() == 64.0
    assert_same_bits(*results)


@pytest.mark.parametrize("used", [0, 2])
def test_a_rehearsal_restores_everything(device, base, used, seed):
    """Weights, buffers, state, scale, counters, tensor settings and random numbers."""
    model = network(seed, device)
    lr = torch.tensor(0.05, device=device)
    optimizer = SAM(model.parameters(), base[0], **{**base[1], "lr": lr})
    scaler = GradScaler(device, init_scale=64.0)
    for batch in batches(used, seed, device):
        by_hand(model, optimizer, batch)
    twin_model, twin = copy.deepcopy((model, optimizer))
    before = weights(model)
    state = copy.deepcopy(optimizer.state_dict())
    random = torch.get_rng_state()
    with rehearsal(model, optimizer, scaler):
        for x, y in batches(3, seed + 1, device):
            by_hand(model, optimizer, (x + torch.randn_like(x), y))
        by_hand(model, optimizer, (x * float("nan"), y))
        scaler.scale(torch.ones((), device=device))
    assert_same_bits(weights(model), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert scaler.get_scale() == 64.0
    assert optimizer.param_groups[0]["lr"] is lr
    assert int(optimizer.skipped_steps) == 0
    found = optimizer.state_dict()
    assert found["state"].keys() == state["state"].keys()
    for i, entry in state["state"].items():
        assert all(torch.equal(found["state"][i][key], value) for key, value in entry.items())
    for batch in batches(3, seed + 2, device):
        by_hand(model, optimizer, batch)
        by_hand(twin_model, twin, batch)
    assert_same_bits(weights(model), weights(twin_model))


def test_a_rehearsal_that_raises_restores_everything(seed):
    model = network(seed)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    before = weights(model)

    def fail() -> None:
        with rehearsal(model, optimizer):
            for batch in batches(2, seed):
                by_hand(model, optimizer, batch)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert_same_bits(weights(model), before)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_prepare_creates_the_state_and_changes_nothing(base, seed):
    model = network(seed)
    options = {"lr": 0.1, "momentum": 0.9} if base is torch.optim.SGD else {"lr": 0.1}
    optimizer = SAM(model.parameters(), base, **options)
    twin_model = copy.deepcopy(model)
    twin = SAM(twin_model.parameters(), base, **options)
    before = weights(model)
    optimizer.native_step.prepare()
    assert_same_bits(weights(model), before)
    assert len(optimizer.state) == len(list(model.parameters()))
    memory = optimizer.native_step.memory()
    for batch in batches(2, seed):
        by_hand(model, optimizer, batch)
        by_hand(twin_model, twin, batch)
    assert_same_bits(weights(model), weights(twin_model))
    assert optimizer.native_step.memory() == memory
    optimizer.state.clear()
    optimizer.native_step.prepare()
    assert optimizer.native_step.memory() != memory


def test_freed_memory_never_compares_equal_to_new_memory(seed):
    """With and without momentum, which is kept: only the step's own memory is replaced."""
    for options in ({"lr": 0.1}, {"lr": 0.1, "momentum": 0.9}):
        model = network(seed)
        optimizer = SAM(model.parameters(), torch.optim.SGD, **options)
        by_hand(model, optimizer, next(batches(1, seed)))
        for _ in range(100):
            optimizer.native_step.prepare()
            before = optimizer.native_step.memory()
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.native_step.prepare()
            assert optimizer.native_step.memory() != before


def test_another_tensor_as_a_setting_never_compares_equal(seed):
    def scalar() -> torch.Tensor:
        return torch.zeros(1 << 20)[0]  # the allocator reuses freed large memory immediately

    model = network(seed)
    optimizer = PLAIN["sgd"](list(model.parameters()), scalar())
    before = capture._frozen(optimizer)
    optimizer.param_groups[0]["lr"].fill_(0.2)
    assert capture._frozen(optimizer) == before
    for _ in range(50):
        before = capture._frozen(optimizer)
        (group,) = optimizer.param_groups
        del group["lr"]
        optimizer.param_groups[0] = {"lr": scalar(), **group}
        assert capture._frozen(optimizer) != before


@pytest.mark.filterwarnings("ignore::fastsam.kernels.backends.FallbackWarning")
def test_the_error_names_the_obstacle_to_a_capture(monkeypatch):
    monkeypatch.setenv("FASTSAM_KERNELS", "auto")  # PyTorch operations are never captured

    def reason(model, base=torch.optim.SGD, prepare=lambda o: None, **options) -> str:
        optimizer = SAM(model.parameters(), base, lr=0.1, **options)
        prepare(optimizer)
        return obstacle(model, optimizer) or ""

    assert reason(network(0)) == ""
    assert "RMSprop has no fused update" in reason(network(0), torch.optim.RMSprop)
    assert "hooks" in reason(
        network(0), prepare=lambda o: o.register_step_post_hook(lambda *_: None)
    )
    assert "no fused update" in reason(
        network(0),
        prepare=lambda o: o.base_optimizer.register_step_post_hook(lambda *_: None),
    )
    model = network(0)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    assert "zero_grad" in reason(model)
    model = network(0)
    model[3].to("meta")
    assert "several devices" in reason(model)


PLAIN = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, weight_decay=1e-2, fused=True),
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr, capturable=p[0].is_cuda, fused=True),
}


@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN)
def test_a_plain_optimizer_makes_its_one_pass(device, make, seed):
    """Torch's optimizers, with and without state, and a learning rate that changes between calls."""
    models = [network(seed, device) for _ in range(2)]
    rates = [torch.tensor(0.1, device=device) for _ in range(2)]
    optimizers = [make(list(m.parameters()), lr) for m, lr in zip(models, rates, strict=True)]
    first, *rest = batches(5, seed, device)
    step = capture_step(models[0], nn.functional.cross_entropy, optimizers[0], first)
    for i, batch in enumerate([first, *rest]):
        for rate in rates:
            rate.fill_(0.1 / (1 + i))
        found = step(batch)
        expected = nn.functional.cross_entropy(models[1](batch[0]), batch[1])
        expected.backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        assert float(found) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert_close(weights(models[0]), weights(models[1]), 0.0 if device == "cpu" else 1e-5)


@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize("used", [0, 2])
def test_a_rehearsal_of_a_plain_optimizer_restores_everything(device, make, used, seed):
    model = network(seed, device)
    optimizer = make(list(model.parameters()), torch.tensor(0.05, device=device))

    def train(model, optimizer, data) -> None:
        for x, y in data:
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()

    train(model, optimizer, batches(used, seed, device))
    twin_model, twin = copy.deepcopy((model, optimizer))
    before = weights(model)
    with rehearsal(model, optimizer):
        train(model, optimizer, batches(3, seed + 1, device))
        addresses = [
            entry["exp_avg" if "exp_avg" in entry else "momentum_buffer"].data_ptr()
            for entry in optimizer.state.values()
        ]
    assert_same_bits(weights(model), before)
    train(model, optimizer, batches(3, seed + 2, device))
    train(twin_model, twin, batches(3, seed + 2, device))
    assert_same_bits(weights(model), weights(twin_model))
    kept = [
        entry["exp_avg" if "exp_avg" in entry else "momentum_buffer"].data_ptr()
        for entry in optimizer.state.values()
    ]
    assert kept == addresses


def test_the_error_names_the_obstacle_of_a_plain_optimizer():
    model = network(0)
    parameters = list(model.parameters())

    def reason(make, scaler=None, **options) -> str:
        return obstacle(model, make(parameters, **options), scaler) or ""

    lr = torch.tensor(0.1)
    assert reason(torch.optim.SGD, lr=lr, fused=True) == ""
    assert "fused=True" in reason(torch.optim.SGD, lr=lr)
    assert "capturable=True" in reason(torch.optim.AdamW, lr=lr, fused=True)
    on, off = (torch.amp.GradScaler("cpu", enabled=enabled) for enabled in (True, False))
    for fused, scaler in [(False, None), (False, off), (True, on)]:
        options = {"lr": lr, "capturable": True, "fused": fused, "scaler": scaler}
        assert reason(torch.optim.AdamW, **options) == ""
    for make in (torch.optim.Adam, torch.optim.AdamW):
        assert "fused=True, capturable=True" in reason(make, on, lr=lr, capturable=True)
    assert reason(torch.optim.SGD, on, lr=lr, fused=True) == ""
    assert "tensor" in reason(torch.optim.SGD, lr=0.1, fused=True)
    assert "neither SAM nor" in reason(torch.optim.RMSprop)
    assert "dampening" in reason(torch.optim.SGD, lr=lr, fused=True, momentum=0.9, dampening=0.5)


def test_bad_arguments(seed):
    model = network(seed)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    batch = next(batches(1, seed))
    with pytest.raises(ValueError, match="warmup"):
        capture_step(model, nn.functional.cross_entropy, optimizer, batch, warmup=0)
    for bad in (batch[0], batch[:1], {"x": batch[0]}, (batch[0], 3)):
        with pytest.raises(ValueError, match="a batch must be"):
            capture_step(model, nn.functional.cross_entropy, optimizer, bad)
    with pytest.raises(ValueError, match=r"freeze_batch_norm.*SGD"):
        capture_step(
            model,
            nn.functional.cross_entropy,
            torch.optim.SGD(model.parameters(), lr=0.1),
            batch,
            freeze_batch_norm=True,
        )


def test_a_batch_unlike_the_example_is_refused(device, seed):
    """Before any weight changes, with and without a graph."""
    model = network(seed, device)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    x, y = next(batches(1, seed, device))
    step = capture_step(model, nn.functional.cross_entropy, optimizer, (x, y))
    before = weights(model)
    for bad in ((x[:3], y[:3]), (x.double(), y), (x, x, y), (x[:, :5], y)):
        with pytest.raises(ValueError, match="another shape"):
            step(bad)
    for bad in ({"x": x, "y": y}, (x, 3), x):
        with pytest.raises(ValueError, match="a batch must be"):
            step(bad)
    assert_same_bits(weights(model), before)
    step([x, y])


@pytest.mark.parametrize("frozen", [False, True])
def test_freeze_batch_norm_excludes_the_second_pass(device, frozen, seed):
    """As in a loop written by hand, with ``momentum`` 0.1 and 1 or 2 tracked batches per step."""
    models = [network(seed, device) for _ in range(2)]
    optimizers = [
        kind(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
        for kind, model in zip((SAM, PlainSAM), models, strict=True)
    ]
    first, *rest = batches(4, seed, device)
    step = capture_step(
        models[0], nn.functional.cross_entropy, optimizers[0], first, freeze_batch_norm=frozen
    )
    norm = models[1][1]
    for batch in rest:
        step(batch)
        for finish in (optimizers[1].first_step, optimizers[1].second_step):
            before = copy.deepcopy(norm.state_dict())
            nn.functional.cross_entropy(models[1](batch[0]), batch[1]).backward()
            if frozen and finish == optimizers[1].second_step:
                norm.running_mean.copy_(before["running_mean"])
                norm.running_var.copy_(before["running_var"])
                norm.num_batches_tracked.copy_(before["num_batches_tracked"])
            finish(zero_grad=True)
    assert int(models[0][1].num_batches_tracked) == (3 if frozen else 6)
    assert models[0][1].track_running_stats
    assert_close(weights(models[0]), weights(models[1]), 1e-5)


@pytest.mark.gpu
def test_a_stale_graph_is_refused(seed):
    model = network(seed, "cuda")
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    batch = next(batches(1, seed, "cuda"))
    step = capture_step(model, nn.functional.cross_entropy, optimizer, batch)
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match="capture_step again"):
        step(batch)


@pytest.mark.gpu
def test_a_number_frozen_in_the_graph_of_a_plain_optimizer_must_not_change(seed):
    model = network(seed, "cuda")
    optimizer = PLAIN["sgd"](list(model.parameters()), torch.tensor(0.1, device="cuda"))
    batch = next(batches(1, seed, "cuda"))
    step = capture_step(model, nn.functional.cross_entropy, optimizer, batch)
    step(batch)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    with pytest.raises(RuntimeError, match="capture_step again"):
        step(batch)


@pytest.mark.gpu
@pytest.mark.parametrize("new", [0.2, torch.tensor(0.2)], ids=["number", "tensor"])
@pytest.mark.parametrize("name", ["rho", "lr"])
def test_a_tensor_on_the_gpu_that_the_graph_reads_must_stay(name, new, seed):
    model = network(seed, "cuda")
    options = {"rho": torch.tensor(0.1, device="cuda"), "lr": torch.tensor(0.1, device="cuda")}
    optimizer = SAM(model.parameters(), torch.optim.SGD, **options)
    batch = next(batches(1, seed, "cuda"))
    step = capture_step(model, nn.functional.cross_entropy, optimizer, batch)
    options[name].fill_(0.05)
    step(batch)
    optimizer.param_groups[0][name] = new.cuda() if isinstance(new, torch.Tensor) else new
    with pytest.raises(RuntimeError, match="capture_step again"):
        step(batch)


def test_a_step_without_an_ascent_reads_no_more_at_learning_rate_zero(seed):
    """Momentum-less SGD has no state, so step() alone reads the gradients: it might only create state."""

    def reads(lr: float) -> int:
        model = network(seed)
        optimizer = SAM(model.parameters(), torch.optim.SGD, lr=lr, start=5)
        (batch,) = batches(1, seed)
        step = capture_step(model, nn.functional.cross_entropy, optimizer, batch)
        count = 0

        class Counter(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                nonlocal count
                count += function is torch.Tensor.__bool__
                return function(*args, **(kwargs or {}))

        with Counter():
            step(batch)
        assert optimizer.attempted_steps == 1
        return count

    assert reads(0.0) == reads(0.1)
