"""Networks built from layer factories, so that one definition serves every kind of ensemble."""

from landscape_fast.models.resnet import ResNet, resnet20, wrn_28_10
from landscape_fast.models.small import MLP, LeNet, MediumCNN, SmallCNN
from landscape_fast.models.tabm import TabM

__all__ = ["LeNet", "MLP", "MediumCNN", "ResNet", "SmallCNN", "TabM", "resnet20", "wrn_28_10"]
