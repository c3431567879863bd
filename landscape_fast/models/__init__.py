"""Networks built from layer factories, so that one definition serves every kind of ensemble."""

from landscape_fast.models.resnet import ResNet, resnet20, wrn_28_10
from landscape_fast.models.small import MLP, LeNet, MediumCNN, SmallCNN

__all__ = ["MLP", "LeNet", "MediumCNN", "ResNet", "SmallCNN", "resnet20", "wrn_28_10"]
