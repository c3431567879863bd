from functools import partial

import pytest
import torch

from landscape_fast.metrics import (
    adaptive_ece,
    calibration_error,
    classwise_ece,
    mce,
    reliability_bins,
)
from landscape_fast.metrics import calibration as page


def predictions(rows=400, classes=6, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    targets = torch.distributions.Categorical(logits=logits / 2).probs.cumsum(1)
    draw = torch.rand(rows, 1, generator=generator, dtype=torch.float64)
    return logits.softmax(1).to(dtype), (targets < draw).sum(1).clamp(max=classes - 1)


def by_rank(confidence, right, bins):
    """Equal mass in a loop: rank r is in bin floor(r * bins / N); no ties."""
    order = confidence.argsort()
    index = torch.arange(len(order)) * bins // len(order)
    parts = [order[index == b] for b in range(bins)]
    parts = [p for p in parts if len(p)]
    gaps = torch.stack([(right[p].double().mean() - confidence[p].mean()).abs() for p in parts])
    weights = torch.tensor([len(p) for p in parts]).double() / len(order)
    return gaps, weights


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
@pytest.mark.parametrize("bins", [1, 10, 15])
def test_equal_widths_are_those_of_torchmetrics(norm, bins):
    oracle = pytest.importorskip("torchmetrics.functional.classification")
    p, y = predictions()
    expected = oracle.multiclass_calibration_error(p, y, p.shape[1], n_bins=bins, norm=norm)
    expected = expected.double()  # which it rounded to float32
    found = calibration_error(p, y, bins, norm=norm)
    torch.testing.assert_close(found, expected, rtol=1.3e-6, atol=1e-7)
    if norm == "max":
        assert torch.equal(mce(p, y, bins), found)
    if norm == "l1":
        assert torch.equal(calibration_error(p, y, bins), reliability_bins(p, y, bins).ece)


@pytest.mark.parametrize("bins", [1, 3, 15, 400, 1000])  # 1000 bins for 400 rows: most are empty
def test_equal_mass_is_by_rank(bins):
    p, y = predictions()
    confidence, labels = p.max(1)
    gaps, weights = by_rank(confidence, labels == y, bins)
    torch.testing.assert_close(adaptive_ece(p, y, bins), (gaps * weights).sum())
    torch.testing.assert_close(mce(p, y, bins, equal_mass=True), gaps.max())
    l2 = calibration_error(p, y, bins, norm="l2", equal_mass=True)
    torch.testing.assert_close(l2, (gaps.square() * weights).sum().sqrt())
    found = reliability_bins(p, y, bins, equal_mass=True)
    assert found.counts[found.counts > 0].tolist() == (weights * 400).round().long().tolist()
    assert ((found.edges[1:] - found.edges[:-1]) >= 0).all()


def test_ties_share_a_bin_whatever_the_order_of_the_rows():
    p, y = predictions()
    p = (p * 8).round() / 8  # some values many times over
    p = torch.cat([p, torch.tensor([[0.5, 0.5, 0, 0, 0, 0]]).double().repeat(100, 1)])
    y = torch.cat([y, torch.zeros(100).long()])
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        order = torch.randperm(len(p), generator=generator)
        torch.testing.assert_close(adaptive_ece(p[order], y[order]), adaptive_ece(p, y))
        assert torch.equal(
            reliability_bins(p[order], y[order], equal_mass=True).counts,
            reliability_bins(p, y, equal_mass=True).counts,
        )


@pytest.mark.parametrize("equal_mass", [False, True])
@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
def test_constant_confidence_is_one_bin(norm, equal_mass):
    p = torch.tensor([[0.75, 0.25]]).repeat(8, 1)
    y = torch.tensor([0] * 4 + [1] * 4)
    assert float(calibration_error(p, y, 15, norm=norm, equal_mass=equal_mass)) == 0.25


@pytest.mark.parametrize("bins", [1, 15])
def test_every_class_is_a_binary_problem(bins):
    oracle = pytest.importorskip("torchmetrics.functional.classification")
    p, y = predictions()
    each = [
        oracle.binary_calibration_error(p[:, c].contiguous(), (y == c).long(), bins)
        for c in range(6)
    ]
    torch.testing.assert_close(classwise_ece(p, y, bins), torch.stack(each).mean())


def test_every_class_has_bins_of_its_own_mass():
    p, y = predictions()
    each = []
    for c in range(6):
        gaps, weights = by_rank(p[:, c], y == c, 15)
        each.append((gaps * weights).sum())
    torch.testing.assert_close(classwise_ece(p, y, equal_mass=True), torch.stack(each).mean())


@pytest.mark.parametrize("entries", [1, 800, 900])  # one column at a time, two, two and a bit
def test_columns_come_some_at_a_time(monkeypatch, entries):
    p, y = predictions(classes=5)
    whole = page.classwise_gaps(p, y, 15)
    monkeypatch.setattr(page, "ENTRIES", entries)
    assert torch.equal(page.classwise_gaps(p, y, 15), whole)


def test_a_class_that_never_occurs_counts():
    p = torch.tensor([[0.5, 0.25, 0.25]]).repeat(4, 1)
    found = classwise_ece(p, torch.tensor([0, 0, 1, 1]))
    assert float(found) == pytest.approx((0 + 0.25 + 0.25) / 3)


def test_one_class():
    p, y = torch.ones(5, 1), torch.zeros(5, dtype=torch.int64)
    for found in (adaptive_ece(p, y), mce(p, y), classwise_ece(p, y)):
        assert found == 0 and found.dtype == torch.float64 and found.ndim == 0


def test_a_nan_is_not_hidden():
    p, y = predictions()
    p[7, 2] = float("nan")
    for equal_mass in (False, True):
        for norm in page.NORMS:
            assert calibration_error(p, y, norm=norm, equal_mass=equal_mass).isnan()
        assert classwise_ece(p, y, equal_mass=equal_mass).isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_dtypes_are_widened(dtype):
    p, y = predictions(dtype=dtype)
    for function in (adaptive_ece, mce, classwise_ece):
        assert torch.equal(function(p, y), function(p.float(), y))


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
def test_gradients(norm):
    logits = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(12) % 3
    logits.requires_grad_()
    for equal_mass in (False, True):
        options = {"norm": norm, "equal_mass": equal_mass}
        error = partial(calibration_error, targets=y, bins=4, **options)
        assert torch.autograd.gradcheck(lambda x, error=error: error(x.softmax(1)), logits)
    if norm == "l1":
        assert torch.autograd.gradcheck(lambda x: classwise_ece(x.softmax(1), y, 4), logits)


@pytest.mark.parametrize("function", [adaptive_ece, mce, classwise_ece])
def test_what_does_not_fit_is_refused(function):
    op = "classwise_ece" if function is classwise_ece else "calibration_error"
    y = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ValueError, match=rf"^{op}: probabilities must be \[N, C\] with N and C"):
        function(torch.zeros(0, 3), y)
    with pytest.raises(ValueError, match=rf"^{op}: targets must be \[N\] with N = 2; got \[0\]"):
        function(torch.zeros(2, 3), y)
    with pytest.raises(ValueError, match=rf"^{op}: bins must be an integer of at least 1; got 1.5"):
        function(torch.zeros(2, 3), y.new_zeros(2), 1.5)


def test_unknown_norms_are_refused():
    with pytest.raises(ValueError, match="^calibration_error: norm must be 'l1', 'l2' or 'max'"):
        calibration_error(torch.ones(1, 1), torch.zeros(1), norm="l3")
