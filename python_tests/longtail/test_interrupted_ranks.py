"""Runs on two ranks that are stopped within an epoch continue to the bits of the uninterrupted run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastsam.distributed import World
from fastsam.longtail import Trainer
from fastsam.longtail.errors import DamagedError
from fastsam.longtail.sharding import gathered
from fastsam.longtail.training import RunFolder
from fastsam.longtail.training.resume import _load
from fastsam.stopping import Stopped
from python_tests.longtail.test_interrupted import compared, stop_after
from python_tests.longtail.test_trainer import FEW, short
from python_tests.ranks import run_ranks

RANKS = 2
RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ddp": ("ldam-drw", "sam", {"ema": 0.9, "ascent_start": "1"}),
    "local": ("ce", "sam", {"ascent_scope": "local"}),
    "paco": ("paco", "sgd", {}),
    "fsdp2": ("ce-drw", "sam", {"parallel": "fsdp2", "ema": 0.9, "checkpoint_steps": 2}),
}


def _rank(rank: int, folder: str) -> None:
    world, path = World(rank, RANKS), Path(folder)
    rng = np.random.default_rng(7)
    for name, (method, optimizer, options) in RUNS.items():
        config = short(method, optimizer, **{"epochs": 2, "batch_size": 9, **options})
        every: dict[str, Any] = {"data": FEW, "world": world, "progress": False}
        whole = Trainer(config, out=path / f"{name}-whole", **every)
        expected, stops = whole.fit(), 0
        for turn in range(100):
            request, on_step = stop_after(int(rng.integers(1, 4)))
            given = dict(every)
            if turn % RANKS == rank:
                given |= {"stop": request, "on_step": on_step}
            run = Trainer(config, out=path / name, resume="auto", **given)
            try:
                result = run.fit()
            except Stopped:
                stops += 1
                if config.parallel == "fsdp2" and rank == 0 and turn == 0:
                    _flip_bits(RunFolder(path / name).points()[0])
                world.barrier()
                continue
            break
        assert stops >= 2, stops
        assert json.dumps(compared(result), default=vars) == json.dumps(
            compared(expected), default=vars
        ), name
        for key, value in gathered(whole.model.state_dict()).items():
            assert torch.equal(value, gathered(run.model.state_dict())[key]), (name, rank, key)


def _flip_bits(folder: Path) -> None:
    """Flip bits of a sharded checkpoint one at a time; each must be noticed or change nothing."""
    assert folder.is_dir()
    original = _load(folder)
    outline = _load(folder, outline=True)
    assert (outline.config, outline.history) == (original.config, original.history)
    assert {k: v.shape for k, v in outline.model.items()} == {
        k: v.shape for k, v in original.model.items()
    }
    assert all(value.is_meta for value in outline.model.values())
    files = sorted(folder.iterdir())
    sizes = np.array([file.stat().st_size for file in files])
    rng = np.random.default_rng(200)
    refused = 0
    for _ in range(200):
        file = files[int(rng.choice(len(files), p=sizes / sizes.sum()))]
        content = file.read_bytes()
        changed = bytearray(content)
        changed[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
        file.write_bytes(changed)
        try:
            loaded = _load(folder)
        except DamagedError:
            refused += 1
        else:
            assert all(torch.equal(v, loaded.model[k]) for k, v in original.model.items())
        file.write_bytes(content)
    assert refused >= 190, refused


@pytest.mark.slow
def test_two_ranks_end_with_the_same_bits(tmp_path: Path) -> None:
    run_ranks(_rank, RANKS, str(tmp_path))


def test_the_ranks_of_a_checkpoint_can_change(tmp_path: Path) -> None:
    run_ranks(_stopped, RANKS, str(tmp_path))
    config = short("ce", "sam", epochs=2, batch_size=15)
    with pytest.warns(UserWarning, match=r"trained by 2 process\(es\) and continues with 1"):
        run = Trainer(config, data=FEW, out=tmp_path / "run", resume=True, progress=False)
    begun = run.state.unfinished
    assert begun is not None
    assert begun["batches"] == 4  # the request travels with the next step
    means = {
        name: torch.stack([rank["buffers"][0][name] for rank in begun["ranks"]]).double().mean(0)
        for name, value in run.model.named_buffers()
        if value.is_floating_point()
    }
    seen: list[dict[str, torch.Tensor]] = []
    forward = run.model.outputs

    def first(inputs: torch.Tensor) -> Any:
        if not seen:
            seen.append({name: value.clone() for name, value in run.model.named_buffers()})
        return forward(inputs)

    run.stepper.engine._outputs = first
    result = run.fit()
    for name, value in means.items():
        assert torch.allclose(seen[0][name].double(), value, rtol=1e-6), name
    assert result.history[0].gradients == 2 * run.steps_per_epoch


def _stopped(rank: int, folder: str) -> None:
    config = short("ce", "sam", epochs=2, batch_size=15)
    request, on_step = stop_after(3)
    options: dict[str, Any] = {"stop": request, "on_step": on_step} if rank == 1 else {}
    world = World(rank, RANKS)
    run = Trainer(
        config, data=FEW, out=Path(folder) / "run", world=world, progress=False, **options
    )
    with pytest.raises(Stopped, match="SIGTERM" if rank == 1 else "another process"):
        run.fit()
