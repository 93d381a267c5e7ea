"""The GPU suite: stages, limits and adding up with stubs, targets from results, cases on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.gpu_targets import Target, main, targets

ROOT = Path(__file__).resolve().parents[1]
SUITE = ROOT / "benchmarks" / "gpu_suite.sh"

PYTHON = f"""#!/bin/sh
case "$*" in
  *gpu_targets*) exec {sys.executable} "$@" ;;
  *late*) sleep 60 ;;
  *epoch*) exit 3 ;;
  *one_rank*) echo "4 skipped in 1 s" ;;
  *) echo "ran $*"; echo "3 passed, 1 skipped in 1 s"; echo '{{}}' > "$OUT/found.json" ;;
esac
"""


@pytest.fixture
def suite(tmp_path: Path) -> Any:
    """Return a function that runs stages with stubs of nvidia-smi and Python, and returns the summary."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "nvidia-smi").write_text("#!/bin/sh\necho 9.0\n")
    (tools / "python").write_text(PYTHON)
    for tool in tools.iterdir():
        tool.chmod(0o755)

    def run(stages: str, **settings: str) -> dict[str, str]:
        environment = {
            **os.environ,
            "PATH": f"{tools}:{os.environ['PATH']}",
            "OUT": str(tmp_path / "out"),
            "PYTHON": str(tools / "python"),
            "STAGES": stages,
            "BUNDLE": str(tmp_path / "out.tgz"),
            **settings,
        }
        subprocess.run(["bash", SUITE], env=environment, check=True, capture_output=True)
        lines = (tmp_path / "out" / "summary.txt").read_text().splitlines()
        return {line.split()[0]: " ".join(line.split()[1:]) for line in lines}

    return run


def test_results_of_several_runs_add_up(suite: Any, tmp_path: Path) -> None:
    found = suite("sam_step epoch tests")
    assert found["sam_step"].startswith("ok")
    assert found["epoch"].startswith("FAILED (3)")
    found = suite("sam_bfloat16 tests nccl")
    assert list(found) == sorted(["sam_step", "epoch", "sam_bfloat16", "tests", "nccl"])
    out = tmp_path / "out"
    assert (out / "sam_step" / "found.json").is_file()
    assert "ran -m benchmarks.gpu sam_step" in (out / "sam_step" / "log").read_text()
    assert (tmp_path / "out.tgz").is_file()
    rows = {row["name"]: row for row in json.loads((out / "targets.json").read_text())}
    assert rows["tests"]["met"] is True
    assert rows["nccl"]["value"] == "none ran"
    assert rows["nccl"]["met"] is False
    assert rows["memcheck"]["met"] is None


def test_results_of_an_earlier_run_do_not_stand_for_a_failed_one(
    suite: Any, tmp_path: Path
) -> None:
    stale = tmp_path / "out" / "epoch" / "epoch-cuda.json"
    stale.parent.mkdir(parents=True)
    stale.write_text("{}")
    assert suite("epoch")["epoch"].startswith("FAILED (3)")
    assert not stale.exists()


def test_a_stage_ends_at_its_limit(suite: Any) -> None:
    found = suite("late tracking", LIMIT="1")
    assert found["late"].startswith("TIMED OUT after 1 s")
    assert int(found["late"].split()[-2]) < 20  # seconds taken
    assert found["tracking"].startswith("ok")


def test_stages_beyond_the_total_are_skipped_and_keep_their_results(suite: Any) -> None:
    suite("tracking")
    found = suite("tracking nccl", TOTAL="5")
    assert found["tracking"].startswith("ok")
    assert found["nccl"] == "skipped: the total of 5 s is used up"


def test_the_files_of_the_tests_exist() -> None:
    text = SUITE.read_text()
    for name in ("python_tests/test_one_rank.py", "python_tests/longtail/test_gpu.py"):
        assert name in text
        assert (ROOT / name).is_file()
    for name in ("sam", "lanczos", "noise"):
        assert (ROOT / f"python_tests/kernels/test_{name}.py").is_file()


def test_every_case_is_a_stage() -> None:
    text = SUITE.read_text()
    default = text.partition("STAGES=${STAGES:-")[2].partition("}")[0].replace("\\\n", " ").split()
    others = {"build", "tests", "nccl", "trainer", "memcheck", "racecheck", "synccheck"}
    assert set(default) == set(gpu.CASES) | others


def test_targets_beside_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def write(stage: str, name: str, content: dict[str, Any]) -> None:
        (tmp_path / stage).mkdir()
        (tmp_path / stage / name).write_text(json.dumps(content))

    def peer(median: float, share: float = 0.9) -> dict[str, float]:
        return {"median": median, "share_of_copy_bandwidth": share}

    write(
        "sam_step",
        "sam_step-cuda.json",
        {
            "rows": [
                {
                    "case": "resnet32",
                    "base": "SGD",
                    "parameters": 500_000,
                    "peers": {
                        "fastsam": peer(2.0),
                        "foreach": peer(9.0),
                        "careful foreach": peer(5.0),
                        "reference file": {"median": 31.0},
                    },
                },
                {
                    "case": "one-25M",
                    "base": "AdamW",
                    "parameters": 25_000_000,
                    "peers": {"fastsam, captured": peer(1.0, 0.79)},
                },
            ]
        },
    )
    extremes = {"lambda_min": -1.0, "lambda_max": 10.0}
    write(
        "spectrum_large",
        "spectrum-density-cuda.json",
        {
            "density": {
                "fastsam": {"times_fastsam": 1.0, "answers": extremes},
                "pyhessian, loader": {"times_fastsam": 3.0, "answers": extremes},
                "pyhessian, one batch": {
                    "times_fastsam": 1.9,
                    "answers": {"lambda_min": -1.5, "lambda_max": 10.1},
                },
            }
        },
    )
    write("late", "late_phase-cuda.json", {"runs": {"ratios": {"eager": {"median": 1.2}}}})
    main(tmp_path)
    found = {target.name: (target.value, target.met) for target in targets(tmp_path)}
    assert found["resnet32, SGD, float32, fastsam: reference takes times"] == (15.5, True)
    assert found["resnet32, SGD, float32, fastsam: foreach takes times"] == (2.5, False)
    assert found["one-25M, AdamW, float32, fastsam, captured: share of copy"] == (0.79, False)
    assert found["spectrum_large: pyhessian, loader: takes times"] == (3.0, True)
    assert found["spectrum_large: pyhessian, one batch: takes times"] == (1.9, False)
    assert found["spectrum_large: lambda_min differs by"] == (pytest.approx(0.05), False)
    assert found["spectrum_large: lambda_max differs by"] == (pytest.approx(0.01), True)
    assert found["resnet32, eager: ascents in the last fifth, times SGD"] == (1.2, True)
    assert found["resnet32, captured: ascents in the last fifth, times SGD"] == (None, None)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.endswith("<= 0.02   MISSED") and "lambda_min" in line for line in lines)


def test_bounds() -> None:
    assert Target("a", 1.0, 1.0).met
    assert Target("a", 1.0, 1.0, "<=").met
    assert Target("a", 0.9, 1.0, "<=").met
    assert not Target("a", 0.9, 1.0).met
    assert Target("a", None, 1.0).met is None
    assert not Target("a", "FAILED", "ok", "is").met


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(gpu.CASES.keys() - {"profile"}))
def test_a_case_runs_on_the_cpu(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "OUT", tmp_path)
    monkeypatch.setattr(gpu, "PEERS", None)
    if case == "throughput":
        monkeypatch.setitem(gpu.SMALL.throughput, "sources", ("files", "packed"))
    gpu.main(case, "small")
    (found, *_) = sorted(tmp_path.glob("*-cpu.json"))
    assert "environment" in json.loads(found.read_text())
