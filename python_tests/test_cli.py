"""All commands and user errors: exit codes, one-line messages, no damaged files."""

from __future__ import annotations

import importlib.metadata
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fastsam
from fastsam.cli import main, parse
from fastsam.cli.commands.spectrum import _largest_and_smallest
from fastsam.cli.options import every_setting
from fastsam.curvature import Spectrum
from fastsam.demo import program
from fastsam.demo.plan import LONG_TAIL
from fastsam.longtail import Checkpoint
from fastsam.longtail.checkpoint import weights_hash
from fastsam.longtail.data import DATASETS, load_dataset
from fastsam.longtail.errors import UsageError

TINY = ["--epochs", "1", "--batch-size", "100", "--quiet"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("runs") / "first"
    assert main(["train", "--method", "ldam-drw", *TINY, "--out", str(out)]) == 0
    return out


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail, and return its one-line message."""

    def check(code: int, *arguments: object) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == code
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("fastsam: error: ")
        return lines[0]

    return check


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "digit"], "did you mean 'digits-lt'? valid: cifar10-lt"),
        (["--precision", "float33"], "unknown precision 'float33', did you mean 'float32'?"),
        (["--select", "best"], "unknown select 'best'; valid: last, best-validation"),
        (["--head", "cosin"], "unknown head 'cosin', did you mean 'cosine'?"),
        (["--track", "tensorbord"], "did you mean 'tensorboard'?"),
        (["--precision", "BFLOAT16"], "unknown precision 'BFLOAT16', did you mean 'bfloat16'?"),
        (["--method", "cedrw"], "ce, eql, focal"),
        (["--optimizer", "rmsprop"], "sam, sgd"),
        (["--model", "vgg"], "resnet8"),
        (["--rho", "-1"], "rho must be at least 0"),
        (["--rho", "nan"], "rho must be at least 0"),
        (
            ["--optimizer", "sgd", "--rho", "0.1"],
            "rho requires optimizer asam, looksam, sam",
        ),
        (["--imbalance", "1000"], "imbalance must be at most"),
        (["--epochs", "0"], "epochs must be at least 1"),
        (["--resume"], "require --out"),
        (["--device", "tpu9"], "valid: cpu, cuda"),
        (["--device", "cpu:5"], "cpu:5 does not exist"),
        (["--threads", "1000000000"], "threads must be at least 0 and at most 1024"),
        (
            ["--warmup-epochs", "9", "--epochs", "8"],
            "warmup_epochs must be at most epochs (8)",
        ),
        (["--posthoc-tau", "1e308"], "posthoc_tau must be"),
        (["--method", "paco", "--paco-queue", "1000000000"], "paco_queue must be"),
        (["--data", "folder", "--image-size", "1000000000"], "image_size must be"),
        (["--data", "folder", "--workers", "1000000000"], "workers must be"),
    ],
)
def test_wrong_settings_of_train(
    arguments: list[str], message: str, fails: Callable[..., str]
) -> None:
    assert message in fails(2, "train", "--quiet", *arguments)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train --optimizer sam --rho abc", "--rho must be one or more numbers, got 'abc'"),
        ("train --rho=0.1 x", "--rho must be one or more numbers, got '0.1 x'"),
        ("train --epochs three", "--epochs must be a whole number, got 'three'"),
        ("train --lr fast --quiet", "--lr must be a number, got 'fast'"),
        ("train --epochs", "--epochs requires a value, a whole number"),
        ("train --epoch 3", "unknown option --epoch, did you mean --epochs?"),
        ("train --quiet 3", "unexpected argument '3'"),
        ("train --alpha 3", "unknown option --alpha;"),
        ("predict RUN img --epochs 3", "unknown option --epochs;"),
        ("predict RUN img --format xml", "--format must be csv or json, got 'xml'"),
        ("data show cifar10-lt --colums 3", "unknown option --colums, did you mean --columns?"),
        ("spectrum", "missing RUN"),
        ("data", "check, show, pack, convert"),
        ("data chek", "'chek'"),
        ("--rho", "a command must come first"),
        ("", "a command must come first"),
    ],
)
def test_arguments_that_cannot_be_parsed(
    line: str, message: str, fails: Callable[..., str]
) -> None:
    found = fails(2, *line.split())
    assert message in found
    assert "--help`" in found


def test_an_unknown_command_names_the_closest(fails: Callable[..., str]) -> None:
    assert "unknown command 'trian', did you mean 'train'?" in fails(2, "trian", "--epochs", 3)


@pytest.mark.parametrize("command", [["train"], ["reproduce", "table1"]])
def test_boolean_settings(command: list[str], capsys: Any) -> None:
    """None leaves the setting to the recipe."""

    def parsed(*arguments: str) -> Any:
        return parse([*command, *arguments])

    assert parsed().channels_last is None
    on = parsed("--channels-last", "--nesterov", "--compile", "True", "--quiet")
    assert (on.channels_last, on.nesterov, on.compile, on.quiet) == (True,) * 4
    assert on.threads is None
    assert parsed("--channels-last", "False").channels_last is False
    for wrong in (["no"], ["True", "False"], ["False", "x"]):
        with pytest.raises(UsageError, match=r"channels-last|unexpected"):
            parsed("--channels-last", *wrong)
    with pytest.raises(SystemExit):
        parse([command[0], "--help"])
    assert "--channels-last [True|False]" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [
        [],
        *(
            [name]
            for name in ("train", "spectrum", "predict", "export", "demo", "report", "doctor")
        ),
    ],
)
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    assert "usage: fastsam" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"fastsam {fastsam.__version__}\n"


def test_training_help_lists_the_registered_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in ("digits-lt", "ldam", "drw", "sgd", "--imbalance", "--rho FLOAT ...", "--seed INT"):
        assert name in text
    assert "ib, lade, paco balance classes themselves and refuse the rules drw, rw." in text


def test_training_help_groups_options_with_defaults_and_choices(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--method", "ldam-drw", "--epochs", "60", "--help"])
    lines = re.sub(r"[│╭╮╰╯─]|--(?=-)", " ", capsys.readouterr().out)
    boxes = re.split(r"^ +(\S.*?) options +-?$", lines, flags=re.MULTILINE)
    text = {title: " ".join(box.split()) for title, box in grouped(boxes)}
    order = ["data set", "loss", "rule", "optimizer", "network", "learning rate", "training"]
    assert [title for title in text if title in order] == order
    assert (
        "--max-margin FLOAT margin of the smallest class in the LDAM loss (recipe: 0.5)"
        in text["loss"]
    )
    assert "One of: algorithm1, effective, inverse, power (recipe: effective)" in text["rule"]
    assert (
        "One of: cosine, disalign, linear, lws, scaled-cosine (recipe: cosine)" in text["network"]
    )
    assert "--select last|best-validation" in text["training"]
    assert "--project" in text["tracking"]
    assert "--device TEXT" in text["machine"]
    assert not [box for box in text.values() if "(default: None)" in box]


def grouped(boxes: list[str]) -> list[tuple[str, str]]:
    return list(zip(boxes[1::2], boxes[2::2], strict=True))


def test_train_writes_its_folder(run: Path) -> None:
    assert {path.name for path in run.iterdir()} == {
        "checkpoint.pt",
        "result.json",
        "history.csv",
        "per_class.csv",
        "run.yaml",
    }


@pytest.mark.parametrize("named", [[], ["--method", "ldam-drw", *TINY]])
def test_a_run_is_resumed_with_its_own_settings(
    named: list[str], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = json.loads((run / "result.json").read_text())
    assert main(["train", "--resume", "--quiet", "--out", str(run), *named]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    assert "head" in output.out
    assert "ldam-drw sam" in output.out
    new = json.loads((run / "result.json").read_text())
    for name in ("config", "sources", "test", "history"):
        assert new[name] == old[name], name


def test_train_does_not_write_to_a_folder_with_content(
    run: Path, fails: Callable[..., str]
) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert "--resume or --overwrite" in fails(2, "train", *TINY, "--out", run)
    assert "cannot resume from" in fails(1, "train", *TINY, "--resume", "--seed", 3, "--out", run)
    assert "lower learning rate" in fails(
        1, "train", *TINY, "--lr", 1e30, "--out", run.parent / "inf"
    )
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_spectrum_and_report(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spectra = run / "spectra"
    options = ["--steps", "3", "--quiet", "--out", str(spectra)]
    assert main(["spectrum", str(run), "--classes", "1", "9", *options]) == 0
    output = capsys.readouterr().out
    assert "epoch 1, class 9 (tail, 2 train images), loss ce, no augmentation" in output
    assert "lambda_min" in output
    assert main(["spectrum", str(run / "checkpoint.pt"), "--classes", "9", *options]) == 0
    assert output.splitlines()[1] in capsys.readouterr().out  # loaded
    assert main(["spectrum", str(run), "--classes", "3", *options]) == 2
    more = [*options, "--overwrite", "--loss", "as-trained", "--augment", "2"]
    assert main(["spectrum", str(run / "checkpoint.pt"), "--classes", "9", *more]) == 0
    assert "loss as-trained, 2 fixed augmented copies of each image" in capsys.readouterr().out
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert page.count("<figcaption>class ") == 3
    assert {Spectrum.load(path).settings["dtype"] for path in spectra.glob("*.json")} == {"float32"}
    fine = run.parent / "fine"
    more = ["--steps", "3", "--quiet", "--out", str(fine), "--dtype", "float64"]
    assert main(["spectrum", str(run), "--classes", "9", *more]) == 0
    assert {Spectrum.load(path).settings["dtype"] for path in fine.glob("*.json")} == {"float64"}
    assert "loss as-trained" in page


def test_spectrum_measures_the_largest_and_the_smallest_class(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default is right for runs with any number and order of classes."""
    assert main(["spectrum", str(run), "--steps", "3", "--quiet"]) == 0
    output = capsys.readouterr().out
    assert "class 0 (head" in output
    assert "class 9 (tail" in output
    checkpoint = Checkpoint.load(run)
    assert _largest_and_smallest(replace(checkpoint, counts=[])) == (0, 9)  # an older version
    counts = [3, 1, 40, *checkpoint.counts[3:-1], 7]
    assert _largest_and_smallest(replace(checkpoint, counts=counts)) == (2, 1)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--classes", "10"], 2, "valid: 0 to 9"),
        (["--steps", "0"], 2, "steps must be at least 1"),
        (["--steps", "1000000"], 1, "use smaller batches, fewer steps"),
        (["--seed", "-1"], 2, "seed must be at least 0"),
        (["--classes"], 2, "classes is empty; pass labels from 0 to 9"),
        (["--device", "cpu:5"], 2, "cpu:5 does not exist"),
        (["--augment", "100000"], 2, "up to 9999"),
        (["--probes", "0"], 2, "probes must be at least 1"),
        (["--loss", "hinge"], 2, "valid: ce, as-trained"),
        (["--augment", "some"], 2, "none, a number"),
        (["--augment", "0"], 2, "none, a number"),
        (["--split", "val"], 2, "train, validation, test"),
        (["--split", "test", "--augment", "1"], 2, "no augmentation"),
    ],
)
def test_wrong_settings_of_spectrum(
    arguments: list[str], code: int, message: str, run: Path, fails: Callable[..., str]
) -> None:
    assert message in fails(code, "spectrum", run, "--quiet", *arguments)


def test_unexpected_errors_are_one_line_or_a_traceback_with_debug(
    run: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    raised: list[Exception] = []

    def fail(*arguments: object, **options: object) -> None:
        raise raised[-1]

    monkeypatch.setattr("fastsam.longtail.checkpoint.Checkpoint.load", fail)
    cases = (
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            "killed by signal",
        ),
        (RuntimeError("Connection closed by peer\nException raised from x (most recent"), "peer"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            "out of memory",
        ),
        (MemoryError(), "out of memory: allocation failed; lower --steps"),
        (KeyError("version"), "KeyError: 'version' (pass --debug for the traceback)"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ValueError("\x1b[2Ja\nb"), "\\x1b[2Ja"),
    )
    for error, message in cases:
        raised.append(error)
        assert message in fails(1, "spectrum", run)
        assert "\x1b" not in fails(1, "spectrum", run)
    for arguments in (["--debug", "spectrum", str(run)], ["spectrum", str(run), "--debug"]):
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("Traceback")
        assert error.splitlines()[-1].startswith("fastsam: error: ValueError")


def test_damaged_checkpoints(run: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    assert "no checkpoint" in fails(1, "spectrum", tmp_path / "none.pt")
    broken = tmp_path / "broken.pt"
    broken.write_bytes((run / "checkpoint.pt").read_bytes()[:-100])
    assert "truncated" in fails(1, "spectrum", broken)
    assert "no result.json" in fails(1, "report", tmp_path)


def recipe_rows(text: str) -> dict[str, list[list[str]]]:
    """Return the rows of each data set by its heading, and check that lines fit 80 columns."""
    assert max(map(len, text.splitlines())) <= 80
    sections = {}
    for section in text.split("\n\n")[:-1]:
        heading, _, *rows = section.split("also not published")[0].splitlines()
        sections[heading] = [row.split() for row in rows]
    return sections


def test_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--names"]) == 0
    output = capsys.readouterr().out
    for name in ("imagenet-lt", "ldam", "drw", "lpf-sgd"):
        assert name in output
    assert max(map(len, output.splitlines())) <= 80
    assert main(["recipes"]) == 0
    sections = recipe_rows(capsys.readouterr().out)
    assert sum(map(len, sections.values())) == 38
    assert [
        "ldam-drw",
        "sam",
        "200",
        "0.1",
        "0.0002",
        "160",
        "0.8",
        "1",
        "2",
        "5",
        "imbalance",
    ] in (sections["cifar10-lt: model resnet32, batch size 128"])
    cifar100 = sections["cifar100-lt: model resnet32, batch size 128"]
    unknown = next(row for row in cifar100 if row[:2] == ["vs", "sam"])
    assert unknown[6] == "0.05?"
    assert main(["recipes", "--data", "cifar100-lt", "--method", "vs"]) == 0
    assert "also not published: gamma tau of vs sgd, vs sam\n" in capsys.readouterr().out
    assert main(["recipes", "--data", "imagenet-lt", "--optimizer", "sam"]) == 0
    (rows,) = recipe_rows(capsys.readouterr().out).values()
    assert [row[:2] for row in rows] == [["ce-drw", "sam"], ["ldam-drw", "sam"]]
    one = ["recipes", "--data", "cifar10-lt", "--optimizer", "sam", "--method"]
    assert main([*one, "ldam-drw"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["rho", "0.8", "[code]", "run.sh"] in lines
    assert main([*one, "paco"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    assert main([*one, "vs"]) == 0
    assert "not a published value" in capsys.readouterr().out
    assert main([*one[:-1], "--method", "vs-drs"]) == 0
    assert main(["recipes", "--data", "cifar"]) == 2
    assert main(["recipes", "--data", "cifar10-lt", "--stages", "crt"]) == 2  # ignored otherwise
    assert main(["recipes", "--data", "digits-lt", "--method", "ce"]) == 2


def test_reproduce(tmp_path: Path, fails: Callable[..., str], capsys: Any) -> None:
    assert "table1, table2, table3" in fails(2, "reproduce", "table9")
    assert "seeds" in fails(2, "reproduce", "table4", "--data", "digits-lt", "--seeds", 0)
    options = ["--data", "digits-lt", "--epochs", "1", "--quiet", "--out", tmp_path]
    command = ["reproduce", "table4", "--seeds", "2", *map(str, options)]
    assert main(command) == 0
    first = capsys.readouterr().out.splitlines()
    assert first[1] == "test accuracy in %, last epoch, mean +- standard deviation over 2 seeds"
    assert first[2].split() == ["all", "head", "mid", "tail"]
    rows = {line.split()[0]: line for line in first[3:]}
    assert list(rows) == ["ce-drw-sgd", "ce-drw-pgd", "ce-drw-lpf-sgd", "ce-drw-sam", "note:"]
    results = [
        json.loads((tmp_path / "ce-drw-sam" / f"seed-{seed}" / "result.json").read_text())["test"]
        for seed in range(2)
    ]
    scores = [[result["accuracy"], *result["groups"].values()] for result in results]
    expected = [
        f"{statistics.mean(pair):.1f} +- {statistics.stdev(pair):.1f}"
        for pair in zip(*scores, strict=True)
    ]
    assert re.split(r"  +", rows["ce-drw-sam"]) == ["ce-drw-sam", *expected]
    assert len({line.rindex(line.split()[-1]) + len(line.split()[-1]) for line in first[2:7]}) == 1
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert len(written) == 8
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines() == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")} == written
    assert main(["reproduce", "table4", "--seeds", "1", *map(str, options)]) == 0
    single = capsys.readouterr().out
    assert "one seed" in single
    assert "+-" not in single
    options[3] = "2"
    assert "other settings" in fails(1, "reproduce", "table4", *options)


def test_training_says_what_it_trains_and_warns_of_epochs_of_one_step(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = ["train", "--method", "ce", "--optimizer", "sgd", "--epochs", "2", "--quiet"]
    assert main([*line, "--batch-size", "1024"]) == 0
    output = capsys.readouterr()
    assert output.out.splitlines()[0] == "digits-lt, ce, sgd, 2 epochs"
    images = int(load_dataset("digits-lt").counts.sum())
    warning = f"an epoch is one step ({images} images, batch size 1024); lower --batch-size"
    assert output.err.splitlines() == [f"fastsam: {warning}"]
    assert main([*line, "--batch-size", str(images - 2)]) == 0
    assert "one step" not in capsys.readouterr().err


def test_help_names_settings_as_options(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(["train", "--method", "ce-drw", "--help"], capsys)
    assert "one value, or one for each phase of --rho-schedule" in text
    assert "rho_schedule" not in text
    assert "defer_epoch" not in text
    assert "(torch.channels_last)" in text


def test_an_option_shows_one_default(capsys: pytest.CaptureFixture[str]) -> None:
    """Help texts of settings state no default; a default in words replaces that of this machine."""
    stated = [
        name for name, (item, _) in every_setting().items() if "default" in item.metadata["help"]
    ]
    assert stated == ["pretrained"]  # the name of weights
    for command in (["data", "check"], ["train", "--data", "folder"], ["reproduce"]):
        text = help_of([*command, "--help"], capsys)
        assert "read images (default: CPU cores of this process less one, from 1 to 16)" in text
    text = help_of(["train", "--data", "fashion-mnist-lt", "--help"], capsys)
    assert "images of the largest class (recipe: 5000)" in text
    text = help_of(["train", "--data", "cifar10-lt", "--help"], capsys)
    assert "images of the largest class (default: size of the smallest class" in text


def help_of(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the help of a command on one line, without boxes."""
    with pytest.raises(SystemExit):
        main(command)
    return " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())


def test_the_command_line_does_not_offer_data_that_exist_only_in_python(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert main(["recipes", "--names"]) == 0
    assert main(["train", "--data", "nothing"]) == 2
    shown = capsys.readouterr()
    assert "torchvision:NAME" in shown.out
    assert "torchvision:NAME" in shown.err
    assert "own:" not in shown.out + shown.err
    assert "own:mine" in DATASETS


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    assert re.search("^OpenMP: (yes|no)$", output, re.MULTILINE)
    assert re.search(r"^built with CUDA: (no|\d+\.\d, for architectures .*)$", output, re.MULTILINE)
    assert "cuda_" not in output
    for package in ("scikit-learn", "onnx", "safetensors", "datasets", "optuna"):
        assert f"\n{package}: " in output


def test_spectrum_measures_the_weights_that_are_evaluated(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ["--method", "ce", "--optimizer", "sgd", "--ema", "0.5"]
    assert main(["train", *settings, *TINY, "--out", str(run)]) == 0
    checkpoint = Checkpoint.load(run)
    command = ["spectrum", str(run), "--classes", "9", "--steps", "2", "--quiet", "--out"]
    assert main([*command, str(tmp_path / "spectra")]) == 0
    (path,) = (tmp_path / "spectra").glob("*.json")
    measured = Spectrum.load(path).settings["weights"]
    assert measured == weights_hash(checkpoint.build_model(judged=True).state_dict())
    assert measured != weights_hash(checkpoint.build_model().state_dict())


@pytest.mark.parametrize(
    ("driver", "devices", "found"),
    [
        (0, 0, "none (no NVIDIA driver)"),
        (12080, 0, "none (the NVIDIA driver supports CUDA 12.8)"),
        (13000, 2, "2 (the NVIDIA driver supports CUDA 13.0)"),
    ],
)
def test_doctor_describes_gpus_in_words(
    driver: int,
    devices: int,
    found: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build = {
        "compiler": "GNU 12.2.0",
        "openmp": True,
        "cuda": True,
        "cuda_runtime": 13000,
        "cuda_driver": driver,
        "cuda_devices": devices,
        "cuda_architectures": "90-real",
        "kernels": "auto",
        "backends": {"cpu": "native"},
    }
    monkeypatch.setattr(fastsam, "build_info", lambda: build)
    assert main(["doctor"]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["GPUs found"] == found
    assert lines["built with CUDA"] == "13.0, for architectures 90-real"


def test_doctor_prints_install_commands(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(package: str) -> str:
        if package == "torch":
            return "2.9.1+cu126"
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert main(["doctor"]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["scipy"].endswith('pip install ".[longtail]" in a checkout of fastsam')
    assert lines["matplotlib"].endswith('pip install ".[plots]" in a checkout of fastsam')
    assert lines["torchvision"].endswith(
        "pip install torchvision torch==2.9.1+cu126 "
        "--extra-index-url https://download.pytorch.org/whl/cu126"
    )


def test_module_can_be_run() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastsam", "train", "--data", "nothing"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"fastsam: error: unknown data 'nothing'; valid: {', '.join(DATASETS.names())}",
    ]


@pytest.mark.slow
def test_an_early_interrupt_is_one_line() -> None:
    """Except while Python itself starts."""
    answers = set()
    for moment in (0.15, 0.3, 0.6, 1.0, 1.5, 2.0, 3.0):
        program = (
            "import os, signal, threading, sys\n"
            f"threading.Timer({moment}, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
            "from fastsam.__main__ import main\n"
            "sys.argv[1:] = ['train', '--quiet', '--epochs', '500']\n"
            "sys.exit(main())\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        answers.add((done.returncode, done.stderr))
    # On a fast machine the training has begun at the last moments.
    begun = {answer for answer in answers if answer[0] == 75}
    assert answers - begun == {(130, "fastsam: error: interrupted\n")}
    for _, text in begun:
        assert text.startswith("fastsam: stopped by SIGINT")
        assert len(text.splitlines()) == 1


def test_public_names_are_those_of_their_parts() -> None:
    program = (
        "import sys, fastsam\n"
        "assert 'torch' not in sys.modules\n"
        "assert set(fastsam.__all__) <= set(dir(fastsam))\n"
        "assert all(getattr(fastsam, name) is not None for name in fastsam.__all__)\n"
        "assert fastsam.SAM is fastsam.optim.SAM\n"
        "assert not hasattr(fastsam, 'nothing')\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.slow
def test_demo_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    arguments = ["demo", "--quiet", "--out", str(out)]
    assert main([*arguments, "--epochs", "10", "--seeds", "2"]) == 0
    output = capsys.readouterr().out
    for text in ("head", "lambda_max", "RE-DRAWN", "times faster", "SAM in the late phase vs. SGD"):
        assert text in output
    page = (out / "report.html").read_text()
    assert "://" not in page.replace("http://www.w3.org", "")
    assert page.index("What helps the tail") < page.index('class="chart"')
    for section in ("Accuracy", "Confusion", "Calibration", "Training", "Hessian spectra by class"):
        assert f">{section}</h2>" in page
    assert "A mistake, on purpose" in page
    assert (out / "overview.png").read_bytes().startswith(b"\x89PNG")
    assert main(arguments) == 2
    assert main(["report", str(out)]) == 0
    assert (out / "report.html").read_text() == page
    assert main([*arguments, "--overwrite", "--seeds", "0"]) == 2
    assert "seeds must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_closed_pipe_loses_no_result(command: str, run: Path, tmp_path: Path) -> None:
    """As in ``fastsam train ... | head -1``: the reader ends before the result is printed."""
    out = tmp_path / "out"
    arguments = {
        "train": ["train", *TINY, "--out", str(out)],
        "evaluate": ["evaluate", str(run), "--out", str(out), "--quiet"],
    }[command]
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "fastsam", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        if command == "train":  # the last line before the training
            while not process.stdout.readline().startswith("training set"):
                pass
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 1
    assert "standard output was closed" in errors
    assert str(out) in errors
    assert "Traceback" not in errors
    stored = json.loads((out / "result.json" if command == "train" else out).read_text())
    assert stored["test" if command == "train" else "metrics"]["accuracy"] > 0


def test_a_resumed_run_with_other_epochs_says_what_differs(
    run: Path, fails: Callable[..., str]
) -> None:
    """Its milestones do not fit the new number of epochs, which is not what is wrong."""
    later = run.parent / "later"
    assert (
        main(["train", "--epochs", "20", "--batch-size", "2000", "--quiet", "--out", str(later)])
        == 0
    )
    for mode in ([], ["auto"]):
        message = fails(1, "train", "--resume", *mode, "--out", later, "--epochs", "2")
        assert "cannot resume: epochs was 20, is now 2" in message


def test_the_overwriting_demo_keeps_files_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ReachedError(Exception):
        """The demo begins to train."""

    def stop(*_: object, **__: object) -> None:
        raise ReachedError

    monkeypatch.setattr(program, "_in_processes", stop)
    foreign, earlier = (tmp_path / LONG_TAIL.folder / name for name in ("mine", "seed-7"))
    for folder in (foreign, earlier):
        folder.mkdir(parents=True)
        (folder / "thesis.txt").write_text("precious")
    with pytest.raises(ReachedError):
        program.run_demo(tmp_path, overwrite=True)
    assert (foreign / "thesis.txt").read_text() == "precious"
    assert not earlier.exists()
