"""Pairwise divergence and disagreement: the CUDA kernels on the CPU against the definitions."""

from math import inf, nan

import pytest
import torch
from cuda_on_cpu.calls import DTYPES, KINDS

from landscape_fast.ops.pairwise_divergence import (
    pairwise_disagreement_reference,
    pairwise_divergence_reference,
)
from landscape_fast.testing import assert_as_exact, fenced

# (M, N, C): ones; one tile of members and several; rows read by 1, 8 and 32 lanes, 16 bytes at a
# time and not; several blocks of examples in a chunk and several chunks
SHAPES = [
    (1, 1, 1), (2, 3, 1), (3, 7, 10), (10, 300, 10), (16, 9, 16), (17, 12, 40), (35, 5, 7),
    (9, 6, 131), (5, 3, 1031), (21, 4, 600), (4, 2000, 3),
]  # fmt: skip


def check(kernels, logits, kind):
    truth = pairwise_divergence_reference(logits.double(), kind)
    plain = pairwise_divergence_reference(logits, kind)
    got = kernels.pairwise_divergence(logits, kind)
    assert_as_exact(kind, got, plain, truth)
    if kind != "kl":
        assert torch.equal(got.nan_to_num(9.0), got.T.nan_to_num(9.0))
    return got


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_definition(kernels, shape, kind):
    check(kernels, fenced(2 * torch.randn(shape)), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", [(3, 7, 10), (17, 5, 136), (4, 3, 1031)], ids=str)
def test_reads_every_dtype(kernels, shape, dtype, kind):
    check(kernels, fenced((2 * torch.randn(shape)).to(dtype)), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("C", [10, 96])
def test_reads_any_strides(kernels, C, kind):
    members_last = torch.randn(C, 20, 4).permute(2, 1, 0)
    gaps = torch.randn(4, 40, 2 * C)[:, ::2, 1::2]
    shared = torch.randn(4, 1, C).expand(4, 20, C)
    offset = torch.randn(5, 21, C + 1)[1:, 1:, 1:]
    for logits in (members_last, gaps, shared, offset, torch.randn(4, 20, C + 4)[..., :C]):
        check(kernels, logits, kind)


@pytest.mark.parametrize("M", [5, 18])
@pytest.mark.parametrize("kind", KINDS)
def test_special_values(kernels, kind, M):
    """What one member says of one example reaches its own row and column, and no other."""
    for value in (inf, nan):
        logits = torch.randn(M, 6, 5)
        logits[2, 3, 1] = value
        check(kernels, logits, kind)
    logits = torch.randn(M, 6, 5)
    logits[2, 3] = -inf
    got = check(kernels, logits, kind)
    assert kind == "disagreement" or got[2].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_classes_ruled_out(kernels, kind):
    logits = torch.randn(11, 6, 5)
    logits[:3, :, 1] = -inf  # together
    logits[9, 2, 4] = -inf  # alone
    logits[4, :, :4] = -inf  # all but one
    got = check(kernels, logits, kind)
    if kind == "kl":
        assert got[0, 1].isfinite() and got[0, 9] == inf and got[9, 0] == inf


def test_probabilities_that_underflow(kernels):
    logits = torch.tensor([[[0.0, -200.0, 1.0]], [[0.0, 3.0, -300.0]], [[500.0, 0.0, 0.0]]])
    for kind in ("js", "kl"):
        check(kernels, logits, kind)


@pytest.mark.parametrize("kind", ["js", "kl"])
def test_close_members_keep_their_digits(kernels, kind):
    logits = torch.randn(1, 40, 12).repeat(6, 1, 1)
    logits[1:3] += 1e-3 * torch.randn(2, 40, 12)
    logits[3:] += 1e-2 * torch.randn(3, 40, 12)
    truth = pairwise_divergence_reference(logits.double(), kind)
    got = kernels.pairwise_divergence(logits, kind).double()
    apart = ~torch.eye(6, dtype=torch.bool)
    assert ((got - truth).abs() / truth)[apart].max() < 1e-3  # rounding the logits makes 2e-4
    same = kernels.pairwise_divergence(logits[:1].repeat(18, 1, 1), kind)
    assert torch.equal(same, torch.zeros(18, 18))


@pytest.mark.parametrize("kind", KINDS)
def test_no_examples_no_members(kernels, kind):
    assert kernels.pairwise_divergence(torch.zeros(3, 0, 4), kind).isnan().all()
    assert kernels.pairwise_divergence(torch.zeros(0, 2, 4), kind).shape == (0, 0)


# KL on the tensor cores: (M, N, C) of members padded to 16, 32, 64 and 128, short rows and rows
# that are read once, several groups and chunks
PRODUCTS = [
    (9, 6, 5), (16, 40, 70), (33, 3, 9), (64, 2, 150), (11, 2, 530), (25, 1, 520), (50, 1, 515),
    (70, 3, 35), (9, 1, 16400),
]  # fmt: skip


@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_kl_of_many_members(kernels, shape):
    logits = 2 * torch.randn(shape)
    check(kernels.quick(), fenced(logits), "kl")
    if shape[2] < 1000:
        check(kernels.quick(), fenced(logits[:1] + 0.3 * torch.randn(shape)), "kl")


@pytest.mark.parametrize("shape", [(10, 3, 40), (10, 3, 600), (70, 2, 40)], ids=str)
def test_kl_of_many_members_far_apart(kernels, shape):
    """Logits of which the first say nothing of the largest, and classes all but ruled out, by one,
    by some and by all."""
    logits = torch.randn(shape)
    logits[2, :, -1] = 70
    logits[3:, 0, -2] = 60
    logits[4, :, 3] = -1e9
    logits[5:, 1, :35] = -inf
    logits[:, :, 7] = -1e4
    logits[:, :, 8] = -inf
    logits[1, :, 6] = logits[1, :, 9] = -500
    got = check(kernels.quick(), logits, "kl")
    assert got[0, 4] > 1e5 and got[4, 0].isfinite() and got[0, 9] == inf and (got >= 0).all()


@pytest.mark.parametrize("shape", [(10, 3, 40), (10, 3, 600), (70, 2, 40)], ids=str)
def test_kl_of_many_members_where_one_all_but_rules_a_class_out(kernels, shape):
    """Nothing else is large here, so that every digit of those terms counts."""
    logits = torch.randn(shape)
    logits[1, :, 6] = -500
    check(kernels.quick(), logits, "kl")


@pytest.mark.parametrize("C", [40, 600])
def test_kl_of_a_member_without_probabilities(kernels, C):
    for value in (inf, nan, -inf):
        logits = torch.randn(10, 3, C)
        logits[4, 1, 20 if value != -inf else slice(None)] = value
        got = check(kernels.quick(), logits, "kl")
        assert got[4].isnan().all() and got[:, 4].isnan().all()
        assert got[0, 1].isfinite()


@pytest.mark.parametrize("C", [30, 540])
def test_kl_of_many_near_members_keeps_its_digits(kernels, C):
    """Nearer than what plain float32 tells apart, and equal."""
    logits = torch.randn(1, 4, C).double() + 1e-2 * torch.randn(12, 4, C)
    logits[11] = logits[3]
    logits = (4 * logits).float()
    got = check(kernels.quick(), logits, "kl")
    truth = pairwise_divergence_reference(logits.double(), "kl")
    apart = truth > 0
    assert ((got - truth).abs() / truth)[apart].max() < 1e-3  # rounding the logits makes 1e-4
    assert got[3, 11] == 0 and (got[apart] > 0).all()


INTEGERS = [torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 3000), (16, 3), (17, 200), (40, 333)], ids=str)
def test_disagreement(kernels, shape, dtype):
    labels = torch.randint(0, 2 if dtype == torch.bool else 5, shape).to(dtype)
    views = labels.T.contiguous().T, labels[:, ::2], labels[:, :1].expand(shape)
    for case in (fenced(labels), *views):
        got = kernels.pairwise_disagreement(case)
        assert torch.equal(got, pairwise_disagreement_reference(case))


def test_disagreement_sees_every_bit(kernels):
    one = torch.zeros(2, 64, dtype=torch.int64)
    one[1] = 1 << torch.arange(64)
    assert kernels.pairwise_disagreement(one)[0, 1] == 1
    assert kernels.pairwise_disagreement(torch.zeros(3, 0, dtype=torch.int64)).isnan().all()
