"""Folders with files of an earlier run: what a new run checks before it removes any of them."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from fastsam.longtail import Trainer, fit_stages
from fastsam.longtail.checkpoint import checkpoint_bytes
from fastsam.longtail.errors import UsageError
from fastsam.longtail.training import Branch
from python_tests.longtail.test_trainer import FEW, short


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    Trainer(short("ce", "sam", epochs=1), data=FEW, out=folder, progress=False).fit()
    return folder


@pytest.mark.parametrize("options", [{"resume": "auto"}, {"overwrite": True}])
def test_settings_in_the_folder_stay_until_the_first_checkpoint(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """They may be the --config file of the command, which is repeated after a kill."""
    (tmp_path / "run.yaml").write_text("seed: 5\n")
    run = Trainer(short("ce", "sgd", epochs=1), data=FEW, out=tmp_path, progress=False, **options)
    assert (tmp_path / "run.yaml").read_text() == "seed: 5\n"
    run.fit()
    assert "seed: 0" in (tmp_path / "run.yaml").read_text()


@pytest.mark.parametrize("start", ["init", "branch", "stages"])
def test_overwriting_does_not_remove_what_the_run_starts_from(
    start: str, finished: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    settings: dict[str, Any] = {"init": str(out / "checkpoint.pt")}
    branch = None
    if start == "branch":
        settings, branch = {"epochs": 2}, Branch.load(out, 1)
    if start == "stages":
        settings = {"init": str(out), "stages": "crt"}
    begin = fit_stages if start == "stages" else Trainer
    config = short("ce", "sam", **settings)
    with pytest.raises(UsageError, match=r"run --overwrite replaces; choose another --out"):
        begin(config, data=FEW, out=out, overwrite=True, branch=branch, progress=False)
    assert (out / "checkpoint.pt").is_file()


def test_overwriting_probes_the_room_before_it_removes_the_run(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    (out / "resume" / "epoch-1-step-2").mkdir(parents=True)
    (out / "resume" / "epoch-1-step-2" / "part").write_bytes(b"of a sharded network")
    os.link(out / "checkpoint.pt", out / "resume" / "epoch-1.pt")

    def files() -> dict[int, bytes]:
        return {p.stat().st_ino: p.read_bytes() for p in out.rglob("*") if p.is_file()}

    before, settings = files(), (out / "run.yaml").stat().st_size
    probed: list[int] = []

    def full(handle: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    config = short("ce", "sam", epochs=1)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left on device"):
        Trainer(config, data=FEW, out=out, overwrite=True, progress=False)
    assert files() == before

    monkeypatch.setattr(os, "posix_fallocate", lambda *given: probed.append(given[2]))
    run = Trainer(config, data=FEW, out=out, overwrite=True, keep={1}, progress=False)
    assert [path.name for path in out.iterdir()] == ["run.yaml"]
    freed = sum(map(len, before.values())) - settings
    assert sum(probed) == 5 * checkpoint_bytes(config, run.model) - freed
