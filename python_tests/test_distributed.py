"""The ranks of a run: one all-reduce per device and dtype, equal sums on every rank."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastsam.distributed import World, launched_world_size, torchrun_world
from python_tests.ranks import free_port, run_ranks, torchrun_variables


def test_a_single_process_communicates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("a world of one process must not communicate")

    for name in ("all_reduce", "all_gather_object", "barrier"):
        monkeypatch.setattr(dist, name, refuse)
    world = World()
    tensor = torch.arange(3.0)
    world.all_reduce([tensor])
    world.barrier()
    assert tensor.tolist() == [0, 1, 2]
    assert world.all_gather("one") == ["one"]
    assert world.agree("one")


def test_tensors_of_one_dtype_share_an_all_reduce(monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch.distributed patched to two ranks with equal values."""
    exchanged: list[tuple[torch.dtype, int]] = []

    def double(tensor: torch.Tensor, group: object = None) -> None:
        exchanged.append((tensor.dtype, tensor.numel()))
        tensor.mul_(2)

    monkeypatch.setattr(dist, "all_reduce", double)
    tensors = {
        "matrix": torch.randn(3, 5),
        "transposed": torch.randn(4, 2).T,
        "scalar": torch.randn(()),
        "empty": torch.randn(0),
        "double": torch.randn(7, dtype=torch.float64),
        "strided": torch.arange(10)[::3],
    }
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    World(1, 2).all_reduce(tensors.values())
    assert sorted(exchanged, key=str) == [
        (torch.float32, 15 + 8 + 1),
        (torch.float64, 7),
        (torch.int64, 4),
    ]
    for name, tensor in tensors.items():
        assert torch.equal(tensor, 2 * before[name]), name
        assert tensor.data_ptr() == addresses[name], name


def _reduce(rank: int, size: int, folder: str) -> None:
    world = World.from_process_group()
    assert (world.rank, world.world_size) == (rank, size)
    generator = torch.Generator().manual_seed(rank)
    tensors = [torch.randn(n, generator=generator, dtype=torch.float64) for n in (1, 1000, 7)]
    whole = torch.cat(tensors)
    world.all_reduce(tensors)
    world.barrier()
    torch.save({"own": whole, "sum": torch.cat(tensors)}, f"{folder}/{rank}.pt")
    assert world.all_gather(rank) == list(range(size))
    assert world.agree("same")
    assert not world.agree(rank)


@pytest.mark.slow
def test_every_rank_has_the_same_bits(tmp_path: Path) -> None:
    run_ranks(_reduce, 3, 3, str(tmp_path))
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3)]
    expected = sum(part["own"] for part in found)
    for part in found:
        assert torch.equal(part["sum"], found[0]["sum"])
        assert torch.allclose(part["sum"], expected, rtol=0, atol=1e-14)


ENDING = """
import atexit, os, sys
from fastsam.distributed import end_process

class Finalized:
    def __del__(self, write=os.write):
        write(1, b"finalized")

finalized = Finalized()
atexit.register(print, "exit handler")
sys.stdout.write("buffered, ")
if sys.argv[1] == "end":
    end_process(75)
sys.exit(75)
"""


@pytest.mark.parametrize("way", ["end", "exit"])
def test_a_process_can_end_without_finalizing_the_interpreter(way: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDING, way], capture_output=True, text=True, check=False
    )
    expected = ["buffered, exit handler"] + ["finalized"] * (way == "exit")
    assert (done.returncode, done.stdout.splitlines(), done.stderr) == (75, expected, "")


@pytest.mark.parametrize("launched", [True, False])
def test_a_rank_of_torchrun_ends_so(launched: bool, tmp_path: Path) -> None:
    """With a single rank, which needs no process group."""
    variables = torchrun_variables(0, 1, free_port()) if launched else {}
    done = subprocess.run(
        [sys.executable, "-v", "-m", "fastsam", "recipes"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **variables},
    )
    assert ("# cleanup[2] removing sys" in done.stderr) != launched


def test_a_process_group_is_needed() -> None:
    with pytest.raises(ValueError, match=r"no process group.*torchrun.*init_process_group"):
        World.from_process_group()


def test_without_torchrun_the_world_is_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launched_world_size() == 1
    with torchrun_world("cpu") as world:
        assert world == World(rank=0, world_size=1, local_rank=0)
        assert not dist.is_initialized()


def test_missing_variables_of_another_launcher_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert launched_world_size() == 2
    with pytest.raises(ValueError, match=r"RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT .*torchrun"):
        torchrun_world("cpu").__enter__()
    for name, value in {"RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, but LOCAL_RANK of torchrun is not set"):
        torchrun_world("cpu").__enter__()


def test_processes_without_a_gpu_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
    for name, value in {**launched, "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="require --device cpu or --device cuda, got cuda:0"):
        torchrun_world("cuda:0").__enter__()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="process 1 has no GPU: this machine has 1"):
        torchrun_world("cuda").__enter__()


def test_the_gpu_of_a_process() -> None:
    assert World(3, 4, 1).device("cuda") == "cuda:1"
    assert World(3, 4, 1).device("cuda:0") == "cuda:0"
    assert World().device("cuda") == "cuda"
