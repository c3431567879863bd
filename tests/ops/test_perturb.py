"""perturb: every form on every backend against the definition, and what its users count on."""

import pytest
import torch

from landscape_fast import _extension
from landscape_fast.ops._perturb_parts import perturb_backward_op, perturb_op
from landscape_fast.ops.perturb import perturb, perturb_reference
from landscape_fast.testing import (
    check_hessian,
    check_op,
    check_registered,
    check_transforms,
    fenced,
)

GPU = torch.cuda.is_available()
NO_CPP = pytest.mark.skipif(_extension.C is None or GPU, reason="CPU tensors and the extension")
CPP = pytest.param("cpp", marks=NO_CPP)
BACKENDS = ["triton", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),  # not to be trusted when interpreted
]


def noisy(function):
    """Both kinds of randomness, with all that can be differentiated as positional arguments."""

    def call(weights, sigma, scale, **options):
        about = {"members": scale.shape[0], "scale": scale, "sigma": sigma}
        dropout = torch.linspace(0, 0.6, scale.shape[0], device=scale.device).to(scale.dtype)
        return function(weights, 2**63 + 11, dropout=dropout, first_member=5, **about, **options)

    return call


def inputs_of(M, P, device, weights=None, sigma=None):
    shapes = (weights or (M, P), sigma or (M, P))
    made = [torch.randn(shapes[0], device=device), torch.rand(shapes[1], device=device)]
    return *made, torch.rand(M, device=device)


# one element, less than a group of four, a tile and a bit, two tiles of the C++ kernel
SHAPES = [(1, 1), (3, 3), (2, 1031), (2, 2048)]


@pytest.mark.parametrize("backend", [CPP, *BACKENDS])
@pytest.mark.parametrize("M, P", SHAPES)
def test_agrees_with_the_definition(M, P, backend, device):
    for weights, sigma in (((M, P), (M, P)), ((P,), (1, P)), ((1, P), (M, P)), ((M, P), (P,))):
        given = inputs_of(M, P, device, weights, sigma)
        check_op(noisy(perturb), noisy(perturb_reference), given, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("M, P", SHAPES)
def test_low_precision(M, P, dtype, backend, device):
    given = inputs_of(M, P, device, sigma=(P,))
    check_op(noisy(perturb), noisy(perturb_reference), given, dtype=dtype, backend=backend)
    weights = given[0].to(dtype)  # computed in float32 and rounded once
    about = {"sigma": given[1], "scale": given[2], "dropout": 0.25, "backend": backend}
    wide = perturb(weights.float(), 1, **about)
    assert torch.equal(perturb(weights, 1, **about), wide.to(dtype))


@pytest.mark.parametrize("backend", [CPP, *BACKENDS])
@pytest.mark.parametrize(
    "options",
    [{}, {"scale": 0.1}, {"scale": 0.0}, {"scale": 0.0, "dropout": 0.5}, {"dropout": 0.9}],
    ids=str,
)
def test_numbers_as_options(options, backend, device):
    def call(function):
        return lambda w, **o: function(w, 3, members=2, **options, **o)

    check_op(call(perturb), call(perturb_reference), [torch.randn(300, device=device)],
             backend=backend)  # fmt: skip
    if options.get("scale") == 0 and "dropout" not in options:
        w = torch.randn(2, 9, device=device)
        assert torch.equal(perturb(w, 3, **options, backend=backend), w)


# -- what its users count on -----------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", CPP, *BACKENDS])
def test_a_value_depends_on_seed_member_and_element_alone(backend, device):
    w = torch.zeros(1500, device=device)
    about = {"dropout": 0.3, "backend": backend}
    whole = perturb(w, 9, members=7, first_member=2, **about)
    alone = [perturb(w, 9, first_member=2 + m, **about) for m in range(7)]
    assert torch.equal(whole, torch.cat(alone))  # so any batch of members gives the same models
    for P in (3, 1025):
        assert torch.equal(whole[:, :P], perturb(w[:P], 9, members=7, first_member=2, **about))
    assert torch.equal(whole, perturb(w.expand(7, -1), torch.tensor(9, device=device),
                                      first_member=2, **about))  # fmt: skip
    others = [perturb(w, 10, **about), perturb(w, 9 + 2**32, **about), perturb(w, 9, **about)]
    for i, other in enumerate(others):  # neither half of the seed is forgotten, nor the member
        for another in (*others[:i], *whole):
            assert not torch.equal(other[0], another)
    assert not (whole[0] == whole[1])[whole[0] != 0].any()


@pytest.mark.parametrize("backend", [CPP, *BACKENDS])
def test_every_backend_drops_the_same_elements(backend, device):
    """The comparison is of integers: not one of 120,000 elements may differ."""
    w = torch.ones(30_000, device=device)
    for seed in (0, 2**64 - 1):
        about = {"members": 2, "first_member": 2**32 - 2, "scale": 0.0, "dropout": 1 / 3}
        assert torch.equal(
            perturb(w, seed, **about, backend=backend), perturb_reference(w, seed, **about)
        )


@pytest.mark.parametrize("backend", ["torch", CPP, *BACKENDS])
def test_masks_and_noise_are_independent_of_one_another(backend, device):
    w = torch.zeros(4000, device=device)
    noise = perturb(w, 4, backend=backend)
    both = perturb(w, 4, dropout=0.5, backend=backend)
    kept = both != 0
    torch.testing.assert_close(both[kept], 2 * noise[kept], rtol=0, atol=0)
    r = torch.corrcoef(torch.stack([kept[0].float(), noise[0].abs()]))[0, 1]
    assert r.abs() < 5 / 4000**0.5


@pytest.mark.parametrize("backend", ["torch", CPP, *BACKENDS])
def test_nothing_random_is_kept_for_the_backward(backend, device):
    kept = []

    def pack(t):
        kept.append(t.untyped_storage().data_ptr())
        return t

    w, sigma, scale = (t.requires_grad_() for t in inputs_of(3, 40, device, weights=(40,)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = perturb(w, 1, members=3, sigma=sigma, scale=scale, dropout=0.5, backend=backend)
    if backend != "torch":
        assert set(kept) <= {t.untyped_storage().data_ptr() for t in (w, sigma, scale)}
    first = torch.autograd.grad(y.sin().sum(), (w, sigma, scale), retain_graph=True)
    again = torch.autograd.grad(y.sin().sum(), (w, sigma, scale))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("backend", ["torch", CPP, *BACKENDS])
def test_only_the_gradients_that_are_asked_for(backend, device):
    for wanted in ((0,), (1,), (2,), (0, 2), (1, 2)):
        results = []
        for function, options in ((perturb, {"backend": backend}), (perturb_reference, {})):
            torch.manual_seed(1)
            given = list(inputs_of(2, 70, device, sigma=(70,)))
            for i in wanted:
                given[i].requires_grad_()
            noisy(function)(*given, **options).sin().sum().backward()
            results.append([t.grad for t in given])
        for got, plain in zip(*results, strict=True):
            assert (got is None) == (plain is None)
            if got is not None:
                torch.testing.assert_close(got, plain)


@NO_CPP
def test_threads_change_nothing():
    given = [t.requires_grad_() for t in inputs_of(3, 40_000, "cpu", weights=(40_000,))]
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y = noisy(perturb)(*given, backend="cpp")
        results.append([y, *torch.autograd.grad(y.sin().sum(), given)])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@NO_CPP
@pytest.mark.usefixtures("isa")
def test_every_instruction_set():
    given = inputs_of(2, 5001, "cpu", sigma=(5001,))
    check_op(noisy(perturb), noisy(perturb_reference), given, backend="cpp")


@pytest.mark.parametrize("backend", ["torch", CPP, *BACKENDS])
def test_strides_nan_and_nothing(backend, device):
    rows = fenced(torch.randn(4, 3, 90, device=device))[::2, 1, 3:80]
    about = {"sigma": rows.abs(), "dropout": 0.5, "backend": backend}
    assert torch.equal(perturb(rows, 1, **about), perturb(rows.contiguous(), 1, **about))
    w = torch.tensor([float("nan"), float("inf"), 1.0], device=device)
    got = perturb(w, 0, sigma=torch.tensor([1.0, 1.0, float("nan")], device=device),
                  backend=backend)  # fmt: skip
    assert got[0, [0, 2]].isnan().all() and got[0, 1] == float("inf")
    for M, P in ((0, 5), (3, 0), (0, 0)):
        given = [t.requires_grad_() for t in inputs_of(M, P, device, weights=(P,), sigma=(P,))]
        y = noisy(perturb)(*given, backend=backend)
        assert y.shape == (M, P)
        grads = torch.autograd.grad(y.sum(), given)
        assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


# -- autograd, transforms, compilation -------------------------------------------------------------


def test_float64_gradients(device):
    given = [t.double().requires_grad_() for t in inputs_of(2, 5, device, weights=(5,))]
    assert torch.autograd.gradcheck(noisy(perturb), given)
    assert torch.autograd.gradgradcheck(noisy(perturb), given)


@pytest.mark.parametrize("backend", [CPP, *BACKENDS])
def test_hessians(backend, device):
    for weights, sigma in (((6,), (2, 6)), ((2, 6), (6,))):
        given = inputs_of(2, 6, device, weights, sigma)
        check_hessian(noisy(perturb), noisy(perturb_reference), given, backend=backend)


@pytest.mark.parametrize("backend", [CPP, *BACKENDS[1:]])
def test_transforms_and_compile(backend, device):
    given = inputs_of(2, 6, device, weights=(6,), sigma=(6,))
    check_transforms(noisy(perturb), noisy(perturb_reference), given, backend=backend)


def test_a_new_seed_in_a_tensor_is_no_new_graph(device):
    w = torch.zeros(8, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(lambda s: perturb(w, s), backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (1, 2, -3):
            seed = torch.tensor(seed, device=device)
            assert torch.equal(compiled(seed), perturb(w, seed))


@pytest.mark.parametrize("backend", [CPP, *BACKENDS])
def test_registered_ops(backend, device):
    w, sigma, scale = inputs_of(2, 9, device, weights=(9,))
    rest = (w, sigma, scale, None, None, 1.0, 0.5, 7, 2, 0, backend)
    check_registered(perturb_op, rest)
    check_registered(perturb_backward_op, (torch.randn(2, 9, device=device), *rest, [True] * 3))


def test_autocast_and_meta(device):
    w = torch.randn(2, 30, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        under = perturb(w, 1, dropout=0.5)
    assert torch.equal(under, perturb(w, 1, dropout=0.5))
    assert perturb(torch.empty(5, device="meta"), 1, members=3).shape == (3, 5)


# -- errors ----------------------------------------------------------------------------------------

W = torch.zeros(2, 6)


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"weights": 1.0}, TypeError, "weights must be a Tensor"),
        ({"weights": torch.zeros(1, 1, 1)}, ValueError, r"weights must be \[M, P\] or \[P\]"),
        ({"weights": W.int()}, ValueError, "weights must be one of float32"),
        ({"weights": W.t()}, ValueError, "weights must be of unit stride along P.*contiguous"),
        ({"seed": -1}, ValueError, r"seed must be an integer in \[0, 2\^64\); got -1"),
        ({"seed": 2**64}, ValueError, "seed must be"),
        ({"seed": 1.5}, ValueError, "seed must be"),
        ({"seed": torch.tensor(1.0)}, ValueError, "seed must be .* 0-dim int64 Tensor"),
        ({"seed": torch.tensor([1])}, ValueError, "seed must be .* 0-dim int64 Tensor"),
        ({"members": 3}, ValueError, "members must be None or M = 2"),
        ({"members": -1, "weights": W[0]}, ValueError, "members must be an integer of at least 0"),
        ({"first_member": -1}, ValueError, "first_member must be an integer"),
        ({"first_member": 2**32 - 1}, ValueError, "first_member must be an integer"),
        ({"scale": "1"}, TypeError, "scale must be a number or a Tensor"),
        ({"scale": torch.ones(3)}, ValueError, r"scale must be \[M\] with M = 2"),
        ({"scale": torch.ones(2).half()}, ValueError, "scale must be of the dtype of weights"),
        ({"dropout": True}, TypeError, "dropout must be a number or a Tensor"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\); got 1.0"),
        ({"dropout": torch.ones(2, 1)}, ValueError, r"dropout must be \[M\] with M = 2"),
        ({"sigma": 1.0}, TypeError, "sigma must be a Tensor"),
        ({"sigma": torch.ones(5)}, ValueError, r"sigma must be \[P\] with P = 6"),
        ({"sigma": torch.ones(3, 6)}, ValueError, r"sigma must be \[M, P\] with M = 2"),
        ({"sigma": W.double()}, ValueError, "sigma must be of the dtype of weights"),
        ({"sigma": torch.ones(6, 2).t()}, ValueError, "sigma must be of unit stride along P"),
        ({"backend": "metal"}, ValueError, "backend must be one of"),
    ],
)
def test_errors(change, error, text):
    arguments = {"weights": W, "seed": 1} | change
    with pytest.raises(error, match=f"^perturb: {text}"):
        perturb(**arguments)
