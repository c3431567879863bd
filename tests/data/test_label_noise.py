"""How many labels are wrong, which, and that test rows stay clean."""

import math

import pytest
import torch

from landscape_fast.data import Dataset
from landscape_fast.data.label_noise import KINDS, noisy_labels, with_label_noise

Y = torch.arange(20000) % 10


@pytest.mark.parametrize("kind, wrong", [("including_true", 0.18), ("excluding_true", 0.2)])
def test_the_share_of_wrong_labels(kind, wrong):
    noisy = noisy_labels(Y, 0.2, 10, seed=3, kind=kind)
    changed = noisy != Y
    drawn = 0.2 * len(Y)
    error = math.sqrt(drawn * (wrong / 0.2) * (1 - wrong / 0.2))  # binomial standard deviation
    assert abs(changed.sum() - wrong * len(Y)) <= 5 * error
    counts = torch.bincount(noisy[changed], minlength=10)
    mean = changed.sum() / 10
    assert (counts - mean).abs().max() < 5 * mean.sqrt()  # uniform over the classes
    shift = (noisy - Y)[changed] % 10
    assert (torch.bincount(shift, minlength=10)[1:] - changed.sum() / 9).abs().max() < 5 * mean**0.5


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_and_larger_fractions_hold_smaller_ones(kind):
    some, more = (noisy_labels(Y, f, 10, seed=1, kind=kind) for f in (0.1, 0.3))
    assert torch.equal(some, noisy_labels(Y, 0.1, 10, seed=1, kind=kind))
    assert not torch.equal(some, noisy_labels(Y, 0.1, 10, seed=2, kind=kind))
    changed = some != Y
    assert torch.equal(some[changed], more[changed])
    assert torch.equal(noisy_labels(Y, 0.0, 10, kind=kind), Y)


def test_test_rows_stay_clean():
    x = torch.zeros(20, 1, 1, 1)
    y = torch.arange(20) % 2
    noisy = with_label_noise(Dataset(x, y, x, y, ("a", "b"), "two"), 0.5, kind="excluding_true")
    assert (noisy.train_y != y).sum() == 10 and torch.equal(noisy.test_y, y)


def test_refusals():
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\]; got 1.5"):
        noisy_labels(Y, 1.5, 10)
    with pytest.raises(ValueError, match="kind must be one of"):
        noisy_labels(Y, 0.5, 10, kind="flip")
    with pytest.raises(
        ValueError, match="classes must be at least 1 and above all labels; got 9 w"
    ):
        noisy_labels(Y, 0.5, 9)
    with pytest.raises(ValueError, match="classes must be at least 2 and above all labels; got 1"):
        noisy_labels(Y[:0], 0.5, 1, kind="excluding_true")
