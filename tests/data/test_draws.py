"""The random numbers of images: their distributions, and that they belong to the image."""

import math

import pytest
import torch

from landscape_fast.data._draws import DIRECTIONS, Draws, _mixed

RARE = 1e-6  # the probability of a worse fit that we call a misfit; seeds are fixed
INDEX = torch.arange(500)


def fits(counts, probabilities=None):
    """Chi-square: the probability of counts that fit worse."""
    stats = pytest.importorskip("scipy.stats")
    counts = torch.as_tensor(counts).double()
    expected = torch.full_like(counts, 1 / len(counts)) if probabilities is None else probabilities
    expected = torch.as_tensor(expected).double() * counts.sum()
    return stats.chisquare(counts.numpy(), expected.numpy()).pvalue > RARE


def test_every_byte_of_the_bits_is_uniform():
    bits = Draws(3, "a", INDEX).bits(400)
    assert bits.min() >= 0 and bits.max() < 2**32
    for shift in (0, 8, 16, 24):
        assert fits(torch.bincount((bits >> shift & 255).flatten(), minlength=256))


def test_neighbours_know_nothing_of_each_other():
    """Numbers of one image, of neighbouring images, seeds and purposes, pair by pair."""
    first = Draws(3, "a", INDEX).bits(400) >> 28
    others = {
        "pixel": first.roll(1, 1),
        "image": first.roll(1, 0),
        "seed": Draws(4, "a", INDEX).bits(400) >> 28,
        "far seed": Draws(3 + 2**32, "a", INDEX).bits(400) >> 28,
        "purpose": Draws(3, "b", INDEX).bits(400) >> 28,
        "far image": Draws(3, "a", INDEX + 2**32).bits(400) >> 28,
    }
    for name, other in others.items():
        assert fits(torch.bincount((first * 16 + other).flatten(), minlength=256)), name


def test_no_two_images_share_their_numbers():
    """Of 200,000 images with 16 numbers each, about 1,200 pairs share one, but none shares two."""
    count = 200_000
    values, order = Draws(0, "a", torch.arange(count)).bits(16).flatten().sort()
    again = (values[1:] == values[:-1]).nonzero()[:, 0]
    pairs = torch.stack([order[again], order[again + 1]]).div(16, rounding_mode="floor")
    expected = len(values) ** 2 / 2**33
    assert abs(len(again) - expected) < 6 * math.sqrt(expected)
    assert len((pairs.amin(0) * count + pairs.amax(0)).unique()) == len(again)


def test_numbers_belong_to_the_image():
    whole = Draws(1, "a", INDEX)
    some = INDEX.flip(0)[::7]
    part = Draws(1, "a", some)
    assert (part.count, part.device) == (len(some), some.device)
    for draw in ("uniform", "normal"):
        assert torch.equal(getattr(whole, draw)(2, 5)[some], getattr(part, draw)(2, 5))
    assert torch.equal(whole.below(10)[some], part.below(10))
    assert torch.equal(whole.bits(3)[some], part.bits(3))
    assert torch.equal(Draws(1, "a", INDEX).bits(10)[:, 4:], skipped(Draws(1, "a", INDEX), 4, 6))


def skipped(draws, first, then):
    draws.bits(first)
    return draws.bits(then)


def test_the_hash_is_a_bijection_and_the_same_for_ints():
    x = torch.arange(1 << 20) << 12
    assert len(_mixed(x).unique()) == len(x)
    assert [_mixed(int(v)) for v in x[::100_000]] == _mixed(x[::100_000]).tolist()


def test_uniform():
    u = Draws(0, "a", INDEX).uniform(400)
    assert u.dtype == torch.float32 and 0 <= u.min() and u.max() < 1
    assert torch.equal(u * 2**24, (u * 2**24).round())
    assert fits(torch.histc(u, 100, 0, 1))


def test_normal():
    stats = pytest.importorskip("scipy.stats")
    z = Draws(0, "a", INDEX).normal(400)
    edges = torch.tensor(stats.norm.ppf(torch.arange(1, 100) / 100), dtype=torch.float32)
    assert fits(torch.bincount(torch.bucketize(z.flatten(), edges), minlength=100))
    assert z.abs().max() < 4.4  # the outermost of 65,536 quantiles
    count = z.numel()
    assert abs(z.double().mean()) < 5 / count**0.5
    assert abs(z.double().var() - 1) < 5 * (2 / count) ** 0.5


@pytest.mark.parametrize("top", [50, 500])
@pytest.mark.parametrize("level", [1, 100, 255])
def test_poisson(top, level):
    stats = pytest.importorskip("scipy.stats")
    x = torch.full((100, 500), level / 255)
    counts = Draws(0, "a", torch.arange(100)).poisson(x, top)
    assert torch.equal(counts, counts.round())
    law = stats.poisson(top * level / 255)
    low, high = int(law.ppf(1e-3)), int(law.ppf(1 - 1e-3))
    bins = torch.bincount((counts.long().flatten() - low).clamp(0, high - low))
    chances = [law.pmf(k) for k in range(low, high + 1)]
    chances[0], chances[-1] = law.cdf(low), law.sf(high - 1)
    assert fits(bins, chances)


def test_poisson_of_nothing_is_nothing():
    assert not Draws(0, "a", INDEX).poisson(torch.zeros(500, 100), 500).any()


def test_below():
    assert fits(torch.bincount(Draws(0, "a", torch.arange(100_000)).below(5), minlength=5))
    assert Draws(0, "a", torch.arange(100_000)).below(DIRECTIONS).max() == DIRECTIONS - 1
