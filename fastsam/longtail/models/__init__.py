"""Networks. Each file defines and registers one family; :class:`Classifier` adds a head."""

from fastsam.longtail.models.base import MODELS, Model, build_model, register_model
from fastsam.longtail.models.cifar_resnet import CifarResNet
from fastsam.longtail.models.classifier import Classifier, Outputs
from fastsam.longtail.models.heads import (
    HEADS,
    CosineHead,
    DisAlignHead,
    Head,
    HeadInit,
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
    "ScaledHead",
    "TimmFeatures",
    "TorchvisionFeatures",
    "build_model",
    "register_head",
    "register_model",
]
