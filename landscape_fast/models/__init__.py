"""Networks built from layer factories, so that one definition serves every kind of ensemble."""

from landscape_fast.models.small import MLP, MediumCNN, SmallCNN

__all__ = ["MLP", "MediumCNN", "SmallCNN"]
