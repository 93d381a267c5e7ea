"""`fastsam export`: other programs load the files and compute the logits of the run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import fastsam
from fastsam.cli import main
from fastsam.longtail import Result, Trainer, recipe
from fastsam.longtail.data import from_datasets, load_dataset
from fastsam.longtail.errors import CheckpointError, DataError, LongTailError, UsageError
from fastsam.longtail.models.heads import AffineHead
from fastsam.longtail.trained import TrainedRun, calibrate_run, export_run, load_weights
from fastsam.longtail.trained.card import model_card
from fastsam.longtail.trained.export import FORMATS
from fastsam.longtail.trained.metadata import portable_settings

IMAGES = 100
RUNS = {
    "cosine": {"method": "ldam-drw"},
    "adjusted": {"method": "ce", "posthoc_tau": 1.5},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run with a scaled cosine head, and one with a linear head and post-hoc adjustment."""
    out = tmp_path_factory.mktemp("runs")
    for name, settings in RUNS.items():
        chosen = {"optimizer": "sgd", "epochs": 4, **settings}
        config = recipe("digits-lt", **chosen).config()  # type: ignore[arg-type]
        Trainer(config, out=out / name, keep=(2,), progress=False).fit()
    return out


@pytest.fixture(scope="module")
def exported(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Export a run in a format once, and return the model file."""

    @cache
    def make(name: str, format: str) -> Path:
        folder = tmp_path_factory.mktemp(f"{name}-{format}") / "model"
        return export_run(TrainedRun.load(runs / name), folder, format=format)

    return make


@pytest.fixture(scope="module")
def cosine(runs: Path) -> TrainedRun:
    return TrainedRun.load(runs / "cosine")


def pixels(count: int = IMAGES) -> Tensor:
    """Return test images of the digits in [0, 1]."""
    images = load_dataset("digits-lt").test.images  # type: ignore[attr-defined]
    return images[:: len(images) // count][:count].float() / 16


def expected_logits(run: TrainedRun, images: Tensor) -> Tensor:
    """Compute logits from the checkpoint's weights in float64, by the formulas."""
    network = run.checkpoint.build_model().double().eval()
    with torch.no_grad():
        outputs = network((images.double() - 0.3053) / 0.3760)
    tau = run.checkpoint.config.posthoc_tau
    scale = run.checkpoint.config.scale or 1.0
    prior = torch.tensor(run.counts / run.counts.sum())
    return scale * outputs - tau * prior.log()


def check(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert torch.equal(found.argmax(dim=1), expected.argmax(dim=1))


@pytest.mark.parametrize("method", ["logit-adjustment", "tau-norm", "nearest-class-mean"])
def test_a_calibration_is_inside_the_exported_graph(
    method: str, runs: Path, tmp_path: Path
) -> None:
    copied = shutil.copytree(runs / "adjusted", tmp_path / "run")
    calibration = calibrate_run(TrainedRun.load(copied), method=method)
    calibration.save(copied / "calibration.json")
    run = TrainedRun.load(copied)
    path = export_run(run, tmp_path / "model", format="onnx")
    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(None, {"pixels": pixels().numpy()})
    with torch.no_grad():
        features = run.network.features((pixels() - 0.3053) / 0.3760)
        expected = run.network.head(features)
        raw = TrainedRun.load(copied, calibrated=False).network.head(features)
    check(torch.from_numpy(found), expected)
    assert not torch.allclose(expected, raw, atol=1e-2)
    card = (path.parent / "README.md").read_text()
    assert f"| calibration | {method} " in card
    assert "`fastsam evaluate` computes the scores of the calibrated network" in card
    result = Result.load(copied / "result.json")
    assert "model-index" not in card
    assert f"{result.test.groups['tail']:.2f}" not in card
    assert "posthoc" not in card


LOAD_WITHOUT_FASTSAM = """
import sys
sys.modules["fastsam"] = None  # an import of it fails
import torch
*programs, given, made = sys.argv[1:]
batches = torch.load(given)
found = [[torch.export.load(path).module()(batch) for batch in batches] for path in programs]
torch.save(found, made)
assert not [name for name in sys.modules if name.startswith("fastsam.")]
"""


@pytest.mark.slow
def test_torch_programs_load_without_fastsam(
    runs: Path, exported: Callable[[str, str], Path], tmp_path: Path
) -> None:
    paths = {name: exported(name, "torch") for name in RUNS}
    assert {path.name for path in paths.values()} == {"model.pt2"}
    batches = [pixels(), pixels(7), pixels(1)]
    torch.save(batches, tmp_path / "in.pt")
    arguments = [*map(str, paths.values()), str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    subprocess.run([sys.executable, "-I", "-c", LOAD_WITHOUT_FASTSAM, *arguments], check=True)
    for name, found in zip(RUNS, torch.load(tmp_path / "out.pt"), strict=True):
        for logits, batch in zip(found, batches, strict=True):
            assert not logits.requires_grad
            check(logits, expected_logits(TrainedRun.load(runs / name), batch))
    extra = {"metadata.json": ""}
    torch.export.load(paths["cosine"], extra_files=extra)
    assert json.loads(extra["metadata.json"])["fastsam"] == fastsam.__version__


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_onnx(name: str, runs: Path, exported: Callable[[str, str], Path]) -> None:
    run, path = TrainedRun.load(runs / name), exported(name, "onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for count in (1, 7, IMAGES):
        (logits,) = session.run(None, {"pixels": pixels(count).numpy()})
        check(torch.from_numpy(logits), expected_logits(run, pixels(count)))
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape) == ("pixels", ["batch", 1, 8, 8])
    assert (made.name, made.shape) == ("logits", ["batch", 10])
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    about = {item.key: item.value for item in model.metadata_props}
    assert json.loads(about["classes"]) == [str(digit) for digit in range(10)]


def test_an_export_leaves_the_run_as_it_is(runs: Path, tmp_path: Path) -> None:
    run = TrainedRun.load(runs / "adjusted")
    before = {name: value.clone() for name, value in run.network.state_dict().items()}
    export_run(run, tmp_path)
    assert not run.network.training
    assert all(parameter.requires_grad for parameter in run.network.parameters())
    after = run.network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("format", FORMATS)
def test_files_name_no_place_of_this_machine(
    format: str, cosine: TrainedRun, exported: Callable[[str, str], Path]
) -> None:
    for file in exported("cosine", format).parent.iterdir():
        content = file.read_bytes()
        assert b"cifar_resnet.py" not in content
        assert str(Path(fastsam.__file__).parent).encode() not in content
        assert str(cosine.path).encode() not in content


@pytest.mark.parametrize("name", RUNS)
def test_safetensors(name: str, runs: Path, exported: Callable[[str, str], Path]) -> None:
    run, path = TrainedRun.load(runs / name), exported(name, "safetensors")
    stored = run.checkpoint.model
    with safe_open(path, "pt") as file:
        header = file.metadata()
        assert set(file.keys()) == {*stored, "logits.scale", "logits.offset"}
        for name, tensor in stored.items():
            assert file.get_tensor(name).dtype == tensor.dtype
            assert torch.equal(file.get_tensor(name), tensor), name
    config = run.checkpoint.config
    assert header["architecture"] == "resnet8"
    assert header["head"] == config.head
    assert header["channels"] == "1"
    assert json.loads(header["counts"]) == run.counts.tolist()
    assert json.loads(header["preprocessing"])["size"] == [8, 8]
    assert json.loads(header["config"])["lr"] == config.lr
    loaded = load_weights(path)
    assert loaded.class_names == run.class_names
    assert loaded.preprocessing == run.preprocessing
    inputs = (pixels() - 0.3053) / 0.3760
    with torch.no_grad():
        assert torch.equal(loaded.network(inputs), run.network(inputs))
        check(loaded.network(inputs), expected_logits(run, pixels()))


def test_heads_around_heads(runs: Path, tmp_path: Path) -> None:
    run = TrainedRun.load(runs / "adjusted")
    inner = run.network.head
    run.network.head = AffineHead(inner, 0.25, torch.arange(10.0))
    loaded = load_weights(export_run(run, tmp_path / "nested", format="safetensors"))
    inputs = (pixels() - 0.3053) / 0.3760
    with torch.no_grad():
        check(loaded.network(inputs), 0.25 * expected_logits(run, pixels()) + torch.arange(10.0))
    run.network.head = nn.Sequential(inner, nn.LogSoftmax(dim=1))
    with pytest.raises(
        LongTailError, match=r"trained head, a Linear, .* by a Sequential.*--format torch or onnx"
    ):
        export_run(run, tmp_path / "other", format="safetensors")
    assert not (tmp_path / "other").exists()


def test_weights_that_are_not_ours(cosine: TrainedRun, tmp_path: Path) -> None:
    path = export_run(cosine, tmp_path, format="safetensors")
    content = path.read_bytes()
    for wrong, message in (
        (content[:-10], "cannot read .* as safetensors"),
        (b"hello", "cannot read .* as safetensors"),
        (content.replace(b'"config"', b'"konfig"'), "was not written by"),
        (content.replace(b'\\"ldam-drw\\"', b'\\"lxam-drw\\"'), "not a valid export"),
        (content.replace(b'"channels":"1"', b'"channels":"3"'), "not a valid export"),
    ):
        assert wrong != content
        path.write_bytes(wrong)
        with pytest.raises(CheckpointError, match=message):
            load_weights(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_weights(tmp_path / "gone.safetensors")


def card_parts(card: str) -> tuple[dict[str, Any], str]:
    """Split a model card into front matter and Markdown."""
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), body


def table(body: str, first: str) -> dict[str, list[str]]:
    """Return the rows of the table whose header starts with ``first``, by their first cell."""
    lines = body[body.index(f"| {first}") :].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {row[0].replace("\\", ""): row[1:] for row in rows}


def test_the_card_has_the_numbers_of_the_result(runs: Path, tmp_path: Path) -> None:
    assert (
        main(["export", str(runs / "cosine"), "--format", "safetensors", "--out", str(tmp_path)])
        == 0
    )
    result = Result.load(runs / "cosine" / "result.json")
    front, body = card_parts((tmp_path / "README.md").read_text())
    assert front["pipeline_tag"] == "image-classification"
    [model] = front["model-index"]
    [judged] = model["results"]
    assert judged["dataset"] == {"name": "digits-lt", "type": "digits-lt"}
    shares = {"all": result.test.accuracy, **result.test.groups}
    assert [item["value"] for item in judged["metrics"]] == list(shares.values())
    accuracies = table(body, f"classes ({result.test.images} test images)")
    assert accuracies == {name: [f"{share:.2f}"] for name, share in shares.items()}
    classes = table(body, "label")
    assert classes == {
        str(label): [str(label), str(result.counts[label]), f"{result.test.per_class[label]:.2f}"]
        for label in range(10)
    }
    settings = table(body, "setting")
    assert settings["method"] == ["ldam-drw"]
    assert settings["optimizer"] == ["sgd"]
    assert settings["lr"] == [str(result.config["lr"])]
    assert settings["weights"] == [f"{result.rule}, after 4 of 4 epochs"]
    assert f"{shares['tail']:.2f} percent on tail classes" in body
    assert f"fastsam {fastsam.__version__}" in body
    assert json.loads((tmp_path / "labels.json").read_text()) == [str(digit) for digit in range(10)]


def test_export_replaces_an_export_and_nothing_else(cosine: TrainedRun, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "README.md").write_text("My project")
    (own / "model.onnx").write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"README\.md was not written by"):
        export_run(cosine, own, format="safetensors", overwrite=True)
    assert (own / "model.onnx").read_bytes() == b"mine"
    with pytest.raises(UsageError, match="folder of a run"):
        export_run(cosine, cosine.path, format="safetensors", overwrite=True)
    for format in ("safetensors", "torch"):
        export_run(cosine, tmp_path / "model", format=format, overwrite=True)
    assert {file.name for file in (tmp_path / "model").iterdir()} == {
        *("README.md", "labels.json", "model.pt2"),
    }


def test_the_second_of_two_exports_at_once_is_refused(
    cosine: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = FORMATS["safetensors"]

    def build(run: TrainedRun) -> bytes:
        export_run(run, tmp_path / "model", format="torch")
        return slow.build(run)

    monkeypatch.setitem(FORMATS._parts, "safetensors", replace(slow, build=build))
    with pytest.raises(UsageError, match="is not empty"):
        export_run(cosine, tmp_path / "model", format="safetensors")
    assert (tmp_path / "model" / "model.pt2").is_file()


def test_a_card_without_a_result_of_these_weights(runs: Path, tmp_path: Path) -> None:
    def card(path: Path) -> str:
        return model_card(TrainedRun.load(path), file="x", usage="")

    front, body = card_parts(card(runs / "cosine" / "epoch-2.pt"))
    assert "model-index" not in front
    assert "the run has no result for these weights" in body
    assert table(body, "setting")["weights"] == ["last epoch, after 2 of 4 epochs"]
    assert card(runs / "cosine" / "checkpoint.pt") == card(runs / "cosine")
    (tmp_path / "checkpoint.pt").write_bytes((runs / "cosine" / "checkpoint.pt").read_bytes())
    assert "model-index" not in card(tmp_path)
    text = (runs / "adjusted" / "result.json").read_text()
    (tmp_path / "result.json").write_text(text)
    assert "model-index" not in card(tmp_path)
    (tmp_path / "result.json").write_text(text.replace('"epoch": 1', '"epoch": 7'))
    with pytest.raises(DataError, match=r"result\.json"):
        card(tmp_path)


def test_a_card_of_many_classes_with_names_that_are_markup(cosine: TrainedRun) -> None:
    names = tuple(f"a|b\n<script>{label}" for label in range(1000))
    counts = np.arange(1000, 0, -1)
    many = replace(cosine, path=Path("gone"), class_names=names, counts=counts)
    card = model_card(many, file="x", usage="")
    assert len(card) < 6000
    rows = table(card_parts(card)[1], "label")
    assert list(rows) == ["0", "1", "2", "3", "4", "995", "996", "997", "998", "999"]
    assert rows["999"] == [r"a\|b \<script\>999", "1"]


@pytest.mark.parametrize("format", FORMATS)
def test_the_code_in_the_card_runs(
    format: str,
    cosine: TrainedRun,
    exported: Callable[[str, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    shutil.copytree(exported("cosine", format).parent, tmp_path, dirs_exist_ok=True)
    [code] = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)
    Image.new("RGB", (30, 20)).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert capsys.readouterr().out.strip() in cosine.class_names


def test_folders_that_are_not_empty(cosine: TrainedRun, tmp_path: Path, capsys: Any) -> None:
    export_run(cosine, tmp_path, format="safetensors")
    with pytest.raises(UsageError, match="--overwrite"):
        export_run(cosine, tmp_path)
    (tmp_path / "notes.txt").touch()
    options = ["--out", str(tmp_path), "--overwrite"]
    assert main(["export", str(cosine.path), *options, "--format", "torch"]) == 0
    assert capsys.readouterr().out == f"exported: {tmp_path / 'model.pt2'}\n"
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {"README.md", "labels.json", "model.pt2", "notes.txt"}
    assert main(["export", str(cosine.path), *options, "--format", "tflite"]) == 2
    assert "valid: onnx, safetensors, torch" in capsys.readouterr().err


def test_a_network_that_cannot_be_captured(runs: Path, tmp_path: Path) -> None:
    class Strange(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs.sum(dim=(1, 2, 3)).tolist()[0] + torch.zeros(len(inputs), 64)

    run = TrainedRun.load(runs / "adjusted")
    run.network.features = Strange()
    with pytest.raises(LongTailError, match=r"torch\.export cannot export .*--format safetensors"):
        export_run(run, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_data_from_python_have_no_preprocessing_to_export(tmp_path: Path) -> None:
    both = TensorDataset(torch.rand(30, 1, 8, 8), torch.tensor([0] * 20 + [1] * 10))
    config = recipe("own:mine", "ce", "sgd", epochs=1, model="resnet8").config()
    data = from_datasets("mine", both, both)
    Trainer(config, data=data, out=tmp_path / "run", progress=False).fit()
    run = TrainedRun.load(tmp_path / "run")
    for name in ("torch", "onnx"):
        with pytest.raises(DataError, match="created in Python"):
            export_run(run, tmp_path / name, format=name)
    path = export_run(run, tmp_path / "weights", format="safetensors")
    assert load_weights(path).preprocessing is None
    card = (path.parent / "README.md").read_text()
    assert "the training data were created in Python" in card


def test_settings_of_the_machine_stay_here() -> None:
    config = recipe("folder", "ce", "sgd", data_root="/home/me/secret", workers=7).config()
    values = portable_settings(config)
    assert values["data_root"] == "data"
    assert values["workers"] == recipe("folder", "ce", "sgd").config().workers != 7
    assert values["image_size"] == config.image_size


@pytest.mark.parametrize("name", ["onnx", "safetensors"])
def test_a_missing_package_names_the_extra(
    name: str, cosine: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Missing:
        def find_spec(self, module: str, path: object = None, target: object = None) -> None:
            if module.partition(".")[0] == name:
                raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    with pytest.raises(
        ImportError, match=rf'needs {name}: pip install "\.\[export\]" in a checkout'
    ):
        export_run(cosine, tmp_path / "model", format=name)
