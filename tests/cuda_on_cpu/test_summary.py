"""ensemble_summary: the CUDA kernels on the CPU against the definition."""

from math import inf, nan

import pytest
import torch
from cuda_on_cpu.calls import DTYPES

from landscape_fast.ops.ensemble_summary import EnsembleSummary, ensemble_summary_reference
from landscape_fast.testing import assert_as_exact, fenced

# (M, N, C): ones; rows held by 1, 8 and 32 lanes, 16 bytes at a time and not; rows of two batches;
# rows read twice; more members than shared memory has room for
SHAPES = [
    (1, 1, 1), (3, 1, 2), (4, 70, 10), (3, 9, 16), (5, 31, 17), (3, 8, 128), (2, 5, 513),
    (3, 4, 1024), (3, 9, 1031), (2, 3, 3000), (330, 2, 5),
]  # fmt: skip


def random_case(M, N, C):
    logits, targets = 2 * torch.randn(M, N, C), torch.randint(0, C, (N,))
    if C > 1:  # members that know something
        logits[:, torch.arange(N), targets] += 2
    targets[3::7] = -100
    return logits, targets


def check_sums(sums, members, ensemble, bins):
    """The means are what the sums give."""
    examples, *of_ensemble = sums[-3:]
    rows = sums[:-3].view(-1, 3 + bins)
    scores = torch.cat([rows[:, :3], rows[:, 3:].abs().sum(1, keepdim=True)], 1) / examples
    expected = [*scores.T.float().unbind(1)], torch.stack(of_ensemble).div(examples).float()
    got = [*torch.cat([members, ensemble[:4, None]], 1).unbind(1)], ensemble[4:]
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0, equal_nan=True)  # bins, two orders


def check(kernels, logits, targets, **options):
    """The outputs, after comparing them; the number of bad targets must be right too."""
    truth = ensemble_summary_reference(logits.double(), targets, **options)
    plain = ensemble_summary_reference(logits, targets, **options)
    members, ensemble, bad, sums = kernels.summary_sums(logits, targets, **options)
    got = [*members.unbind(0), *ensemble.unbind(0)]
    check_sums(sums, members, ensemble, options.get("bins", 15))
    for name, *values in zip(EnsembleSummary._fields, got, plain, truth, strict=True):
        assert_as_exact(name, *values)
    ignored = targets == options.get("ignore_index", -100)
    assert bad == (~ignored & ((targets < 0) | (targets >= logits.shape[2]))).sum()
    return EnsembleSummary(*got)


@pytest.mark.parametrize("bins", [1, 15])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_definition(kernels, shape, bins):
    logits, targets = random_case(*shape)
    check(kernels, fenced(logits), fenced(targets), bins=bins)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", [(4, 33, 10), (3, 8, 128), (2, 5, 513), (3, 9, 1031)], ids=str)
def test_reads_every_dtype(kernels, shape, dtype):
    logits, targets = random_case(*shape)
    check(kernels, fenced(logits.to(dtype)), targets)


@pytest.mark.parametrize("C", [10, 96, 1030])
def test_reads_any_strides(kernels, C):
    targets = torch.randint(0, C, (20,))
    members_last = torch.randn(C, 20, 4).permute(2, 1, 0)
    gaps = torch.randn(4, 40, 2 * C)[:, ::2, 1::2]
    shared = torch.randn(4, 1, C).expand(4, 20, C)
    offset = torch.randn(5, 21, C + 1)[1:, 1:, 1:]
    for logits in (members_last, gaps, shared, offset, torch.randn(4, 20, C + 4)[..., :C]):
        check(kernels, logits, targets)


@pytest.mark.parametrize("C", [5, 40, 1025])
@pytest.mark.parametrize("value", [nan, inf, "a row of -inf"])
def test_special_values(kernels, value, C):
    logits, targets = random_case(3, 12, C)
    if value == "a row of -inf":
        logits[1, 5] = -inf
    else:
        logits[1, 5, 2] = value
    got = check(kernels, logits, targets)
    assert got.member_nll[1].isnan() and got.member_nll[[0, 2]].isfinite().all()
    targets[5] = -100
    assert check(kernels, logits, targets).nll.isfinite()


@pytest.mark.parametrize("C", [6, 1030])
def test_classes_ruled_out(kernels, C):
    logits, targets = random_case(3, 12, C)
    logits[:, :, 3] = -inf
    logits[1, :, : C - 1] = -inf
    targets[targets == 3] = 0
    logits[0, torch.arange(12), targets.clamp_min(0)] = 0
    assert check(kernels, logits, targets).nll.isfinite()
    targets[0] = 3
    assert check(kernels, logits, targets).nll == inf


def test_targets_that_underflow(kernels):
    logits = torch.tensor([[[0.0, 300.0, 1.0]], [[0.0, 250.0, -300.0]]])
    assert 249 < check(kernels, logits, torch.tensor([0])).nll < 251


@pytest.mark.parametrize("C", [12, 1030])
def test_close_members_keep_their_digits(kernels, C):
    logits, targets = random_case(1, 20, C)
    logits = logits.repeat(4, 1, 1)
    assert 0 <= kernels.ensemble_summary(logits, targets)[9] < 1e-13  # rounding p, squared
    logits += 1e-3 * torch.randn(4, 20, C)
    truth = ensemble_summary_reference(logits.double(), targets).mutual_information
    got = kernels.ensemble_summary(logits, targets)[9]
    assert abs(got / truth - 1) < 3e-5  # rounding p to float32 against a step of 1e-3, 20 examples


@pytest.mark.parametrize("C", [10, 1030])
def test_bad_targets_poison_what_depends_on_them(kernels, C):
    logits, targets = random_case(3, 14, C)
    targets[2], targets[9] = C, -1
    got = check(kernels, logits, targets)
    assert got.member_accuracy.isnan().all() and got.ece.isnan()
    assert got.entropy.isfinite() and got.mutual_information.isfinite()
    check(kernels, logits, targets, ignore_index=C)


def test_many_bins(kernels):
    check(kernels, *random_case(3, 50, 10), bins=4096)


def test_no_example_is_left(kernels):
    logits = torch.randn(3, 4, 5)
    for got in (
        kernels.ensemble_summary(logits, torch.full((4,), -100)),
        kernels.ensemble_summary(logits[:, :0], torch.zeros(0, dtype=torch.int64)),
    ):
        assert torch.cat([t.flatten() for t in got[:-1]]).isnan().all() and got[-1] == 0


def test_sums_by_bin(kernels):
    """Summed over two halves they are those of the whole: what streaming relies on."""
    logits, targets = random_case(3, 60, 10)
    halves = [
        kernels.summary_sums(logits[:, part], targets[part], 7)[3]
        for part in (slice(23), slice(23, None))
    ]
    whole = kernels.summary_sums(logits, targets, 7)[3]
    torch.testing.assert_close(sum(halves), whole, rtol=1e-6, atol=1e-8)
    p = logits[1].double().softmax(-1)[targets != -100]
    confidence, label = p.max(-1)
    correct = (label == targets[targets != -100]).double()
    gaps = torch.zeros(7, dtype=torch.float64)
    gaps.index_add_(0, (7 * confidence).long(), correct - confidence)
    torch.testing.assert_close(whole[:-3].view(4, 10)[1, 3:], gaps, rtol=1e-5, atol=1e-6)
