"""Networks: sizes, shortcuts, heads and initialization."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastsam.longtail.errors import UsageError
from fastsam.longtail.models import (
    CosineHead,
    build_model,
)


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
    with pytest.raises(UsageError, match="cosine, linear"):
        build_model("resnet8", 10, head="cos")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="num_classes must be at least 2"):
        build_model("resnet8", 1)
