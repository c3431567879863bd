"""Disagreement of labels: exact for every dtype, size and layout."""

import sys
from fractions import Fraction

import pytest
import torch

from landscape_fast.ops.pairwise_divergence import (
    LABELS,
    pairwise_disagreement,
    pairwise_disagreement_reference,
    pairwise_divergence,
)
from landscape_fast.testing import check_registered, fenced

PAGE = sys.modules[pairwise_disagreement.__module__]
BACKENDS = ["cpp", pytest.param("cuda", marks=pytest.mark.gpu)]
DEVICE = {"cpp": "cpu", "cuda": "cuda", "torch": "cpu"}


def random_labels(M, N, dtype, device="cpu"):
    if dtype == torch.bool:
        return torch.rand(M, N, device=device) < 0.3
    low = -3 if dtype != torch.uint8 else 0
    return torch.randint(low, 4, (M, N), dtype=dtype, device=device)


def by_hand(labels):
    return (labels[:, None] != labels[None]).double().mean(-1).float()


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
@pytest.mark.parametrize("dtype", LABELS, ids=str)
@pytest.mark.parametrize("M, N", [(1, 1), (2, 3), (7, 255), (3, 257), (12, 1031)])
def test_counts_are_exact(M, N, dtype, backend):
    labels = random_labels(M, N, dtype, DEVICE[backend])
    labels[-1, 0] = True if dtype == torch.bool else torch.iinfo(dtype).max
    got = pairwise_disagreement(fenced(labels), backend=backend)
    assert got.dtype == torch.float32 and got.device == labels.device
    assert torch.equal(got, by_hand(labels))
    assert torch.equal(got, pairwise_disagreement_reference(labels))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int16], ids=str)
def test_reads_any_strides(dtype, backend):
    device = DEVICE[backend]
    for labels in (
        random_labels(300, 5, dtype, device).T,
        random_labels(8, 900, dtype, device)[::2, 1::3],
        random_labels(1, 300, dtype, device).expand(4, 300),
        random_labels(5, 1, dtype, device).expand(5, 300),
    ):
        assert torch.equal(pairwise_disagreement(fenced(labels), backend=backend), by_hand(labels))


@pytest.mark.parametrize("backend", BACKENDS)
def test_high_bits_count(backend):
    labels = torch.tensor([[0, 1 << 40], [1 << 32, 1 << 40]], device=DEVICE[backend])
    got = pairwise_disagreement(labels, backend=backend)
    assert got.tolist() == [[0, 0.5], [0.5, 0]]


def test_counts_beyond_the_integers_of_float32():
    N = 2**24 + 3
    labels = torch.zeros(2, N, dtype=torch.uint8)
    labels[1, : 2**23 + 1] = 1
    truth = float(torch.tensor(float(Fraction(2**23 + 1, N))))
    assert pairwise_disagreement(labels, backend="cpp")[0, 1].item() == truth


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
def test_no_members_no_examples(backend):
    none = torch.zeros(0, 5, dtype=torch.int64, device=DEVICE[backend])
    assert pairwise_disagreement(none, backend=backend).shape == (0, 0)
    empty = pairwise_disagreement(none.new_zeros(2, 0), backend=backend)
    assert empty.shape == (2, 2) and empty.isnan().all()


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
def test_first_of_equals_and_nan_is_largest(backend):
    nan, inf = float("nan"), float("inf")
    rows = [
        [1.0, 2.0, 2.0, 0.0],  # 1
        [1.0, nan, 9.0, nan],  # 1
        [1.0, inf, inf, 0.0],  # 1
        [-inf, -inf, -inf, -inf],  # 0
        [3.0, 3.0, 3.0, 3.0],  # 0
        [-inf, -inf, -inf, -5.0],  # 3
    ]
    labels = torch.tensor([1, 1, 1, 0, 0, 3])
    for copies in (1, 25):  # 4 classes, 100 classes: the repeats come after the first
        logits = torch.tensor(rows).repeat(1, copies)[:, None].to(DEVICE[backend])
        assert torch.equal(logits[:, 0].argmax(-1).cpu(), labels)
        got = pairwise_divergence(logits, "disagreement", backend=backend).cpu()
        assert torch.equal(got, by_hand(labels[:, None]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("C", [40, 200])
def test_ties_anywhere_in_a_row(C, backend):
    logits = torch.randint(0, 3, (6, 50, C)).float()
    logits[::2][torch.rand(3, 50, C) < 1 / C] = float("nan")
    got = pairwise_divergence(logits.to(DEVICE[backend]), "disagreement", backend=backend)
    assert torch.equal(got.cpu(), by_hand(logits.argmax(-1)))


def test_registered_op_keeps_the_rules_of_torch():
    check_registered(PAGE._disagreement_op, (torch.randint(0, 3, (4, 9)), "cpp"))
    check_registered(PAGE._disagreement_op, (torch.randint(0, 3, (9, 4)).T, "cpp"))


def test_understands_transforms_and_compilation():
    labels = torch.randint(0, 3, (2, 4, 9))
    truth = torch.stack([by_hand(l) for l in labels])
    assert torch.equal(torch.func.vmap(pairwise_disagreement)(labels), truth)
    compiled = torch.compile(pairwise_disagreement, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(labels[0]), truth[0])
    meta = pairwise_disagreement(labels[0].to("meta"))
    assert meta.shape == (4, 4) and meta.dtype == torch.float32
