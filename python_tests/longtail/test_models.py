"""Networks: sizes, shortcuts, heads and initialization."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastsam.longtail import Trainer, recipe
from fastsam.longtail.errors import UsageError
from fastsam.longtail.models import (
    HEADS,
    CosineHead,
    DisAlignHead,
    ScaledCosineHead,
    ScaledHead,
    build_model,
)
from fastsam.longtail.trained import TrainedRun


@pytest.mark.parametrize(("millions", "layers"), [(0.27, 20), (0.46, 32), (0.66, 44), (0.85, 56)])
def test_published_sizes(millions: float, layers: int) -> None:
    model = build_model(f"resnet{layers}", 10)
    count = sum(p.numel() for p in model.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.01)
    weighted = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(weighted) == layers  # option A: shortcuts have no weights


def test_shortcut_subsamples_and_pads_with_zeros() -> None:
    model = build_model("resnet8", 3, channels=1)
    block = next(
        m for m in model.modules() if getattr(m, "stride", None) == 2 and hasattr(m, "bn2")
    )
    assert isinstance(block.bn2, nn.BatchNorm2d)
    nn.init.zeros_(block.bn2.weight)  # zero the residual branch
    x = torch.rand(2, 16, 6, 6)
    y = block.eval()(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_shapes_and_seed(head: str) -> None:
    state = torch.random.get_rng_state()
    model = build_model("resnet8", 7, head=head, channels=1, seed=3)  # type: ignore[arg-type]
    assert torch.equal(state, torch.random.get_rng_state())
    assert model(torch.rand(4, 1, 8, 8)).shape == (4, 7)
    assert model.features(torch.rand(4, 1, 8, 8)).shape == (4, 64)
    same = build_model("resnet8", 7, head=head, channels=1, seed=3)  # type: ignore[arg-type]
    other = build_model("resnet8", 7, head=head, channels=1, seed=4)  # type: ignore[arg-type]
    pairs = list(zip(model.parameters(), same.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)


def test_cosine_logits_are_cosines() -> None:
    head = CosineHead(5, 3).double()
    features = torch.randn(4, 5, dtype=torch.float64)
    expected = [
        [float(f @ w / (f.norm() * w.norm())) for w in head.weight.detach().T] for f in features
    ]
    assert torch.allclose(head(features), torch.tensor(expected, dtype=torch.float64))
    assert torch.allclose(head.weight.norm(dim=0), torch.ones(3, dtype=torch.float64), atol=1e-3)


@pytest.mark.parametrize("head", ["linear", "cosine"])
@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", "resnet32-w64", "resnet34-w64"])
def test_other_families_take_any_head(name: str, head: str) -> None:
    model = build_model(name, 7, head=head).eval()  # type: ignore[arg-type]
    images = torch.rand(2, 3, 32, 32)
    features = model.features(images)
    assert features.shape == (2, model.feature_width)
    assert torch.equal(model(images), model.head(features))
    assert model(images).shape == (2, 7)


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "ghostnet_050"])
def test_networks_of_timm(name: str) -> None:
    """The last two have a hidden layer after pooling."""
    pytest.importorskip("timm")
    model = build_model(f"timm:{name}", 7, head="cosine", channels=1).eval()
    assert model(torch.rand(2, 1, 64, 64)).shape == (2, 7)
    with pytest.raises(UsageError, match="timm has no network 'nothing'"):
        build_model("timm:nothing", 7)


def test_unknown_names_list_the_valid_ones() -> None:
    with pytest.raises(UsageError, match="resnet20, resnet32, resnet32-w64"):
        build_model("resnet9", 10)
    with pytest.raises(UsageError, match="cosine, disalign, linear, lws, scaled-cosine"):
        build_model("resnet8", 10, head="cos")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="num_classes must be at least 2"):
        build_model("resnet8", 1)


def inner(head: nn.Module) -> tuple[Tensor, Tensor]:
    """Return class vectors and biases of the linear head inside ``head``."""
    return head.get_parameter("linear.weight"), head.get_parameter("linear.bias")


def test_lws_multiplies_the_logits_of_a_frozen_head(seed: int) -> None:
    torch.manual_seed(seed)
    head = ScaledHead(nn.Linear(5, 3)).double()
    nn.init.normal_(head.scale)
    features = torch.randn(4, 5, dtype=torch.float64)
    (weight, bias), scale = inner(head), head.scale
    with torch.no_grad():
        rows = [[scale[c] * (f @ weight[c] + bias[c]) for c in range(3)] for f in features]
    found = head(features)
    assert torch.allclose(found, torch.tensor(rows, dtype=torch.float64))
    found[:, 1].sum().backward()
    assert scale.grad is not None
    assert torch.allclose(scale.grad[1], (features @ weight[1] + bias[1]).sum())
    assert weight.grad is None
    assert [n for n, p in ScaledHead(nn.Linear(5, 3), trains_vectors=True).named_parameters()] == [
        "scale",
        "linear.weight",
        "linear.bias",
    ]


def test_disalign_is_the_formula_and_its_gradient(seed: int) -> None:
    torch.manual_seed(seed)
    head = DisAlignHead(nn.Linear(5, 3)).double()
    for parameter in (head.scale, head.offset, *head.confidence.parameters()):
        nn.init.normal_(parameter)
    features = torch.randn(4, 5, dtype=torch.float64)
    weight, bias = inner(head)
    v, u = head.confidence.weight[0], head.confidence.bias[0]
    logits = features @ weight.T + bias
    sigma = 1 / (1 + (-(features @ v + u)).exp())[:, None]
    # The equations of the paper, whose factor is 1 + scale.
    aligned = (1 + head.scale) * logits + head.offset
    expected = sigma * aligned + (1 - sigma) * logits
    assert torch.allclose(head(features), expected)
    trained = [p for p in head.parameters() if p.requires_grad]
    target = torch.randn(4, 3, dtype=torch.float64)
    one = torch.autograd.grad((head(features) * target).sum(), trained)
    other = torch.autograd.grad((expected * target).sum(), trained)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b)
    assert sum(p.numel() for p in trained) == 2 * 3 + 5 + 1


@pytest.mark.parametrize(
    ("head", "scale"), [(CosineHead(5, 3), 1.0), (ScaledCosineHead(5, 3, scale=25.0), 25.0)]
)
def test_cosine_heads_are_the_formula_and_its_gradient(
    head: CosineHead, scale: float, seed: int
) -> None:
    torch.manual_seed(seed)
    weight = nn.init.normal_(head.double().weight)
    features = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    products = features @ weight
    lengths = features.square().sum(dim=1, keepdim=True) * weight.square().sum(dim=0)
    expected = scale * products / lengths.sqrt()
    found, target = head(features), torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(found, expected)
    one = torch.autograd.grad((found * target).sum(), (features, weight))
    other = torch.autograd.grad((expected * target).sum(), (features, weight))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", list(HEADS))
def test_a_head_takes_over_a_trained_linear_head(name: str) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 7)
    nn.init.normal_(linear.bias)
    take_over = HEADS[name].from_linear
    assert take_over is not None
    head = build_model("resnet8", 7, head=name).head
    missing, unexpected = head.load_state_dict(take_over(linear.state_dict()), strict=False)
    assert not unexpected
    assert {key.partition(".")[0] for key in missing} <= {"scale", "offset", "confidence"}
    features = torch.randn(9, 64)
    expected = linear(features)
    if name == "cosine":
        lengths = features.norm(dim=1)[:, None] * linear.weight.norm(dim=1)
        expected = (features @ linear.weight.T) / lengths
    elif name == "scaled-cosine":
        lengths = features.norm(dim=1)[:, None] * linear.weight.norm(dim=1)
        expected = 25 * (features @ linear.weight.T) / lengths
    elif name == "disalign":
        sigma = head.get_submodule("confidence")(features).sigmoid()
        expected = (1 + sigma) * expected
        nn.init.zeros_(head.get_parameter("scale"))
        torch.testing.assert_close(head(features), linear(features))
        nn.init.ones_(head.get_parameter("scale"))
    torch.testing.assert_close(head(features), expected)


@pytest.mark.parametrize("name", ["lws", "disalign"])
def test_only_the_adjustment_of_a_head_is_trained_and_a_stored_run_has_it(
    name: str, tmp_path: Path
) -> None:
    config = recipe("digits-lt", "ce-rw", "sam", head=name, weighting="power", epochs=1).config()
    run = Trainer(config, out=tmp_path, progress=False)
    before = {key: value.clone() for key, value in run.model.head.state_dict().items()}
    run.fit()
    for key, value in run.model.head.state_dict().items():
        assert torch.equal(value, before[key]) == key.startswith("linear."), key
    inputs = torch.rand(3, 1, 8, 8)
    stored = TrainedRun.load(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(stored.network(inputs), run.model.eval()(inputs))


def test_losses_name_the_heads_that_fit() -> None:
    with pytest.raises(UsageError, match=r"requires head='cosine', got 'lws'$"):
        recipe("digits-lt", "ldam", "sgd", head="lws").config()
    with pytest.raises(
        UsageError, match="got 'cosine'; other heads that fit: disalign, lws, scaled-cosine"
    ):
        recipe("digits-lt", "focal", "sgd", head="cosine").config()
    with pytest.raises(UsageError, match="lws_trains_vectors requires head lws"):
        recipe("digits-lt", "ce", "sgd", lws_trains_vectors=True).config()
