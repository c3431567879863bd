"""Sums behind the summary: every backend against the definition, and against `ensemble_summary`."""

from math import inf, nan

import pytest
import torch

from landscape_fast.ops import ensemble_summary, summary_sums, summary_sums_reference
from landscape_fast.ops._summary_sums import _sums_op
from landscape_fast.testing import check_op, check_registered

BACKENDS = ["cpp", pytest.param("cuda", marks=pytest.mark.gpu)]
DEVICE = {"cpp": "cpu", "cuda": "cuda", "torch": "cpu"}
SHAPES = [(1, 1, 1), (3, 1, 2), (4, 33, 10), (3, 70, 63), (4, 5, 64), (3, 9, 1031)]


def random_case(M, N, C, dtype=torch.float32):
    logits, targets = 2 * torch.randn(M, N, C), torch.randint(0, C, (N,))
    logits[:, torch.arange(N), targets] += 2  # members that know something
    targets[3::7] = -100
    return logits.to(dtype), targets


def parts(function):
    """Each kind of sum by itself, in the precision of its terms."""

    def split(logits, targets, bins, **options):
        sums = function(logits, targets, bins, **options).to(logits.dtype)
        rows = sums[:-3].reshape(-1, 3 + bins)
        return [*rows[:, :3].unbind(1), rows[:, 3:], *sums[-3:].unbind(0)]

    return split


def compare(logits, targets, backend, bins=15, dtype=torch.float32):
    inputs = [t.to(DEVICE[backend]) for t in (logits, targets)]
    functions = map(parts, (summary_sums, summary_sums_reference))
    check_op(*functions, inputs, dtype=dtype, backend=backend, gradients=False, bins=bins)


def means(sums, bins):
    """What `ensemble_summary` returns, of the sums."""
    rows, (count, entropy, information) = sums[:-3].reshape(-1, 3 + bins), sums[-3:]
    scores = torch.cat([rows[:, :3].T, rows[:, 3:].abs().sum(1)[None]]) / count
    return [*scores[:, :-1], *scores[:, -1], entropy / count, information / count]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bins", [1, 10])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_definition(shape, bins, backend):
    compare(*random_case(*shape), backend, bins)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("C", [10, 65])
def test_agrees_in_16_bits(C, dtype, backend):
    compare(*random_case(4, 40, C), backend, dtype=dtype)


@pytest.mark.parametrize("C", [10, 65])
def test_every_instruction_set(C, isa):
    compare(*random_case(5, 45, C), "cpp")


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("C", [10, 65])
def test_the_summary_is_made_of_them(C, dtype, backend):
    if dtype == torch.float64 and backend != "torch":
        pytest.skip("float64 runs in plain PyTorch")
    logits, targets = (t.to(DEVICE[backend]) for t in random_case(4, 300, C, dtype))
    sums = summary_sums(logits, targets, 12, backend=backend)
    got = ensemble_summary(logits, targets, 12, backend=backend)
    exact = backend != "torch"  # a kernel rounds these sums; PyTorch sums in the dtype of logits
    for name, value, mean in zip(got._fields, got, means(sums, 12), strict=True):
        assert value.dtype == dtype and mean.dtype == torch.float64
        if exact:
            assert torch.equal(mean.float(), value), name
        else:
            torch.testing.assert_close(mean.to(dtype), value, rtol=1e-5, atol=1e-6)
    assert sums[-3] == (targets != -100).sum()
    right = (logits.argmax(-1) == targets).sum(-1)
    assert torch.equal(sums[:-3].reshape(5, 15)[:4, 0], right.double())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("C", [10, 65])
def test_reads_any_strides(C, backend):
    targets = torch.randint(0, C, (80,))[::2]
    members_last = torch.randn(C, 40, 4).permute(2, 1, 0)
    gaps = torch.randn(4, 80, 2 * C)[:, ::2, 1::2]
    for logits in (members_last, gaps, torch.randn(4, 1, C).expand(4, 40, C)):
        compare(logits, targets, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("C", [5, 80])
@pytest.mark.parametrize("poison", [nan, inf, -inf])
def test_extremes_go_where_the_definition_lets_them(poison, C, backend):
    logits, targets = random_case(3, 35, C)
    logits[1, 4, 2] = poison
    compare(logits, targets, backend)
    targets[4] = -100
    compare(logits, targets, backend)
    assert summary_sums(logits, targets, backend="cpp").isfinite().all()  # it is ignored


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
@pytest.mark.parametrize("C", [10, 70])
def test_sums_of_batches_add_up(C, backend):
    logits, targets = (t.to(DEVICE[backend]) for t in random_case(4, 320, C))
    whole = summary_sums(logits, targets, backend=backend)
    sizes = (64, 160, 96)
    pieces = zip(logits.split(sizes, 1), targets.split(sizes), strict=True)
    added = sum(summary_sums(x, y, backend=backend) for x, y in pieces)
    # sums of gaps of both signs cancel: absolute, of numbers of a few dozen
    torch.testing.assert_close(added, whole, rtol=1e-14, atol=1e-13)
    assert added[-3] == whole[-3] and torch.equal(added[:-3:18], whole[:-3:18])  # counts


def test_nothing_to_count():
    logits, targets = random_case(3, 20, 5)
    for x, y in ((logits, torch.full_like(targets, -100)), (logits[:, :0], targets[:0])):
        for backend in ("cpp", "torch"):
            assert (summary_sums(x, y, backend=backend) == 0).all()


def test_targets_out_of_range():
    logits, targets = random_case(3, 40, 5)
    targets[37] = 5
    for x in (logits, logits.double()):
        with pytest.raises(IndexError, match=r"summary_sums: targets must be .* got 5 for .* 37"):
            summary_sums(x, targets)
    assert summary_sums_reference(logits, targets)[:-3].isnan().all()


def test_registered_op_keeps_the_rules_of_torch():
    logits, targets = random_case(3, 9, 5)
    assert not summary_sums(logits.requires_grad_(), targets).requires_grad
    check_registered(_sums_op, (logits.detach(), targets.repeat(2)[::2], 15, -100, "cpp"))


@pytest.mark.parametrize(
    "change, text",
    [
        ({"logits": torch.zeros(4, 5)}, r"logits must be \[M, N, C\]; got \[4, 5\]"),
        ({"targets": torch.zeros(3).long()}, r"targets must be \[N\] with N = 4; got \[3\]"),
        ({"bins": 0}, r"bins must be an integer in \[1, 4096\]; got 0"),
    ],
)
def test_errors_name_the_argument_the_rule_and_the_value(change, text):
    right = {"logits": torch.zeros(3, 4, 5), "targets": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(ValueError, match=f"^summary_sums: {text}"):
        summary_sums(**{**right, **change})
