"""The Gaussian of SWAG against moments in float64 and against what its samples should be."""

import math

import pytest
import torch
from torch import nn

from landscape_fast.methods import Swag
from landscape_fast.nn.coefficients import swag_low_rank
from landscape_fast.testing import assert_as_exact

RANK, COUNT = 12, 15


def network():
    return nn.Sequential(nn.Linear(7, 4), nn.Linear(4, 3))


def snapshots(count=COUNT, spread=0.3, centre=1.0, seed=0):
    """[n, elements], without pads, correlated over the elements."""
    generator = torch.Generator().manual_seed(seed)
    P = sum(p.numel() for p in network().parameters())
    mixing = torch.randn(P, P, generator=generator) / math.sqrt(P)
    return centre + spread * torch.randn(count, P, generator=generator) @ mixing


def collected(vectors, rank=RANK):
    swag = Swag(network(), rank)
    for w in vectors:
        swag.collect(w)
    return swag


def real(swag, w):
    """[..., P] without the pads."""
    return w[..., swag.layout.mask.bool()]


def test_moments_are_those_in_float64():
    w = snapshots()
    swag, w64 = collected(w), snapshots().double()
    assert_as_exact("mean", real(swag, swag.mean), w.mean(0), w64.mean(0))
    variance = w64.var(0, correction=0)
    assert_as_exact("variance", real(swag, swag.variance()), variance.float(), variance)


def test_small_variances_around_large_weights_do_not_cancel():
    """Deviations of 1e-4 around 1: a difference of squares in float32 loses most of them."""
    w = snapshots(30, spread=1e-4)
    w64 = w.double()
    truth = w64.var(0, correction=0)
    swag = collected(w)
    assert_as_exact("variance", real(swag, swag.variance()), truth.float(), truth)
    naive = (w.square().mean(0) - w.mean(0).square()).clamp_min(0)
    assert float(((naive - truth).abs() > truth / 2).float().mean()) > 0.5


def test_deviations_are_from_the_mean_of_their_time_and_the_ring_keeps_the_last():
    w = snapshots()
    swag = collected(w)
    w64 = w.double()
    for n in range(COUNT - RANK, COUNT):
        truth = w64[n] - w64[: n + 1].mean(0)
        place = n % RANK
        got = real(swag, swag.deviations()[place])
        assert_as_exact(f"deviation {n}", got, truth.float(), truth)
    few = collected(w[:5])
    assert few.held == 5 and few.deviations().shape == (5, few.layout.P)


def test_the_ring_and_the_moments_are_never_allocated_again():
    swag = Swag(network(), 3)
    before = [buffer.data_ptr() for buffer in swag.buffers()]
    for w in snapshots():
        swag.collect(w)
    assert [buffer.data_ptr() for buffer in swag.buffers()] == before


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("scale", [0.25, 0.5, 4.0])
def test_samples_have_the_covariance_they_should(block, scale):
    """2000 draws: their quadratic forms are below the 95 % quantile of chi-square for 95 % of them,
    within twice the standard error of that count. As the authors test their own."""
    stats = pytest.importorskip("scipy.stats")
    swag = collected(snapshots())
    dev = real(swag, swag.deviations()).double()
    low = dev.T @ dev / (RANK - 1)
    if block:  # tensors are independent
        sizes = [p.numel() for p in network().parameters()]
        low = torch.block_diag(
            *[low[a : a + n, a : a + n] for a, n in zip(_starts(sizes), sizes, strict=True)]
        )
    covariance = scale * (low + real(swag, swag.variance()).double().diag())
    draws = swag.sample(2000, seed=3, scale=scale, block=block)
    assert float(draws[:, ~swag.layout.mask.bool()].abs().max()) == 0
    gaps = real(swag, draws).double() - real(swag, swag.mean).double()
    forms = (gaps @ covariance.inverse() * gaps).sum(1)
    quantile = stats.chi2(df=len(covariance)).ppf(0.95)
    assert 1880 <= int((forms < quantile).sum()) <= 1920
    # mean and variance of chi-square, within 4 standard errors
    P = len(covariance)
    assert abs(float(forms.mean()) - P) < 4 * math.sqrt(2 * P / 2000)
    wrong = covariance * 1.3  # the test sees a wrong scale
    inside = ((gaps @ wrong.inverse() * gaps).sum(1) < quantile).sum()
    assert not 1880 <= int(inside) <= 1920


def _starts(sizes):
    return [sum(sizes[:i]) for i in range(len(sizes))]


def test_one_draw_of_the_deviations_is_common_to_all_tensors_unless_drawn_in_blocks():
    """Snapshots on a line: full samples lie on it, tensor by tensor they do not."""
    direction = snapshots(1, centre=0.0)[0]
    steps = torch.linspace(-1, 1, COUNT)[:, None]
    swag = collected(steps * direction)
    swag.moments[1].zero_()  # no diagonal
    place = real(swag, swag.sample(50, seed=1)) / direction
    torch.testing.assert_close(place, place[:, :1].expand_as(place), rtol=1e-4, atol=1e-4)
    place = real(swag, swag.sample(50, seed=1, block=True)) / direction
    assert float((place - place[:, :1]).abs().max()) > 0.1


def test_the_low_rank_part_is_a_combination_of_the_snapshots():
    """Given the numbers drawn, a sample is the row of `swag_low_rank` times all snapshots."""
    w = snapshots(RANK)
    swag = collected(w)
    swag.moments[1].zero_()
    sample = real(swag, swag.sample(1, seed=4, scale=0.5))[0].double()
    dev = real(swag, swag.deviations()).double()
    gap = sample - w.double().mean(0)
    z = torch.linalg.pinv(dev.T) @ gap * math.sqrt(2 * (RANK - 1))
    row = swag_low_rank(z, RANK, around="running")
    torch.testing.assert_close(row @ w.double(), sample, rtol=1e-5, atol=1e-5)


def test_scale_multiplies_the_covariance():
    swag = collected(snapshots())
    for options in ({}, {"block": True}, {"low_rank": False}):
        one = swag.sample(3, seed=2, scale=1.0, **options) - swag.mean
        quarter = swag.sample(3, seed=2, scale=0.25, **options) - swag.mean
        torch.testing.assert_close(quarter, one / 2, rtol=1e-4, atol=1e-6)
    still = swag.sample(2, seed=2, scale=0.0)
    torch.testing.assert_close(still, swag.mean.expand(2, -1), rtol=0, atol=0)


def test_a_sample_depends_on_seed_and_number_only():
    swag = collected(snapshots())
    for block in (False, True):
        many = swag.sample(5, seed=9, block=block)
        torch.testing.assert_close(swag.sample(2, 9, first=3, block=block), many[3:])
        assert not torch.allclose(swag.sample(5, seed=10, block=block), many)
    assert len({tuple(row.tolist()) for row in many}) == 5


def test_no_dtype_rounds_the_moments():
    swag = collected(snapshots())
    expected = swag.sample(2, seed=0)
    moved = swag.to(torch.bfloat16).half().to("meta").to("meta", torch.float32)
    assert moved is swag and swag.moments.is_meta and swag.moments.dtype == torch.float64
    assert swag.anchors.dtype == next(swag.model.parameters()).dtype == torch.float32
    swag = collected(snapshots()).bfloat16()
    torch.testing.assert_close(swag.sample(2, seed=0), expected, rtol=0, atol=0)


def test_without_low_rank_it_is_the_diagonal():
    swag = collected(snapshots(), rank=0)
    assert swag.anchors.shape[0] == 1 and swag.held == 0
    draws = real(swag, swag.sample(4000, seed=0, scale=1.0, low_rank=False)).double()
    ratio = draws.var(0) / real(swag, swag.variance()).double()
    # 43 variances of 4000 draws, each within 5 standard errors
    assert float((ratio - 1).abs().max()) < 5 * math.sqrt(2 / 4000)


def test_state_and_networks():
    swag = collected(snapshots())
    twin = Swag(network(), RANK)
    twin.load_state_dict(swag.state_dict())
    assert torch.equal(twin.sample(2, seed=1), swag.sample(2, seed=1)) and twin.count == COUNT
    ensemble = swag.ensemble(3, seed=5, scale=0.25)
    weights = swag.sample(3, seed=5, scale=0.25)
    x = torch.randn(6, 7, generator=torch.Generator().manual_seed(0))
    for member, w in zip(ensemble.members, weights, strict=True):
        assert torch.equal(swag.layout.flatten(member), w)
        assert torch.equal(member(x), torch.func.functional_call(swag.model, swag.views(w), x))
        assert all(p.requires_grad for p in member.parameters())
    assert not ensemble.training
    frozen = network()
    frozen[0].weight.requires_grad_(False)
    made = Swag(frozen, RANK).network(swag.mean)
    assert [p.requires_grad for p in made.parameters()] == [False, True, True, True]


@pytest.mark.gpu
@pytest.mark.parametrize("block", [False, True])
def test_a_gpu_collects_and_draws_the_same(block):
    ours = collected(snapshots())
    theirs = Swag(network().cuda(), RANK)
    for w in snapshots():
        theirs.collect(w.cuda())
    torch.testing.assert_close(theirs.moments.cpu(), ours.moments)
    drawn = theirs.sample(4, seed=1, block=block)
    torch.testing.assert_close(drawn.cpu(), ours.sample(4, seed=1, block=block))


def test_wrong_use_is_refused():
    swag = Swag(network())
    for rank in (1, -1, 2.0):
        with pytest.raises(ValueError, match="Swag: rank must be an integer of at least 2, or 0"):
            Swag(network(), rank)
    with pytest.raises(ValueError, match="Swag.sample: networks collected must be at least 2"):
        swag.sample(1, seed=0)
    swag = collected(snapshots(), rank=0)
    cases = [
        ((1, 0), {}, "low_rank must be False with rank 0; got True"),
        ((0, 0), {}, "count must be an integer of at least 1; got 0"),
        ((1, -1), {}, "seed must be a non-negative integer; got -1"),
        ((1, 0), {"first": -1}, "first must be an integer of at least 0; got -1"),
        ((1, 0), {"scale": -0.5}, "scale must be a number of at least 0; got -0.5"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(ValueError, match=f"Swag.sample: {message}"):
            swag.sample(*arguments, **options)
