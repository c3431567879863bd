"""Noise of CIFAR-10-C; each takes images [n, C, H, W] in [0, 1], parameters and `Draws`."""

import torch
from torch import Tensor

from landscape_fast.data._draws import Draws


def gaussian_noise(x: Tensor, deviation: float, draws: Draws) -> Tensor:
    """x + deviation * z, z standard normal."""
    return draws.normal(*x.shape[1:]).mul_(deviation).add_(x)


def shot_noise(x: Tensor, photons: float, draws: Draws) -> Tensor:
    """Photons are counted: Poisson(photons * x) / photons, x to the nearest multiple of 1/255."""
    return draws.poisson(x, photons).div_(photons)


def impulse_noise(x: Tensor, share: float, draws: Draws) -> Tensor:
    """A share of the values, each channel for itself, becomes 0 or 1."""
    u = draws.uniform(*x.shape[1:])
    black, white = x.new_zeros(()), x.new_ones(())
    return torch.where(u < share, torch.where(u < share / 2, black, white), x)


def speckle_noise(x: Tensor, deviation: float, draws: Draws) -> Tensor:
    """x * (1 + deviation * z), z standard normal."""
    return draws.normal(*x.shape[1:]).mul_(deviation).mul_(x).add_(x)
