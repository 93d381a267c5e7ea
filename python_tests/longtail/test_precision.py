"""``--precision auto`` is decided by the device, once; ``--tf32`` sets torch's switches and restores them."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsam.cli import main
from fastsam.longtail import Checkpoint, Result, Trainer, recipe
from fastsam.longtail.data import load_digits_lt
from fastsam.longtail.differences import differences
from fastsam.longtail.errors import UsageError
from fastsam.longtail.precision import autocast, check_tf32, chosen_precision, float32_products
from fastsam.longtail.training import Branch

DIGITS = load_digits_lt()
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def with_amx(monkeypatch: pytest.MonkeyPatch, has: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": has}, raising=False)


def with_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")


@pytest.mark.parametrize(
    ("capability", "precision"),
    [
        ((6, 1), "float32"),
        ((7, 0), "float16"),
        ((7, 5), "float16"),
        ((8, 0), "bfloat16"),
        ((12, 0), "bfloat16"),
    ],
)
def test_auto_is_what_the_tensor_cores_multiply(
    capability: tuple[int, int], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpu(monkeypatch, capability)
    assert chosen_precision(GPU) == (
        precision,
        f"a GPU has compute capability {capability[0]}.{capability[1]}",
    )


@pytest.mark.parametrize(("has", "precision"), [(True, "bfloat16"), (False, "float32")])
def test_auto_on_a_cpu_depends_on_amx(
    has: bool, precision: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with_amx(monkeypatch, has)
    assert chosen_precision(CPU)[0] == precision
    # Older versions of torch cannot tell; the kernel of the operating system can.
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    info = tmp_path / "cpuinfo"
    info.write_text(f"flags\t\t: fpu avx512f{' amx_bf16' if has else ''} amx_tile\n")
    monkeypatch.setattr("fastsam.longtail.precision._CPU_INFO", info)
    assert chosen_precision(CPU)[0] == precision


def test_auto_must_be_decided_before_a_pass() -> None:
    with pytest.raises(ValueError, match="has not been decided"):
        autocast("auto", CPU)


def config(**settings: Any) -> Any:
    options = {"epochs": 2, "batch_size": 256, "precision": "auto", **settings}
    return recipe("digits-lt", "ce", "sgd", **options)


def test_a_run_keeps_what_auto_stood_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_amx(monkeypatch, True)
    made = config()
    first = Trainer(
        made.config(),
        sources=made.sources,
        data=DIGITS,
        out=tmp_path / "run",
        keep=[1],
        progress=False,
    )
    assert first.config.precision == "bfloat16"
    first.fit()
    result = Result.load(tmp_path / "run" / "result.json")
    assert result.config["precision"] == "bfloat16"
    assert result.sources["precision"] == "auto: this CPU has AMX instructions for bfloat16"
    assert "precision: bfloat16" in (tmp_path / "run" / "run.yaml").read_text()
    assert "precision" not in differences(result.config, made.config().as_dict())

    with_amx(monkeypatch, False)  # the run moves to another machine
    again = Trainer(
        made.config(), data=DIGITS, out=tmp_path / "run", resume=True, keep=[1], progress=False
    )
    assert again.config.precision == "bfloat16"
    branch = Branch("run", Checkpoint.load(tmp_path / "run" / "epoch-1.pt"))
    for settings in ({}, {"precision": "auto"}):
        chosen, _ = branch.settings(**settings)
        assert Trainer(chosen, data=DIGITS, branch=branch, progress=False).config.precision == (
            "bfloat16"
        )
    fresh = Trainer(made.config(), data=DIGITS, out=tmp_path / "new", resume="auto", progress=False)
    assert fresh.config.precision == "float32"


def test_the_command_says_what_auto_stands_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_amx(monkeypatch, True)
    options = ["--method", "ce", "--optimizer", "sgd", "--epochs", "1", "--batch-size", "256"]
    assert main(["train", *options, "--precision", "auto", "--quiet"]) == 0
    line = "precision auto: bfloat16, because this CPU has AMX instructions for bfloat16"
    assert line in capsys.readouterr().out.splitlines()


def test_tf32_needs_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    for allowed in (None, False):
        check_tf32(allowed, CPU)
    with pytest.raises(UsageError, match=r"requires an NVIDIA GPU.*--device cuda, or omit --tf32"):
        Trainer(config(tf32=True).config(), data=DIGITS, progress=False)
    with_gpu(monkeypatch, (8, 0))
    check_tf32(True, GPU)
    with_gpu(monkeypatch, (7, 5))
    with pytest.raises(UsageError, match=re.escape("a GPU has 7.5; omit --tf32")):
        check_tf32(True, GPU)


def switches() -> tuple[Any, ...]:
    """Return all of torch's switches, older and newer; reading them fails if they disagree."""
    backends: Any = torch.backends
    return (
        torch.get_float32_matmul_precision(),
        backends.cuda.matmul.allow_tf32,
        backends.cudnn.allow_tf32,
        backends.cuda.matmul.fp32_precision,
        backends.cudnn.conv.fp32_precision,
    )


@pytest.mark.parametrize(
    ("tf32", "expected"),
    [
        (True, ("high", True, True, "tf32", "tf32")),
        (False, ("highest", False, False, "ieee", "none")),
    ],
)
def test_tf32_sets_torchs_switches_and_restores_them(tf32: bool, expected: Any) -> None:
    before = switches()
    for device, allowed in ((CPU, tf32), (GPU, None)):
        with float32_products(allowed, device):
            assert switches() == before
    inside = []
    with suppress(KeyError), float32_products(tf32, GPU):
        inside.append(switches())
        raise KeyError
    assert inside == [expected]
    assert (
        switches()[:3] == before[:3]
    )  # a newer switch may say ieee instead of none, which is the same


def test_float32_turns_off_autocast_around_it() -> None:
    one = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert (one @ one).dtype == torch.bfloat16
        with autocast("float32", one.device):
            assert (one @ one).dtype == torch.float32
    with autocast("float32", one.device):
        assert (one @ one).dtype == torch.float32
