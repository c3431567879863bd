"""Large tensors, labels out of range, logits that are not finite."""

import pytest
import torch

from landscape_fast.ops.batch_ensemble_linear import batch_ensemble_linear
from landscape_fast.ops.combine import combine
from landscape_fast.ops.ensemble_summary import ensemble_summary
from landscape_fast.ops.pairwise_divergence import pairwise_disagreement, pairwise_divergence

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("target", [-1, 7, 1 << 40])
def test_a_target_out_of_range_poisons_what_depends_on_it(target):
    """A GPU cannot raise without a sync: NaN says it, and the rest stays right."""
    logits = torch.randn(3, 50, 7, device="cuda")
    targets = torch.randint(7, (50,), device="cuda")
    good = ensemble_summary(logits, targets)
    targets[31] = target
    bad = ensemble_summary(logits, targets)
    for name in ("member_nll", "member_accuracy", "member_brier", "member_ece", "nll", "ece"):
        assert getattr(bad, name).isnan().all(), name
    for name in ("entropy", "mutual_information"):
        torch.testing.assert_close(getattr(bad, name), getattr(good, name))
    assert torch.ones(3, device="cuda").sum().item() == 3  # the context is alive


def test_not_finite_logits_are_nan_where_they_stand():
    """Neither a wrong number nor an endless loop."""
    logits = torch.randn(4, 40, 9, device="cuda")
    logits[1, 5, 3] = float("nan")
    logits[2, 6] = -float("inf")
    for kind in ("js", "kl"):
        out = pairwise_divergence(logits, kind)
        ill = torch.tensor([False, True, True, False], device="cuda")
        expected = ill[:, None] | ill[None]
        assert torch.equal(out.isnan(), expected), kind


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    """Offsets in 64 bits: every element of large tensors is read and written where it stands."""
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GB of free GPU memory")
    P = (1 << 31) + 7
    anchors = torch.randn(1, P, device="cuda", dtype=torch.bfloat16)
    out = combine(torch.tensor([[2.0], [-1.0]], device="cuda"), anchors)
    for start in range(0, P, 1 << 28):
        part = anchors[0, start : start + (1 << 28)]
        assert torch.equal(out[0, start : start + (1 << 28)], 2 * part)
        assert torch.equal(out[1, start : start + (1 << 28)], -part)
    del out, anchors, part

    B = (1 << 31) // 64 + 3
    x = torch.randn(1, B, 64, device="cuda", dtype=torch.bfloat16)
    weight = torch.eye(64, device="cuda", dtype=torch.bfloat16)
    y = batch_ensemble_linear(x, weight, torch.full_like(weight[:1], 2.0))
    for start in range(0, B, 1 << 22):
        assert torch.equal(y[0, start : start + (1 << 22)], 2 * x[0, start : start + (1 << 22)])
    del x, y

    logits = torch.randn(2, (1 << 31) // 2000 + 1, 1000, device="cuda")
    logits[1] = logits[0]
    logits[1, -1] = -logits[0, -1]  # only the very last example differs
    N = logits.shape[1]
    js = pairwise_divergence(logits)
    last = pairwise_divergence(logits[:, -1:].contiguous())
    torch.testing.assert_close(js[0, 1] * N, last[0, 1], rtol=0.02, atol=0.0)
    labels = logits.argmax(-1)
    assert pairwise_disagreement(labels)[0, 1] * N == pytest.approx(1.0)
