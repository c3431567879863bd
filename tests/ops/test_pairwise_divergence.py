"""Pairwise divergences: every backend against the definition, and the definition against SciPy."""

import sys
from math import inf, log, nan

import numpy as np
import pytest
import torch

from landscape_fast.ops.pairwise_divergence import (
    pairwise_disagreement,
    pairwise_divergence,
    pairwise_divergence_reference,
)
from landscape_fast.testing import (
    check_hessian,
    check_op,
    check_registered,
    check_transforms,
)

PAGE = sys.modules[pairwise_divergence.__module__]
BACKENDS = ["cpp", pytest.param("cuda", marks=pytest.mark.gpu)]
DEVICE = {"cpp": "cpu", "cuda": "cuda", "auto": "cpu"}
KINDS = ["js", "kl", "disagreement"]
SMOOTH = KINDS[:2]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (M, N, C): ones and primes; few classes go in blocks of 32 examples, 64 and more in rows of 16
SHAPES = [(1, 1, 1), (3, 1, 2), (4, 33, 10), (5, 31, 17), (4, 70, 63), (4, 5, 64), (3, 9, 1031)]


def compare(logits, kind, backend, gradients=True, **options):
    check_op(
        pairwise_divergence,
        pairwise_divergence_reference,
        [logits.to(DEVICE[backend])],
        kind=kind,
        backend=backend,
        gradients=gradients and kind in SMOOTH,
        **options,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_definition(shape, kind, dtype, backend):
    compare(2 * torch.randn(shape), kind, backend, dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("C", [10, 65])
def test_reads_any_strides(C, kind, backend):
    members_last = torch.randn(C, 40, 4).permute(2, 1, 0)
    gaps = torch.randn(4, 80, 2 * C)[:, ::2, 1::2]
    shared = torch.randn(4, 1, C).expand(4, 40, C)
    for logits in (members_last, gaps, shared, torch.randn(5, 41, C)[1:, 1:]):
        compare(logits, kind, backend)


def test_the_definition_agrees_with_scipy():
    jensenshannon = pytest.importorskip("scipy.spatial.distance").jensenshannon
    entropy = pytest.importorskip("scipy.stats").entropy
    logits = 2 * torch.randn(3, 20, 7, dtype=torch.float64)
    p = logits.softmax(-1).numpy()
    js, kl = np.zeros((3, 3)), np.zeros((3, 3))
    for i in range(3):
        for j in range(3):
            js[i, j] = np.mean(jensenshannon(p[i], p[j], axis=-1) ** 2)
            kl[i, j] = np.mean(entropy(p[i], p[j], axis=-1))
    for kind, truth in (("js", js), ("kl", kl)):
        got = pairwise_divergence(logits, kind)
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, torch.from_numpy(truth))
        low = pairwise_divergence(logits.float(), kind)
        assert low.dtype == torch.float32
        torch.testing.assert_close(low, torch.from_numpy(truth).float())


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
def test_hand_made_cases(backend):
    p = torch.tensor([[[0.5, 0.5, 0]], [[1, 0, 0]], [[0, 0, 1]]])
    logits = p.log().to(DEVICE.get(backend, "cpu"))
    half = 0.75 * log(4 / 3)  # JS of (1/2, 1/2) and (1, 0) is this
    js = torch.tensor([[0, half, log(2)], [half, 0, log(2)], [log(2), log(2), 0]])
    kl = torch.tensor([[0, inf, inf], [log(2), 0, inf], [inf, inf, 0]])
    different = torch.tensor([[0.0, 0, 1], [0, 0, 1], [1, 1, 0]])
    for kind, truth in (("js", js), ("kl", kl), ("disagreement", different)):
        got = pairwise_divergence(logits, kind, backend=backend).cpu()
        torch.testing.assert_close(got, truth, rtol=3e-7, atol=0)  # two roundings


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("C", [3, 30, 300])
def test_facts_of_the_mathematics(C, backend):
    logits = 4 * torch.randn(6, 100, C, device=DEVICE[backend])
    logits[5] = logits[0]
    for kind in KINDS:
        d = pairwise_divergence(logits, kind, backend=backend)
        assert (d >= 0).all() and (d.diagonal() == 0).all() and d[0, 5] == d[5, 0] == 0
        if kind != "kl":
            assert torch.equal(d, d.T) and (d <= (log(2) if kind == "js" else 1)).all()
    order = torch.tensor([3, 1, 0, 5, 2, 4], device=logits.device)
    js = pairwise_divergence(logits, backend=backend)
    assert torch.equal(pairwise_divergence(logits[order], backend=backend), js[order][:, order])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", SMOOTH)
@pytest.mark.parametrize("C", [10, 500])
def test_nearly_equal_members_keep_their_digits(C, kind, backend):
    # Steps of 1e-3 in the logits give divergences near 1e-7, the rounding error of an entropy.
    logits = torch.randn(1, 200, C) + 1e-3 * torch.randn(4, 200, C)
    truth = pairwise_divergence_reference(logits.double(), kind)
    got = pairwise_divergence(logits.to(DEVICE[backend]), kind, backend=backend).cpu()
    assert 0 < truth.max() < 2e-6
    # 1e-5 of each entry: the rounding of p to float32, 6e-8, against a step of 1e-3, squared
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=0)


POISON = {
    "nan": lambda x: x[1, 3].__setitem__(2, nan),
    "+inf": lambda x: x[1, 3].__setitem__(2, inf),
    "two +inf": lambda x: x[1, 3].__setitem__(slice(1, 3), inf),
    "row of -inf": lambda x: x[1, 3].fill_(-inf),
    "-inf": lambda x: x[1, 3].__setitem__(2, -inf),
    "-inf for all": lambda x: x[:, :, 2].fill_(-inf),
    "smallest float": lambda x: x[:, :, 2].fill_(torch.finfo(torch.float32).min),
    "largest float": lambda x: x[1, 3].__setitem__(2, torch.finfo(torch.float32).max),
    "underflow": lambda x: x[1, :, 2].fill_(-200),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("C", [5, 80])
@pytest.mark.parametrize("poison", POISON)
def test_extremes_go_where_the_definition_lets_them(poison, C, kind, backend):
    logits = torch.randn(3, 35, C)
    POISON[poison](logits)
    # A logit of the largest float leaves the others no digits, and gradients of inf are NaN.
    compare(logits, kind, backend, gradients=poison not in ("-inf", "largest float"))


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
@pytest.mark.parametrize("kind", KINDS)
def test_no_members_no_examples(kind, backend):
    device = DEVICE.get(backend, "cpu")
    none = pairwise_divergence(torch.empty(0, 5, 3, device=device), kind, backend=backend)
    assert none.shape == (0, 0) and none.dtype == torch.float32
    empty = pairwise_divergence(torch.empty(2, 0, 3, device=device), kind, backend=backend)
    assert empty.shape == (2, 2) and empty.isnan().all()
    if kind in SMOOTH:
        logits = torch.zeros(2, 0, 3, device=device, requires_grad=True)
        pairwise_divergence(logits, kind, backend=backend).sum().backward()
        assert logits.grad.shape == (2, 0, 3)


@pytest.mark.parametrize("kind", SMOOTH)
def test_is_differentiable_to_any_order(kind):
    logits = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: pairwise_divergence(x, kind), logits)
    assert torch.autograd.gradgradcheck(lambda x: pairwise_divergence(x, kind), logits)
    check_hessian(
        lambda x, **o: pairwise_divergence(x, kind, **o),
        lambda x: pairwise_divergence_reference(x, kind),
        [logits.detach()],
        backend="cpp",
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", SMOOTH)
def test_understands_transforms(kind):
    check_transforms(
        lambda x, **o: pairwise_divergence(x, kind, **o),
        lambda x: pairwise_divergence_reference(x, kind),
        [torch.randn(3, 4, 5)],
        backend="cpp",
    )


def test_disagreement_requires_no_gradient():
    logits = torch.randn(3, 4, 5, requires_grad=True)
    for backend in ("cpp", "torch"):
        assert not pairwise_divergence(logits, "disagreement", backend=backend).requires_grad
    assert pairwise_divergence(logits, "js").requires_grad
    with torch.no_grad():
        assert not pairwise_divergence(logits, "js").requires_grad


def test_autocast_changes_nothing():
    logits = torch.randn(3, 40, 10, requires_grad=True)
    plain = pairwise_divergence(logits)
    (grad,) = torch.autograd.grad(plain.sum(), logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = pairwise_divergence(logits)
        (low_grad,) = torch.autograd.grad(low.sum(), logits)
    assert torch.equal(plain, low) and torch.equal(grad, low_grad)


@pytest.mark.parametrize("kind", KINDS)
def test_registered_op_keeps_the_rules_of_torch(kind):
    check_registered(PAGE._divergence_op, (torch.randn(3, 7, 5), kind, "cpp"))
    check_registered(PAGE._divergence_op, (torch.randn(5, 7, 3).permute(2, 1, 0), kind, "cpp"))


def test_meta_tensors_have_the_shape_of_the_result():
    logits = torch.empty(3, 7, 5, device="meta", dtype=torch.bfloat16)
    for kind in KINDS:
        got = pairwise_divergence(logits, kind)
        assert got.device.type == "meta" and got.shape == (3, 3) and got.dtype == torch.float32


def test_many_members_and_many_classes():
    logits = torch.randn(1100, 130, 2)  # so many members that the chunks are fewer
    few = pairwise_divergence(logits[:3])
    torch.testing.assert_close(pairwise_divergence(logits)[:3, :3], few)
    compare(torch.randn(2, 3, 50_000), "js", "cpp")
    compare(torch.randn(2, 3, 50_000), "kl", "cpp")


@pytest.mark.parametrize("make", [lambda: [1.0], lambda: None])
def test_wants_a_tensor(make):
    with pytest.raises(TypeError, match=r"_divergence: logits must be a Tensor \[M, N, C\]; got"):
        pairwise_divergence(make())
    with pytest.raises(TypeError, match=r"_disagreement: labels must be a Tensor \[M, N\]; got"):
        pairwise_disagreement(make())


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda x: pairwise_divergence(x[0]), r"logits must be \[M, N, C\]; got \[4, 5\]"),
        (lambda x: pairwise_divergence(x[..., :0]), r"C at least 1; got \[3, 4, 0\]"),
        (
            lambda x: pairwise_divergence(x.long()),
            r"logits must be one of float32, .*; got .*int64",
        ),
        (lambda x: pairwise_divergence(x, "tv"), r"kind must be 'js', 'kl' or .*; got 'tv'"),
        (lambda x: pairwise_divergence(x, backend="triton"), r"backend must be one of .*'triton'"),
        (lambda x: pairwise_divergence(x, backend="cuda"), r"backend 'cuda' .* cannot run here"),
        (
            lambda x: pairwise_divergence(x.double(), backend="cpp"),
            r"backend 'cpp' .* cannot run here: it takes .* got torch.float64",
        ),
        (lambda x: pairwise_disagreement(x.long()), r"labels must be \[M, N\]; got \[3, 4, 5\]"),
        (lambda x: pairwise_disagreement(x[0]), r"labels must be one of int64, .*float32"),
    ],
)
def test_errors_name_the_argument_the_rule_and_the_value(call, text):
    with pytest.raises(ValueError, match=text):
        call(torch.zeros(3, 4, 5))
