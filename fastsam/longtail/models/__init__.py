"""Networks. Each file defines and registers one family; :class:`Classifier` adds a head."""

from fastsam.longtail.models.base import (
    MODELS,
    Model,
    build_model,
    pretrained_normalization,
    register_model,
)
from fastsam.longtail.models.blocks import layer_depths
from fastsam.longtail.models.cifar_resnet import CifarResNet
from fastsam.longtail.models.classifier import Classifier, Outputs
from fastsam.longtail.models.heads import (
    HEADS,
    CosineHead,
    DisAlignHead,
    Head,
    HeadInit,
    ScaledCosineHead,
    ScaledHead,
    register_head,
)
from fastsam.longtail.models.timm_models import TIMM, TimmFeatures
from fastsam.longtail.models.torchvision_models import TorchvisionFeatures

__all__ = [
    "HEADS",
    "MODELS",
    "TIMM",
    "CifarResNet",
    "Classifier",
    "CosineHead",
    "DisAlignHead",
    "Head",
    "HeadInit",
    "Model",
    "Outputs",
    "ScaledCosineHead",
    "ScaledHead",
    "TimmFeatures",
    "TorchvisionFeatures",
    "build_model",
    "layer_depths",
    "pretrained_normalization",
    "register_head",
    "register_model",
]
