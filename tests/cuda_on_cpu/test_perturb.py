"""perturb, from its public function down to the CUDA source, in every order of threads."""

import sys

import pytest
import torch
from cuda_on_cpu.calls import DTYPES

from landscape_fast.ops import _perturb_parts
from landscape_fast.ops.perturb import perturb, perturb_reference
from landscape_fast.testing import check_op, fenced

PAGE = sys.modules[perturb.__module__]  # `landscape_fast.ops.perturb` is the function


class Extension:
    """What module.cpp offers for perturb, on the CPU; a result is the same in every order."""

    def __init__(self, kernels):
        self.kernels = kernels
        self.perturb_tiles = kernels.perturb_tiles

    def launch(self, entry, like, draw, *rest):
        draw = torch.tensor(draw)
        flat = [n for item in rest for n in (item if isinstance(item, tuple) else (item,))]
        getattr(self.kernels, entry.removesuffix("_cuda"))(draw.data_ptr(), *flat)


@pytest.fixture(autouse=True)
def _cuda_backend_on_the_cpu(kernels, monkeypatch):
    extension = Extension(kernels)
    monkeypatch.setattr(_perturb_parts._extension, "C", extension)
    monkeypatch.setattr(_perturb_parts, "call_cuda", extension.launch)
    monkeypatch.setattr(PAGE, "pick", lambda op, backend, tensor: backend)


def noise_and_masks(function):
    def call(weights, sigma, scale, **options):
        dropout = torch.linspace(0, 0.6, scale.shape[0])
        about = {"sigma": sigma, "scale": scale, "dropout": dropout, "members": scale.shape[0]}
        return function(weights, 3, **about, **options)

    return call


def run_through(inputs, dtype=torch.float32):
    calls = noise_and_masks(perturb), noise_and_masks(perturb_reference)
    check_op(*calls, inputs, dtype=dtype, backend="cuda")


# (M, P): one element, less than a thread's, ragged, a tile, tiles and a bit
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M, P", [(1, 1), (2, 7), (3, 1023), (2, 1024), (3, 2064)])
def test_own_weights_and_deviations(M, P, dtype):
    run_through((torch.randn(M, P), torch.rand(M, P), torch.rand(M)), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M, P", [(1, 5), (5, 1031), (4, 2048)])
def test_shared_weights_and_deviations(M, P, dtype):
    run_through((torch.randn(P), torch.rand(1, P), torch.rand(M)), dtype)
    run_through((torch.randn(1, P), torch.rand(M, P), torch.rand(M)), dtype)
    run_through((torch.randn(M, P), torch.rand(P), torch.rand(M)), dtype)


def test_float32_deviations_of_low_precision_weights():
    weights = torch.randn(2, 100).half()
    about = {"sigma": torch.rand(2, 100), "dropout": 0.2}
    got = perturb(weights, 1, **about, backend="cuda")
    assert torch.equal(got, perturb_reference(weights, 1, **about))


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_rows_that_are_not_aligned(offset):
    storage = fenced(torch.randn(3, 1500))
    rows = storage[:, offset : offset + 1400]
    about = {"sigma": rows.abs(), "dropout": 0.5}
    got, aligned = (perturb(w, 5, **about, backend="cuda") for w in (rows, rows.contiguous()))
    assert torch.equal(got, aligned)


def test_the_order_of_blocks_and_threads_changes_nothing(kernels):
    inputs = torch.randn(1500), torch.rand(3, 1500), torch.rand(3)
    results = []
    for order in kernels.orders:
        leaves = [t.clone().requires_grad_() for t in inputs]
        with kernels.order(*order):
            y = noise_and_masks(perturb)(*leaves, backend="cuda")
            results.append([y, *torch.autograd.grad(y.sin().sum(), leaves)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_seed_on_the_device_and_members_by_number():
    weights = torch.randn(2, 130)
    whole = perturb(weights, 2**64 - 5, members=2, dropout=0.3, backend="cuda")
    seed = torch.tensor(-5)  # the same 64 bits
    assert torch.equal(whole, perturb(weights, seed, dropout=0.3, backend="cuda"))
    second = perturb(weights[1], seed, first_member=1, dropout=0.3, backend="cuda")
    assert torch.equal(whole[1:], second)
