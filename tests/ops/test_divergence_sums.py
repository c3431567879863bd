"""Sums of divergences: every backend against the definition, and against the means they are of."""

from math import inf, nan

import pytest
import torch

from landscape_fast.ops import (
    divergence_sums,
    divergence_sums_reference,
    pairwise_divergence,
)
from landscape_fast.ops._divergence_sums import _sums_op
from landscape_fast.testing import check_op, check_registered

BACKENDS = ["cpp", pytest.param("cuda", marks=pytest.mark.gpu)]
DEVICE = {"cpp": "cpu", "cuda": "cuda", "torch": "cpu"}
KINDS = ("js", "kl", "disagreement")
# (M, N, C): few classes go in blocks of 32 examples, 64 and more in rows of 16
SHAPES = [(1, 1, 1), (3, 1, 2), (4, 33, 10), (4, 70, 63), (4, 5, 64), (3, 9, 1031)]


def rounded(function):
    """Outputs in the precision of their terms, which is what a kernel is held to."""
    return lambda *a, **o: [s.to(a[0].dtype) for s in function(*a, KINDS, **o).values()]


def compare(logits, backend, dtype=torch.float32):
    """Against the definition in float64, and to the bit against the means."""
    functions = map(rounded, (divergence_sums, divergence_sums_reference))
    logits = logits.to(DEVICE[backend])
    check_op(*functions, [logits], dtype=dtype, backend=backend, gradients=False)
    got = divergence_sums(logits, KINDS, backend=backend)
    assert tuple(got) == KINDS
    for kind, sums in got.items():
        assert sums.dtype == torch.float64
        means = pairwise_divergence(logits, kind, backend=backend)
        torch.testing.assert_close(
            (sums / logits.shape[1]).float(), means, rtol=0, atol=0, equal_nan=True
        )
    counts = got["disagreement"]
    labels = logits.argmax(-1)
    assert torch.equal(counts, (labels[:, None] != labels).sum(-1).double())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_definition_and_with_the_means(shape, backend):
    compare(2 * torch.randn(shape), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("C", [10, 65])
def test_agrees_in_16_bits(C, dtype, backend):
    functions = map(rounded, (divergence_sums, divergence_sums_reference))
    logits = 2 * torch.randn(4, 40, C, device=DEVICE[backend])
    check_op(*functions, [logits], dtype=dtype, backend=backend, gradients=False)


@pytest.mark.parametrize("C", [10, 65])
def test_every_instruction_set(C, isa):
    compare(2 * torch.randn(5, 45, C), "cpp")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("C", [10, 65])
def test_reads_any_strides(C, backend):
    members_last = torch.randn(C, 40, 4).permute(2, 1, 0)
    gaps = torch.randn(4, 80, 2 * C)[:, ::2, 1::2]
    for logits in (members_last, gaps, torch.randn(4, 1, C).expand(4, 40, C)):
        compare(logits, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("C", [5, 80])
@pytest.mark.parametrize("poison", [nan, inf, -inf])
def test_extremes_go_where_the_definition_lets_them(poison, C, backend):
    logits = torch.randn(3, 35, C)
    logits[1, 3, 2] = poison
    compare(logits, backend)
    logits[2, 7] = -inf
    compare(logits, backend)


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
@pytest.mark.parametrize("C", [10, 70])
def test_sums_of_batches_add_up(C, backend):
    """Also for members so close that a mean of their divergence needs all its digits."""
    logits = torch.randn(4, 320, C, device=DEVICE[backend])
    logits[1] = logits[0] + 1e-3 * logits[1]
    whole = divergence_sums(logits, KINDS, backend=backend)
    parts = [divergence_sums(x, KINDS, backend=backend) for x in logits.split((64, 160, 96), 1)]
    for kind in KINDS:
        added = sum(part[kind] for part in parts)
        torch.testing.assert_close(added, whole[kind], rtol=1e-14, atol=0)
    assert torch.equal(added, whole["disagreement"])  # counts


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
def test_no_members_no_examples(backend):
    device = DEVICE[backend]
    none = divergence_sums(torch.empty(0, 5, 3, device=device), KINDS, backend=backend)
    empty = divergence_sums(torch.empty(2, 0, 3, device=device), KINDS, backend=backend)
    for kind in KINDS:
        assert none[kind].shape == (0, 0) and none[kind].dtype == torch.float64
        assert torch.equal(empty[kind].cpu(), torch.zeros(2, 2, dtype=torch.float64))


def test_float64_logits_and_gradients():
    logits = torch.randn(3, 20, 7, dtype=torch.float64, requires_grad=True)
    for kind, sums in divergence_sums(logits, KINDS).items():
        assert not sums.requires_grad
        want = 20 * pairwise_divergence(logits.detach(), kind).double()
        rtol = 1e-6 if kind == "disagreement" else 1e-12  # labels give float32
        torch.testing.assert_close(sums, want, rtol=rtol, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_registered_op_keeps_the_rules_of_torch(kind):
    check_registered(_sums_op, (torch.randn(5, 7, 3).permute(2, 1, 0), kind, "cpp"))


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda x: divergence_sums(x[0]), r"logits must be \[M, N, C\]; got \[4, 5\]"),
        (lambda x: divergence_sums(x[..., :0]), r"C at least 1; got \[3, 4, 0\]"),
        (lambda x: divergence_sums(x, ("js", "tv")), r"kinds must be some of .*'tv'"),
        (lambda x: divergence_sums(x, "js"), r"kinds must be some of .* got 'js'"),
        (lambda x: divergence_sums(x, ()), r"kinds must be some of .* got \(\)"),
        (lambda x: divergence_sums(x, ("kl", "kl")), r"each once; got \('kl', 'kl'\)"),
        (lambda x: divergence_sums(x, backend="triton"), r"backend must be one of .*'triton'"),
    ],
)
def test_errors_name_the_argument_the_rule_and_the_value(call, text):
    with pytest.raises(ValueError, match=rf"^divergence_sums: .*{text}"):
        call(torch.zeros(3, 4, 5))
