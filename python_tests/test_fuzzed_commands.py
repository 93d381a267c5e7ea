"""Random command lines end with an exit code, never with a traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fastsam.cli import main

LINES = 1000
VALUES = (
    *(
        "0",
        "1",
        "-1",
        "2",
        "0.5",
        "nan",
        "inf",
        "-inf",
        "1e308",
        "1e-308",
        "99999999999999999999",
        "007",
    ),
    *(
        "",
        " ",
        "a b",
        "é",
        "\x1b[2J",
        "=cmd|x",
        "$x^",
        "--",
        "-",
        "None",
        "True",
        "False",
        "[]",
        "{}",
        "%s",
    ),
    *(
        "none",
        "all",
        "ce",
        "sgd",
        "sam",
        "digits-lt",
        "train",
        "test",
        "unseen",
        "redrawn",
        "as-trained",
    ),
    *(
        "cpu",
        "cpu:5",
        "cuda:99",
        "step",
        "exp",
        "cosine",
        "multistep",
        "bfloat16",
        "resnet8",
        "timm:x",
    ),
    *("/dev/null", "/proc/self", "/nowhere/x", "RUN", "DAMAGED", "EMPTY", "FILE", ".."),
)
OPTIONS = {
    "train": (
        *(
            "--data",
            "--method",
            "--optimizer",
            "--out",
            "--resume",
            "--overwrite",
            "--keep",
            "--track",
        ),
        *(
            "--imbalance",
            "--kind",
            "--subset-seed",
            "--image-size",
            "--workers",
            "--corrupt",
            "--model",
        ),
        *("--head", "--augment", "--lr", "--momentum", "--nesterov", "--weight-decay", "--rho"),
        *(
            "--warmup-epochs",
            "--lr-schedule",
            "--lr-milestones",
            "--lr-factors",
            "--defer-epoch",
            "--beta",
        ),
        *(
            "--weighting",
            "--sampling",
            "--max-margin",
            "--scale",
            "--focal-gamma",
            "--gamma",
            "--tau",
        ),
        *("--eql-threshold", "--ib-alpha", "--paco-alpha", "--paco-queue", "--paco-projection"),
        *("--rho-schedule", "--rho-milestones", "--look-every", "--noise-sigma", "--noise-on"),
        *(
            "--lpf-gamma",
            "--lpf-parts",
            "--entropy-steps",
            "--entropy-lr",
            "--select",
            "--posthoc-tau",
        ),
        *(
            "--seed",
            "--precision",
            "--channels-last",
            "--device",
            "--data-root",
            "--debug",
            "--unknown",
        ),
    ),
    "spectrum": (
        *(
            "--classes",
            "--split",
            "--loss",
            "--augment",
            "--probes",
            "--seed",
            "--device",
            "--data-root",
        ),
        *("--out", "--overwrite", "--unknown", "--debug"),
    ),
    "evaluate": (
        *("--data", "--split", "--prior", "--level", "--classes", "--device", "--out"),
        *("--uncalibrated", "--data-root", "--imbalance", "--unknown", "--debug"),
    ),
    "calibrate": ("--method", "--force", "--device", "--data-root", "--unknown", "--debug"),
    "predict": (
        *("--out", "--format", "--top", "--batch-size", "--corrupt", "--device"),
        *("--uncalibrated", "--data-root", "--unknown", "--debug"),
    ),
    "export": ("--out", "--format", "--overwrite", "--device", "--uncalibrated", "--unknown"),
    "report": ("--out", "--quiet"),
    "reproduce": (
        *(
            "--seeds",
            "--steps",
            "--probes",
            "--spectrum-augment",
            "--lr",
            "--rho",
            "--kind",
            "--device",
            "--threads",
        ),
        *("--posthoc-tau", "--warmup-epochs", "--unknown", "--debug"),
    ),
    "sweep": ("--grid", "--seeds", "--jobs", "--executor", "--shard", "--rho", "--lr", "--seed"),
    "tune": ("--search", "--trials", "--search-seed", "--sampler", "--seeds", "--jobs", "--shard"),
    "recipes": ("--data", "--method", "--optimizer", "--names"),
    "data": (
        "--root",
        "--imbalance",
        "--subset-seed",
        "--kind",
        "--decode",
        "--out",
        "--split",
        "--rows",
    ),
    "demo": ("--seed", "--out", "--overwrite"),
    "doctor": ("--quiet",),
}
ALWAYS = {
    "train": ("--quiet", "--threads", "1", "--epochs", "1", "--batch-size", "138"),
    "spectrum": ("--quiet", "--steps", "2"),
    "evaluate": ("--quiet", "--bootstrap", "20"),
    "calibrate": ("--quiet",),
    "reproduce": ("--quiet", "--data", "digits-lt", "--epochs", "1", "--batch-size", "276"),
    "demo": ("--quiet", "--epochs", "0"),
    # Data that are not there, so that no process is started.
    "sweep": (
        "--data",
        "cifar10-lt",
        "--data-root",
        "/nowhere",
        "--method",
        "ce",
        "--optimizer",
        "sgd",
    ),
    "tune": (
        "--data",
        "cifar10-lt",
        "--data-root",
        "/nowhere",
        "--method",
        "ce",
        "--search",
        "lr=0:1",
    ),
}
OF_RUNS = ("spectrum", "evaluate", "calibrate", "predict", "export")
"""Commands that most lines call with a valid run, so that options are checked."""
SHARES = {
    "train": 0.35,
    "spectrum": 0.15,
    "evaluate": 0.1,
    "calibrate": 0.05,
    "predict": 0.05,
    "export": 0.03,
    "report": 0.05,
    "reproduce": 0.06,
    "sweep": 0.01,
    "tune": 0.01,
    "recipes": 0.05,
    "data": 0.06,
    "demo": 0.02,
    "doctor": 0.01,
}
FIRST = {
    **dict.fromkeys(OF_RUNS, VALUES),
    "report": VALUES,
    "reproduce": ("table9", "figure9", *VALUES),
    "data": ("check", "show", "pack", "convert", *VALUES),
}


@pytest.mark.slow
def test_a_thousand_command_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "RUN"
    assert main(["train", *ALWAYS["train"], "--method", "ce", "--out", str(run)]) == 0
    shutil.copytree(run, tmp_path / "source")
    damaged = tmp_path / "DAMAGED"
    shutil.copytree(run, damaged)
    for name in ("checkpoint.pt", "result.json"):
        content = bytearray((damaged / name).read_bytes())
        content[len(content) // 2] ^= 0x10
        (damaged / name).write_bytes(content)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FILE").write_text(json.dumps({"a": 1}))
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(25)
    names = list(SHARES)
    codes: dict[int, int] = {}
    for _ in range(LINES):
        command = names[generator.choice(len(names), p=list(SHARES.values()))]
        line = [command]
        if command in FIRST:
            first = FIRST[command]
            chosen = "RUN" if command in OF_RUNS and generator.random() < 0.7 else None
            line.append(chosen or first[generator.integers(len(first))])
        if command == "data":
            line.append(("digits-lt", *VALUES)[generator.integers(len(VALUES) + 1)])
        for _ in range(generator.integers(0, 4)):
            line.append(OPTIONS[command][generator.integers(len(OPTIONS[command]))])
            line += [
                VALUES[generator.integers(len(VALUES))] for _ in range(generator.integers(0, 3))
            ]
        line += ALWAYS.get(command, ())
        capsys.readouterr()
        debug = "--debug" in line
        try:
            code = main(line)
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        error = capsys.readouterr().err
        codes[code] = codes.get(code, 0) + 1
        assert code in (0, 1, 2), line
        assert debug or "Traceback" not in error, (line, error)
        if code == 1 and not debug:
            last = error.splitlines()[-1]
            assert last.startswith("fastsam: error: "), (line, error)
            # Unexpected errors are reported with their type.
            assert "--debug shows where" not in last, (line, error)
    assert min(codes.get(code, 0) for code in (0, 1, 2)) > 10, codes
