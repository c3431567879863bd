"""Images that a network does not know: what is kept of the known ones, and what is fitted."""

import pytest
import torch

from landscape_fast.data import Dataset, as_ood, inverted, noise_like, patch_shuffled


def images(n=6, c=3, h=32, w=24):
    return torch.rand(n, c, h, w, generator=torch.Generator().manual_seed(0))


def test_inverted():
    x = images()
    assert torch.equal(inverted(x), 1 - x)
    assert (inverted(inverted(x)) - x).abs().max() <= 2.0**-24


@pytest.mark.parametrize("patches", [1, 2, 4, 8])
def test_patches_move_as_they_are(patches):
    x = images()
    made = patch_shuffled(x, patches, seed=1)
    h, w = 32 // patches, 24 // patches

    def cut(image):
        return [image[:, i : i + h, j : j + w] for i in range(0, 32, h) for j in range(0, 24, w)]

    for old, new in zip(x, made, strict=True):
        there = sorted(patch.flatten().tolist() for patch in cut(old))
        assert there == sorted(patch.flatten().tolist() for patch in cut(new))
    assert torch.equal(made, x) == (patches == 1)


def test_all_orders_are_equally_likely():
    x = torch.tensor([0.0, 0.1, 0.2, 0.3]).view(1, 1, 2, 2).repeat_interleave(4, 2)
    x = x.repeat_interleave(4, 3).expand(24_000, -1, -1, -1)
    made = (patch_shuffled(x, 2)[:, 0, ::4, ::4].flatten(1) * 10).round().long()
    code = (made * torch.tensor([64, 16, 4, 1])).sum(1)
    _, counts = code.unique(return_counts=True)
    assert len(counts) == 24 and (counts - 1000).abs().max() < 5 * 1000**0.5


@pytest.mark.parametrize("make", [patch_shuffled, noise_like])
def test_an_image_has_the_same_bits_in_any_company(make):
    x, some = images(), torch.tensor([4, 1])
    whole = make(x, seed=2)
    assert torch.equal(make(x[some], seed=2, index=some), whole[some])
    assert not torch.equal(make(x, seed=3), whole)
    assert make(x[:0]).shape == x[:0].shape


def test_noise_is_uniform():
    x = noise_like(torch.zeros(100, 3, 16, 16))
    assert 0 <= x.min() and x.max() < 1
    counts = torch.histc(x, 50, 0, 1)
    assert (counts - x.numel() / 50).abs().max() < 5 * (x.numel() / 50) ** 0.5
    assert (x[1:] - x[:-1]).abs().mean() > 0.3  # images differ


def test_channels_and_sizes_are_fitted():
    grey = images(c=1, h=28, w=28)
    like = torch.zeros(1, 3, 32, 32)
    made = as_ood(grey, like)
    assert made.shape == (6, 3, 32, 32) and made.is_contiguous()
    assert torch.equal(made[:, 0], made[:, 2]) and 0 <= made.min() and made.max() <= 1
    assert torch.equal(as_ood(images(), torch.zeros(2, 3, 32, 24)), images())
    colour = as_ood(images(), torch.zeros(1, 1, 32, 24))
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    assert (colour - (images() * weights).sum(1, keepdim=True)).abs().max() < 4 * 2.0**-24
    y = torch.zeros(1, dtype=torch.int64)
    data = Dataset(like, y, like, y, ("a",), "one")
    assert torch.equal(as_ood(grey, data), made)


def test_shrinking_averages():
    """Each new pixel of a half-sized image is the triangle-weighted mean of 4 x 4 old ones."""
    x = images(1, 1, 8, 8)
    made = as_ood(x, torch.zeros(1, 1, 4, 4))
    side = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    truth = (x[0, 0, 1:5, 3:7] * torch.outer(side, side)).sum()
    assert abs(made[0, 0, 1, 2] - truth) < 16 * 2.0**-24
    small = as_ood(images(1, 1, 4, 4), x)  # from less than 8 pixels
    assert small.shape == x.shape


def test_refusals():
    x = images()
    with pytest.raises(ValueError, match="patches must be a divisor of both sides, 32 and 24; got"):
        patch_shuffled(x, 3)
    with pytest.raises(ValueError, match=r"inverted: images must be in \[0, 1\]"):
        inverted(x * 2)
    with pytest.raises(ValueError, match="like must be a Dataset or images .* got tuple"):
        as_ood(x, (3, 32, 32))
    with pytest.raises(ValueError, match="like must be images of 1 or 3 channels; got 2"):
        as_ood(x, torch.zeros(1, 2, 8, 8))
    with pytest.raises(ValueError, match="noise_like: index must be"):
        noise_like(x, index=torch.zeros(2).long())
