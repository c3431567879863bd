"""A small classification problem, and networks for it, shared by the tests of this folder."""

import torch
from torch import nn

from landscape_fast.methods import TrainConfig
from landscape_fast.nn import BatchEnsembleLinear

MEMBERS = 3
CONFIG = TrainConfig(epochs=3, batch_size=16, lr=0.02, seed=5, warmup_epochs=1, weight_decay=0.01)
STEPS = 3 * 4  # of CONFIG on ROWS rows
ROWS = 50


def rows():
    """Three noisy classes in the plane; the same rows every time."""
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(ROWS) % 3
    centres = torch.tensor([[2.0, 0.0], [-1.0, 2.0], [-1.0, -2.0]])
    return centres[y] + 0.7 * torch.randn(ROWS, 2, generator=generator), y


def plain():
    """Dropout, so that a run also depends on the random state in the middle of an epoch."""
    return nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def batch_ensemble():
    signs = {"members": MEMBERS, "r_init": "random_sign", "s_init": "random_sign"}
    return nn.Sequential(
        BatchEnsembleLinear(2, 8, **signs),
        nn.ReLU(),
        nn.Dropout(0.3),
        BatchEnsembleLinear(8, 3, **signs),
    )
