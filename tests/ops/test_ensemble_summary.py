"""Summary of an ensemble: every backend against the definition, the definition against others."""

import sys
from math import inf, log, nan

import numpy as np
import pytest
import torch

from landscape_fast.ops.ensemble_summary import (
    EnsembleSummary,
    ensemble_summary,
    ensemble_summary_reference,
)
from landscape_fast.ops.pairwise_divergence import pairwise_divergence
from landscape_fast.testing import check_hessian, check_op, check_registered, check_transforms

PAGE = sys.modules[ensemble_summary.__module__]
BACKENDS = ["cpp", pytest.param("cuda", marks=pytest.mark.gpu)]
DEVICE = {"cpp": "cpu", "cuda": "cuda", "torch": "cpu"}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (M, N, C): ones and primes; few classes go in blocks of 32 examples, 64 and more in rows of 16
SHAPES = [(1, 1, 1), (3, 1, 2), (4, 33, 10), (5, 31, 17), (3, 70, 63), (4, 5, 64), (3, 9, 1031)]


def random_case(M, N, C, scale=2.0):
    logits, targets = scale * torch.randn(M, N, C), torch.randint(0, C, (N,))
    if C > 1:  # members that know something
        logits[:, torch.arange(N), targets] += scale
    targets[3::7] = -100
    return logits, targets


def compare(logits, targets, backend, **options):
    inputs = [t.to(DEVICE[backend]) for t in (logits, targets)]
    options = {"gradients": False, **options}
    check_op(ensemble_summary, ensemble_summary_reference, inputs, backend=backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bins", [1, 10, 15])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_definition(shape, bins, dtype, backend):
    compare(*random_case(*shape), backend, dtype=dtype, bins=bins)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("C", [10, 65])
def test_reads_any_strides(C, backend):
    targets = torch.randint(0, C, (80,))[::2]
    members_last = torch.randn(C, 40, 4).permute(2, 1, 0)
    gaps = torch.randn(4, 80, 2 * C)[:, ::2, 1::2]
    shared = torch.randn(4, 1, C).expand(4, 40, C)
    for logits in (members_last, gaps, shared, torch.randn(5, 41, C)[1:, 1:]):
        compare(logits, targets, backend)


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
@pytest.mark.parametrize("C", [7, 70])
def test_agrees_with_scikit_learn_and_scipy(C, backend):
    entropy = pytest.importorskip("scipy.stats").entropy
    log_loss = pytest.importorskip("sklearn.metrics").log_loss
    logits, targets = random_case(3, 200, C)
    targets[targets == -100] = 0
    got = ensemble_summary(logits.to(DEVICE[backend]), targets.to(DEVICE[backend]), backend=backend)
    p, y = logits.double().softmax(-1).numpy(), targets.numpy()
    mean = p.mean(0)
    classes = list(range(C))
    truth = EnsembleSummary(
        [(m.argmax(-1) == y).mean() for m in p],
        [log_loss(y, m, labels=classes) for m in p],
        [brier(m, y) for m in p],
        [guo(m, y) for m in p],
        (mean.argmax(-1) == y).mean(),
        log_loss(y, mean, labels=classes),
        brier(mean, y),
        guo(mean, y),
        entropy(mean, axis=-1).mean(),
        (entropy(mean, axis=-1) - entropy(p, axis=-1).mean(0)).mean(),
    )
    for name, value, want in zip(got._fields, got, truth, strict=True):
        want = torch.as_tensor(np.asarray(want), dtype=torch.float32)
        torch.testing.assert_close(value.cpu(), want, msg=lambda m, name=name: f"{name}: {m}")


def brier(p, y):
    return ((p - np.eye(p.shape[1])[y]) ** 2).sum(-1).mean()


def guo(p, y, bins=15):
    """ECE as in the code of Guo et al.: for each bin, |accuracy - confidence| * share."""
    edges = np.linspace(0, 1, bins + 1)
    confidence, correct = p.max(-1), p.argmax(-1) == y
    total = 0.0
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            total += abs(correct[inside].mean() - confidence[inside].mean()) * inside.mean()
    return total


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
def test_hand_made_case(backend):
    p = torch.tensor([[[0.75, 0.25], [0.5, 0.5]], [[0.25, 0.75], [0.5, 0.5]]])
    inputs = p.log().to(DEVICE[backend]), torch.tensor([0, 1], device=DEVICE[backend])
    got = ensemble_summary(*inputs, bins=4, backend=backend)
    # Ties go to the first class, and so does the second example: wrong. Confidences 3/4 and 1/2 lie
    # on edges of quarters and belong to the bins below.
    truth = EnsembleSummary(
        torch.tensor([0.5, 0]),
        torch.tensor([log(4 / 3) + log(2), log(4) + log(2)]) / 2,
        torch.tensor([0.125 + 0.5, 1.125 + 0.5]) / 2,
        torch.tensor([0.25 + 0.5, 0.75 + 0.5]) / 2,
        *torch.tensor([0.5, log(2), 0.5, 0.0]),  # 1/2 twice in one bin, right once
        *torch.tensor([log(2), (log(2) + 0.75 * log(0.75) + 0.25 * log(0.25)) / 2]),
    )
    for name, value, want in zip(got._fields, got, truth, strict=True):
        assert value.dtype == torch.float32 and value.shape == want.shape
        torch.testing.assert_close(
            value.cpu(), want, rtol=1e-6, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
@pytest.mark.parametrize("votes", range(8, 15))
def test_a_confidence_on_an_edge_belongs_to_the_bin_below(votes, backend):
    # 15 members vote, so that the first confidence is votes / 15, an edge of 15 bins, to the bit;
    # the second lies in the bin above. One is right and one wrong: in one bin they would cancel.
    logits = torch.full((15, 2, 2), -inf)
    logits[:votes, 0, 0] = logits[votes:, 0, 1] = 0
    inside = (votes + 0.5) / 15
    logits[:, 1] = torch.tensor([inside, 1 - inside]).log()
    targets = torch.tensor([0, 1])
    got = ensemble_summary(logits.to(DEVICE[backend]), targets.to(DEVICE[backend]), backend=backend)
    assert got.ece.item() == pytest.approx((1 - votes / 15 + inside) / 2, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("C", [10, 500])
def test_facts_of_the_mathematics(C, backend):
    logits, targets = (t.to(DEVICE[backend]) for t in random_case(4, 300, C))
    got = ensemble_summary(logits, targets, backend=backend)
    assert got.nll <= got.member_nll.mean() and got.brier <= got.member_brier.mean()  # Jensen
    assert 0 < got.mutual_information < got.entropy < log(C)
    one = ensemble_summary(logits[:1], targets, backend=backend)
    assert one.mutual_information == 0
    for name in ("accuracy", "nll", "brier", "ece"):
        single, own = getattr(one, name), getattr(one, f"member_{name}")[0]
        torch.testing.assert_close(single, own, rtol=1e-6, atol=1e-7)  # another order of rounding
        assert torch.equal(own, getattr(got, f"member_{name}")[0])
    # With two members the mutual information is their Jensen-Shannon divergence.
    two = ensemble_summary(logits[:2], targets, backend=backend, ignore_index=-100)
    js = pairwise_divergence(logits[:2][:, targets != -100], backend=backend)[0, 1]
    torch.testing.assert_close(two.mutual_information, js, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("C", [10, 500])
def test_nearly_equal_members_keep_their_digits(C, backend):
    logits = torch.randn(1, 200, C) + 1e-3 * torch.randn(4, 200, C)
    targets = torch.zeros(200, dtype=torch.int64)
    truth = ensemble_summary_reference(logits.double(), targets).mutual_information
    got = ensemble_summary(logits.to(DEVICE[backend]), targets.to(DEVICE[backend]), backend=backend)
    assert 0 < truth < 2e-6
    # 1e-5: the rounding of p to float32, 6e-8, against a step of 1e-3, squared
    torch.testing.assert_close(got.mutual_information.double().cpu(), truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
@pytest.mark.parametrize("C", [10, 70])
def test_ignored_examples_do_not_count(C, backend):
    logits, targets = (t.to(DEVICE[backend]) for t in random_case(3, 100, C))
    used = targets != -100
    truth = ensemble_summary(logits[:, used], targets[used], backend=backend)
    logits[:, ~used] = nan
    got = ensemble_summary(logits, targets, backend=backend)
    other = targets.masked_fill(~used, 2**40)
    again = ensemble_summary(logits, other, backend=backend, ignore_index=2**40)
    for a, b, c in zip(got, again, truth, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)
    nothing = ensemble_summary(logits, torch.full_like(targets, -100), backend=backend)
    empty = ensemble_summary(logits[:, :0], targets[:0], backend=backend)
    assert all(value.isnan().all() for value in (*nothing, *empty))


POISON = {
    "nan": lambda x: x[1, 4].__setitem__(2, nan),
    "+inf": lambda x: x[1, 4].__setitem__(2, inf),
    "row of -inf": lambda x: x[1, 4].fill_(-inf),
    "-inf": lambda x: x[1, 4].__setitem__(2, -inf),
    "-inf at a target": lambda x: x[:, 4].__setitem__((slice(None), 1), -inf),
    "-inf at a target, for one": lambda x: x[1, 4].__setitem__(1, -inf),
    "underflow at a target": lambda x: x[:, 4].__setitem__((slice(None), 1), -300),
    "smallest float": lambda x: x[:, :, 2].fill_(torch.finfo(torch.float32).min),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("C", [5, 80])
@pytest.mark.parametrize("poison", POISON)
def test_extremes_go_where_the_definition_lets_them(poison, C, backend):
    logits, targets = torch.randn(3, 35, C), torch.randint(3, 5, (35,))
    targets[4] = 1
    POISON[poison](logits)
    compare(logits, targets, backend)
    got = ensemble_summary(logits, targets, backend="cpp")
    assert got.member_accuracy.isfinite().all() and got.accuracy.isfinite()
    if poison == "underflow at a target":
        assert got.nll.isfinite()  # where exp(-300) is 0 in float32
    if poison == "-inf at a target":
        assert got.nll == inf and got.brier.isfinite()


@pytest.mark.parametrize("C", [4, 70])
def test_targets_out_of_range(C):
    logits, targets = torch.randn(2, 40, C), torch.zeros(40, dtype=torch.int64)
    for bad in (-1, C, 2**40, -(2**40)):
        targets[37] = targets[39] = bad
        text = rf"targets must be classes in \[0, C\) with C = {C}, or -100 .*; got {bad} for .* 37"
        for x in (logits, logits.double(), logits.clone().requires_grad_()):
            with pytest.raises(IndexError, match=text):
                ensemble_summary(x, targets)
        poisoned = ensemble_summary_reference(logits, targets)
        assert all(value.isnan().all() for value in poisoned[:8])
        assert poisoned.entropy.isfinite() and poisoned.mutual_information.isfinite()


@pytest.mark.gpu
@pytest.mark.parametrize("C", [4, 70])
@pytest.mark.parametrize("backend", ["cuda", "torch"])
def test_targets_out_of_range_on_cuda(backend, C, monkeypatch):
    logits = torch.randn(2, 40, C, device="cuda")
    targets = torch.zeros(40, dtype=torch.int64, device="cuda")
    targets[37] = C
    got = ensemble_summary(logits, targets, backend=backend)
    truth = ensemble_summary_reference(logits.double(), targets)
    torch.testing.assert_close(tuple(got), tuple(t.float() for t in truth), equal_nan=True)
    monkeypatch.setenv("LANDSCAPE_FAST_DEBUG", "1")
    with pytest.raises(IndexError, match="for example 37"):
        ensemble_summary(logits, targets, backend=backend)


def smooth(function):
    """All outputs but the accuracies, which are constant almost everywhere."""
    return lambda *a, **o: [y for k, y in enumerate(function(*a, **o)) if k not in (0, 4)]


def test_is_differentiable_to_any_order():
    logits, targets = random_case(3, 6, 4, scale=1.0)
    op, reference = smooth(ensemble_summary), smooth(ensemble_summary_reference)
    leaf = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tuple(op(x, targets, bins=4)), leaf)
    assert torch.autograd.gradgradcheck(lambda x: tuple(op(x, targets, bins=4)), leaf)
    check_op(op, reference, [logits, targets])
    check_hessian(op, reference, [logits, targets])
    ruled_out = logits.index_fill(2, torch.tensor(3), -inf).requires_grad_()
    ensemble_summary(ruled_out, targets.clamp(max=2)).nll.backward()
    assert ruled_out.grad.isfinite().all() and (ruled_out.grad[..., 3] == 0).all()
    assert not ensemble_summary(leaf, targets).accuracy.requires_grad


@pytest.mark.slow
def test_understands_transforms():
    targets = torch.tensor([0, 1, -100, 3])
    op, reference = smooth(ensemble_summary), smooth(ensemble_summary_reference)
    logits = torch.randn(3, 4, 5)
    check_transforms(
        lambda x, **o: op(x, targets, **o), lambda x: reference(x, targets), [logits], backend="cpp"
    )
    compiled = torch.compile(ensemble_summary, backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, compiled(logits, targets), ensemble_summary(logits, targets)))


def test_registered_op_keeps_the_rules_of_torch():
    logits, targets = random_case(3, 9, 5)
    check_registered(PAGE._summary_op, (logits, targets, 15, -100, "cpp"))
    strided = logits.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    check_registered(PAGE._summary_op, (strided, targets.repeat(2)[::2], 15, -100, "cpp"))


def test_meta_tensors_have_the_shapes_of_the_result():
    logits, targets = (t.to("meta") for t in random_case(3, 9, 5))
    got = ensemble_summary(logits, targets)
    assert [value.shape for value in got] == [(3,)] * 4 + [()] * 6


def test_autocast_changes_nothing():
    logits, targets = random_case(3, 40, 10)
    plain = ensemble_summary(logits, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, ensemble_summary(logits, targets), plain))


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"logits": [1.0]}, TypeError, r"logits must be a Tensor \[M, N, C\]; got list"),
        ({"targets": [1]}, TypeError, r"targets must be a Tensor \[N\]; got list"),
        ({"logits": torch.zeros(4, 5)}, ValueError, r"be \[M, N, C\]; got \[4, 5\]"),
        ({"logits": torch.zeros(0, 4, 5)}, ValueError, r"M and C at least 1; got \[0, 4, 5\]"),
        ({"logits": torch.zeros(3, 4, 0)}, ValueError, r"M and C at least 1; got \[3, 4, 0\]"),
        ({"logits": torch.zeros(3, 4, 5).int()}, ValueError, r"logits must be one of float32"),
        ({"targets": torch.zeros(3).long()}, ValueError, r"\[N\] with N = 4; got \[3\]"),
        ({"targets": torch.zeros(4).int()}, ValueError, r"one of int64; got torch.int32"),
        ({"targets": torch.zeros(4).long().to("meta")}, ValueError, r"of logits, cpu; got meta"),
        ({"bins": 0}, ValueError, r"bins must be an integer in \[1, 4096\]; got 0"),
        ({"bins": 5000}, ValueError, r"bins must be .*; got 5000"),
        ({"bins": 1.5}, ValueError, r"bins must be .*; got 1.5"),
        ({"backend": "cuda"}, ValueError, r"backend 'cuda' .* cannot run here"),
        ({"backend": "numpy"}, ValueError, r"backend must be one of .*; got 'numpy'"),
    ],
)
def test_errors_name_the_argument_the_rule_and_the_value(change, error, text):
    right = {"logits": torch.zeros(3, 4, 5), "targets": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(error, match=rf"ensemble_summary: .*{text}"):
        ensemble_summary(**{**right, **change})
