import pytest
import torch

from landscape_fast.metrics.reliability import reliability_bins
from landscape_fast.ops import ensemble_summary


def test_bins_by_hand():
    p = torch.tensor([[0.9, 0.1], [0.3, 0.7], [0.25, 0.75], [0.5, 0.5]])
    found = reliability_bins(p, torch.tensor([0, 1, 0, 0]), bins=4)
    assert found.edges.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert found.counts.tolist() == [0, 1, 2, 1]  # 0.5 and 0.75 belong to the bins they close
    torch.testing.assert_close(found.accuracy[1:], torch.tensor([1.0, 0.5, 1.0]).double())
    torch.testing.assert_close(
        found.confidence[1:], torch.tensor([0.5, 0.725, 0.9]).double(), rtol=1e-6, atol=0
    )
    assert found.accuracy[:1].isnan().all() and found.confidence[:1].isnan().all()
    assert float(found.ece) == pytest.approx((0.5 + 2 * 0.225 + 0.1) / 4)


@pytest.mark.parametrize("bins", [1, 10, 15, 20])
def test_the_ece_is_that_of_ensemble_summary(bins):
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(3, 500, 7, generator=generator, dtype=torch.float64)
    targets = torch.randint(7, (500,), generator=generator)
    found = reliability_bins(logits.softmax(-1).mean(0), targets, bins)
    summary = ensemble_summary(logits, targets, bins)
    torch.testing.assert_close(found.ece, summary.ece)
    assert int(found.counts.sum()) == 500
    weighted = (found.counts * found.accuracy.nan_to_num()).sum() / 500
    torch.testing.assert_close(weighted, summary.accuracy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bins", [7, 15, 20])
def test_confidences_on_edges_close_their_bins(bins, dtype):
    """Edges are b / bins, rounded once; steps that add up, as of linspace, miss some of them."""
    confidence = (torch.arange(1, bins + 1, dtype=torch.float64) / bins).to(dtype)
    p = torch.stack([confidence, torch.zeros_like(confidence)], 1)
    found = reliability_bins(p, torch.zeros(bins, dtype=torch.int64), bins)
    assert found.counts.tolist() == [1] * bins
    assert torch.equal(found.edges[1:], confidence.double()) and found.edges[0] == 0


def test_certain_predictions_are_in_the_last_bin():
    p = torch.eye(3)[[0, 1, 2, 0]] * (1 + 1e-6)  # rounding may exceed 1
    found = reliability_bins(p, torch.tensor([0, 1, 2, 0]), bins=15)
    assert found.counts.tolist() == [0] * 14 + [4]


@pytest.mark.parametrize(
    ("p", "y", "bins", "message"),
    [
        (torch.ones(3), torch.zeros(3), 15, r"probabilities must be \[N, C\] with N and C at"),
        (torch.ones(0, 3), torch.zeros(0), 15, r"probabilities must be \[N, C\] with N and C at"),
        (torch.ones(3, 2), torch.zeros(2), 15, r"targets must be \[N\] with N = 3; got \[2\]"),
        (torch.ones(3, 2), torch.zeros(3), 0, "bins must be an integer of at least 1; got 0"),
        (torch.ones(3, 2), torch.zeros(3), True, "bins must be an integer .*; got True"),
        (torch.ones(3, 2).long(), torch.zeros(3), 15, "probabilities must be one of float32, .*64"),
        (torch.ones(3, 2), torch.zeros(3, device="meta"), 15, "targets must be on the device of"),
    ],
)
def test_what_does_not_fit_is_refused(p, y, bins, message):
    with pytest.raises(ValueError, match=f"^reliability_bins: {message}"):
        reliability_bins(p, y.long(), bins)


def test_targets_are_integers_and_all_are_tensors():
    p = torch.ones(3, 2)
    with pytest.raises(ValueError, match="^reliability_bins: targets must be one of int64, int32"):
        reliability_bins(p, torch.zeros(3))
    with pytest.raises(TypeError, match="^reliability_bins: targets must be a Tensor; got list"):
        reliability_bins(p, [0, 0, 0])
    with pytest.raises(TypeError, match="^reliability_bins: probabilities must be a Tensor; got"):
        reliability_bins(p.tolist(), torch.zeros(3).long())
