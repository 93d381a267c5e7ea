"""The networks of timm, named ``timm:NAME``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from fastsam.extras import requires_extra
from fastsam.longtail.data.normalization import Normalization
from fastsam.longtail.errors import UsageError, unknown
from fastsam.longtail.models.base import MODELS, Model
from fastsam.longtail.models.blocks import block_depths
from fastsam.longtail.models.pretrained import DEFAULT, PretrainedSettings, downloading
from fastsam.longtail.seeds import global_seed
from fastsam.longtail.weight_files import is_file, read_file, state_dict_in

TIMM = "timm:"


def _timm(name: str) -> Any:
    """Import timm, and check that it has the network ``name``."""
    with requires_extra("longtail", f"timm:{name}"):
        timm = import_module("timm")
    if not timm.is_model(name):
        raise UsageError(f"timm has no network {name!r}; timm.list_models() lists them")
    return timm


class TimmFeatures(nn.Module):
    """A timm network without its classifier, with random initial weights.

    Args:
        name: name in timm.
        channels: channels of the input images.
    """

    def __init__(self, name: str, channels: int) -> None:
        super().__init__()
        timm = _timm(name)
        self.network = timm.create_model(name, num_classes=0, in_chans=channels)
        # Some networks end with a hidden layer, whose width differs from num_features.
        width = getattr(self.network, "head_hidden_size", None)
        self.out_features: int = width or self.network.num_features

    def forward(self, inputs: Tensor) -> Tensor:
        """Map images ``[B, channels, H, W]`` to features ``[B, out_features]``."""
        features: Tensor = self.network(inputs)
        return features

    def layer_depths(self) -> dict[str, int]:
        """Return the depths of timm's own layer-wise decay; see :func:`layer_depths`."""
        matcher = getattr(self.network, "group_matcher", None)
        if matcher is None:
            depths = block_depths(self.network)
            head = depths.pop("")
        else:
            classifier = self.network.pretrained_cfg.get("classifier") or "head"
            first = classifier if isinstance(classifier, str) else classifier[0]
            named = [*self.network.named_parameters(), (f"{first}.weight", None)]
            whole = SimpleNamespace(named_parameters=lambda: named)
            grouped = import_module("timm.models").group_parameters
            depths = grouped(whole, matcher(coarse=False), reverse=True)
            head = depths.pop(named[-1][0])
        return {**{f"network.{name}": depth for name, depth in depths.items()}, "": head}


def _build(name: str, settings: object, channels: int) -> TimmFeatures:
    return TimmFeatures(name, channels)


def _tagged(name: str, pretrained: str) -> str:
    """Return the name in timm of a network with the pretrained weights that a setting names.

    Raises:
        UsageError: if timm has no such weights.
    """
    timm, (base, _, tag) = _timm(name), name.partition(".")
    tags = [known.partition(".")[2] for known in timm.list_models(f"{base}.*", pretrained=True)]
    if not tags:
        raise UsageError(
            f"timm has no pretrained weights of {base}; pass a file, or omit pretrained"
        )
    if pretrained != DEFAULT:
        tag = pretrained
    if tag and tag not in tags:
        raise unknown(f"pretrained weights of timm:{base}", tag, [DEFAULT, *tags])
    return f"{base}.{tag}" if tag else base


def _weights(name: str, settings: PretrainedSettings) -> Mapping[str, Tensor]:
    chosen = settings.pretrained or DEFAULT
    if is_file(chosen):
        return _of_file(name, chosen)
    tagged = _tagged(name, chosen)
    with downloading(f"the weights {tagged} of timm"), global_seed(0):
        network = _timm(name).create_model(tagged, pretrained=True, num_classes=0)
    weights: Mapping[str, Tensor] = network.state_dict()
    return weights


def _of_file(name: str, path: str) -> Mapping[str, Tensor]:
    """Read a state dict, and convert it as timm does: from an original format, or to another image size."""
    weights: Mapping[str, Tensor] = state_dict_in(read_file(path), path)
    timm = _timm(name)
    made_by = sys.modules[timm.model_entrypoint(name.partition(".")[0]).__module__]
    convert = getattr(made_by, "checkpoint_filter_fn", None)
    if convert is None or any(known.startswith("features.") for known in weights):
        return weights  # those of a run have the network's names and shapes
    with global_seed(0):
        network = timm.create_model(name, num_classes=0)
    try:
        converted: Mapping[str, Tensor] = convert(dict(weights), network)
    except Exception:  # not weights of this network, which the caller reports
        return weights
    return converted


def _normalization(name: str, settings: PretrainedSettings) -> Normalization:
    chosen = settings.pretrained or DEFAULT
    tagged = name if is_file(chosen) else _tagged(name, chosen)
    stored = import_module("timm.models").get_pretrained_cfg(tagged)
    return Normalization(tuple(stored.mean), tuple(stored.std))


def _model(name: str) -> Model:
    short = name.removeprefix(TIMM)
    return Model(
        name=name,
        build=partial(_build, short),
        weights=partial(_weights, short),
        normalization=partial(_normalization, short),
        settings=PretrainedSettings,
        summary="timm network",
    )


MODELS.add_family(TIMM, _model)
