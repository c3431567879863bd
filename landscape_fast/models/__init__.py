"""Networks built from layer factories, so that one definition serves every kind of ensemble."""

from landscape_fast.models.resnet import (
    ResNet,
    cresnet20,
    preresnet,
    resnet20,
    resnet50_v2,
    wrn_28_10,
)
from landscape_fast.models.small import MLP, LeNet, MediumCNN, SmallCNN
from landscape_fast.models.tabm import TabM
from landscape_fast.models.vgg import VGG, vgg16, vgg19

__all__ = [
    "LeNet",
    "MLP",
    "MediumCNN",
    "ResNet",
    "SmallCNN",
    "TabM",
    "VGG",
    "cresnet20",
    "preresnet",
    "resnet20",
    "resnet50_v2",
    "vgg16",
    "vgg19",
    "wrn_28_10",
]
