"""combine, from its public function down to the CUDA source: rows, argument order, gradients."""

import sys

import pytest
import torch
from cuda_on_cpu.calls import DTYPES

from landscape_fast.ops import _combine_parts
from landscape_fast.ops.combine import combine, combine_reference
from landscape_fast.testing import assert_as_exact, check_op, fenced

PAGE = sys.modules[combine.__module__]  # `landscape_fast.ops.combine` is the function
LIST = [(0, 2), (3, 5), (), (64, 32), (1031,), (16,)]


class Extension:
    """What module.cpp offers for combine, on the CPU."""

    def __init__(self, kernels):
        self.kernels = kernels

    def combine_cuda(self, rows, *rest):
        table = torch.tensor(rows)
        self.kernels.combine(table.data_ptr(), len(rows), *rest[:-1])  # all but the stream

    def combine_backward_cuda_workspace(self, rows, *rest):
        table = torch.tensor(rows)
        return self.kernels.combine_backward_workspace(table.data_ptr(), len(rows), *rest)

    def combine_backward_cuda(self, rows, *rest):
        table = torch.tensor(rows)
        self.kernels.combine_backward(table.data_ptr(), len(rows), *rest[:-1])


@pytest.fixture(autouse=True)
def _cuda_backend_on_the_cpu(kernels, monkeypatch):
    extension = Extension(kernels)
    monkeypatch.setattr(_combine_parts._extension, "C", extension)
    monkeypatch.setattr(
        _combine_parts, "call_cuda", lambda entry, like, *args: getattr(extension, entry)(*args, 0)
    )
    monkeypatch.setattr(PAGE, "pick", lambda op, backend, tensor: backend)


def listed(coeffs, *anchors, backend):
    return combine(coeffs, list(anchors), backend=backend)


def listed_reference(coeffs, *anchors):
    return combine_reference(coeffs, list(anchors))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M, K, P", [(1, 1, 1), (3, 2, 7), (4, 3, 2064), (3, 17, 530)])
def test_flat(M, K, P, dtype):
    inputs = torch.randn(M, K), torch.randn(K, P)
    check_op(combine, combine_reference, inputs, dtype=dtype, backend="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1030,), (7, 0, 1023), (16, 1000, 14)])
def test_parts(sizes, dtype):
    anchors = torch.randn(3, sum(sizes))
    own = torch.randn(2, len(sizes), 3)
    shared = torch.randn(2, 1, 3).expand(2, len(sizes), 3)  # whose stride of 0 means [M, K] to C++
    for coeffs in (own, shared):
        check_op(
            combine, combine_reference, (coeffs, anchors), dtype=dtype, backend="cuda", sizes=sizes
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [None, (7, 0, 1023)])
def test_a_given_output(sizes, dtype):
    coeffs = torch.randn((3, 3, 2) if sizes else (3, 2))
    anchors = torch.randn(2, 1030).to(dtype)
    out = fenced(torch.full((3, 1030), float("nan"), dtype=dtype))
    assert combine(coeffs, anchors, sizes=sizes, out=out, backend="cuda") is out
    plain = combine_reference(coeffs, anchors, sizes=sizes)
    truth = combine_reference(coeffs.double(), anchors.double(), sizes=sizes)
    assert_as_exact("out", out, plain, truth)
    buffer = out.new_empty(0).set_(out.untyped_storage())
    assert buffer.isfinite().sum() == out.numel()  # the rest is the fence


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layerwise", [False, True])
def test_lists(layerwise, dtype):
    coeffs = torch.randn((2, len(LIST), 3) if layerwise else (2, 3))
    inputs = coeffs, *(torch.randn(3, *shape) for shape in LIST)
    check_op(listed, listed_reference, inputs, dtype=dtype, backend="cuda")


def test_only_the_gradients_that_are_wanted():
    anchors = [torch.randn(3, n) for n in (70, 16, 33)]
    coeffs = torch.randn(2, 3, 3)
    for wanted in ((0,), (2,), (1, 3), (0, 1, 2, 3)):
        results = []
        for function in (lambda *a: listed(*a, backend="cuda"), listed_reference):
            inputs = [t.detach() for t in (coeffs, *anchors)]
            for i in wanted:
                inputs[i].requires_grad_()
            weights = function(*inputs)
            (weights[0].sin().sum() + weights[1].sum()).backward()
            results.append([t.grad for t in inputs])
        for got, plain in zip(*results, strict=True):
            if plain is None:
                assert got is None or not got.any()
            else:
                torch.testing.assert_close(got, plain)
