"""combine and its gradients: the CUDA kernels on the CPU against the definition."""

import pytest
import torch
from cuda_on_cpu.calls import DTYPES
from cuda_on_cpu.shim import CudaError

from landscape_fast.ops.combine import combine_reference
from landscape_fast.testing import assert_as_exact, fenced


def rows_of(sizes, K, M, *, flat, wanted=lambda part: True):
    """CombinePart of csrc/api.h for each part: all parts of a model side by side (`flat`), or the
    anchors and models of each part; empty parts have no row."""
    rows, start, P = [], 0, sum(sizes)
    for part, size in enumerate(sizes):
        if flat:
            places = (start, P, start, P, start, P)
        else:
            places = (K * start, size, M * start, size, K * start, size)
        if not wanted(part):
            places = (*places[:4], -1, 0)
        rows += [(size, *places, part)] if size else []
        start += size
    return rows


def split(flat, sizes):
    """The tensors [models, size] of each part, from storage laid out by `rows_of(flat=False)`."""
    models = flat.shape[0]
    parts = flat.flatten().split([models * size for size in sizes])
    return [part.view(models, -1) for part in parts]


def references(coeffs, anchors, dweights, sizes):
    """weights, danchors, dcoeffs in the dtype of `anchors`; `anchors` a tensor or a list."""
    coeffs = coeffs.detach().requires_grad_()
    if isinstance(anchors, torch.Tensor):
        leaves = anchors = anchors.detach().requires_grad_()
        weights = combine_reference(coeffs, anchors, sizes=sizes if coeffs.ndim == 3 else None)
        weights.backward(dweights)
        return weights.detach(), leaves.grad, coeffs.grad
    leaves = [a.detach().requires_grad_() for a in anchors]
    weights = combine_reference(coeffs, leaves)
    torch.autograd.backward(weights, dweights)
    flat = torch.cat([w.detach().flatten() for w in weights])
    return flat, torch.cat([a.grad.flatten() for a in leaves]), coeffs.grad


def check(kernels, M, K, sizes, *, flat=True, per_part=False, dtype=torch.float32, coeffs=None):
    P, L = sum(sizes), len(sizes)
    if coeffs is None:
        coeffs = fenced(torch.randn(M, L, K) if per_part else torch.randn(M, K))
    anchors, dweights = (fenced(torch.randn(n, P).to(dtype)) for n in (K, M))
    rows = rows_of(sizes, K, M, flat=flat)

    def expected(dtype):
        a, dw = anchors.to(dtype), dweights.to(dtype)
        c = coeffs.to(torch.promote_types(coeffs.dtype, dtype))
        if not flat:
            a, dw = split(a, sizes), split(dw, sizes)
        return references(c, a, dw, sizes)

    truths, plains = expected(torch.float64), expected(dtype)
    weights = kernels.combine_into(coeffs, anchors, torch.full((M, P), 7.0).to(dtype), rows)
    assert_as_exact("weights", weights.flatten(), plains[0].flatten(), truths[0].flatten())
    danchors = torch.full((K, P), 7.0).to(dtype)
    dcoeffs = coeffs.new_full(coeffs.shape, 7.0).contiguous()
    danchors, dcoeffs = kernels.combine_backward_into(
        coeffs, anchors, dweights, (danchors, dcoeffs), rows
    )
    assert_as_exact("danchors", danchors.flatten(), plains[1].flatten(), truths[1].flatten())
    assert_as_exact("dcoeffs", dcoeffs, plains[2].to(dcoeffs.dtype), truths[2])


# Sizes: one element; less, as much and more than a block takes; odd, so that rows are not aligned
SIZES = [[1], [1000], [1024], [4099], [12, 2048, 5, 3000], [8, 4096, 64]]


@pytest.mark.parametrize("flat", [True, False], ids=["flat", "list"])
@pytest.mark.parametrize("K", [1, 3, 4, 7, 8, 11])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_agrees_with_the_definition(kernels, sizes, K, flat):
    check(kernels, 5, K, sizes, flat=flat, per_part=False)
    check(kernels, 3, K, sizes, flat=flat, per_part=True)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("K", [3, 7, 11])
@pytest.mark.parametrize("sizes", [[1], [4099], [16, 2048, 8, 3000]], ids=str)
def test_every_dtype(kernels, sizes, K, dtype):
    check(kernels, 9, K, sizes, dtype=dtype)
    check(kernels, 2, K, sizes, dtype=dtype, flat=False, per_part=True)
    check(kernels, 2, K, sizes, dtype=dtype, coeffs=torch.randn(2, K).to(dtype))


@pytest.mark.parametrize("M", [1, 8, 17, 300])
@pytest.mark.parametrize("K", [2, 8, 9])
def test_any_number_of_members(kernels, M, K):
    """More than are in registers, and than have coefficients in shared memory, at once."""
    check(kernels, M, K, [70], flat=True, per_part=False)


def test_more_parts_than_a_launch_takes(kernels):
    sizes = [1 + part % 7 for part in range(520)]
    check(kernels.quick(), 2, 3, sizes, flat=False, per_part=True)
    check(kernels.quick(), 2, 3, sizes, flat=True, per_part=False)


def test_blocks_of_several_fragments(kernels):
    check(kernels.quick(), 1, 2, [2 * 1056 * 1024 + 77])


def test_coefficients_of_any_strides(kernels):
    check(kernels, 4, 3, [50, 7], coeffs=torch.randn(3, 4).T)
    check(kernels, 4, 3, [50, 7], coeffs=torch.randn(3, 2, 9)[..., 1::2].permute(2, 1, 0))
    check(kernels, 4, 3, [50, 7], coeffs=torch.randn(4, 1, 3).expand(4, 2, 3).clone())


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_rows_that_are_not_aligned(kernels, offset):
    """The same numbers wherever the storage begins and however far rows are apart."""
    M, K, P = 3, 2, 2000
    coeffs, storage = torch.randn(M, K), torch.randn(K, P + 12)
    anchors = storage[:, offset : offset + P]
    rows = [(P, 0, P + 12, offset, P + 4, -1, 0, 0)]
    weights = kernels.combine_into(coeffs, anchors, torch.full((M, P + 4), 7.0), rows)
    assert (weights.flatten()[:offset] == 7).all() and (weights[:-1, P + offset :] == 7).all()
    want = coeffs @ anchors
    got = weights.flatten()[offset:].as_strided((M, P), (P + 4, 1), offset)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # the order of two products


def test_only_what_is_wanted(kernels):
    M, K, sizes = 4, 3, [9, 5, 40]
    coeffs, anchors, dweights = torch.randn(M, 3, K), torch.randn(K, 54), torch.randn(M, 54)
    _, want_danchors, want_dcoeffs = references(coeffs, anchors, dweights, sizes)
    rows = rows_of(sizes, K, M, flat=True, wanted=lambda part: part != 1)
    full = torch.full((K, 54), 7.0)
    danchors, none = kernels.combine_backward_into(coeffs, anchors, dweights, (full, None), rows)
    assert none is None and (danchors[:, 9:14] == 7).all()
    keep = [*range(9), *range(14, 54)]
    torch.testing.assert_close(danchors[:, keep], want_danchors[:, keep])
    out = torch.full((M, 3, K), 7.0)
    none, dcoeffs = kernels.combine_backward_into(coeffs, anchors, dweights, (None, out), rows[:2])
    torch.testing.assert_close(dcoeffs[:, :2], want_dcoeffs[:, :2])
    assert none is None and (dcoeffs[:, 2] == 7).all()  # a part that is not listed


def test_infinities_and_nan_spread_as_in_a_matmul(kernels):
    anchors = torch.tensor([[1.0, float("inf"), 2.0, float("nan")], [1.0, 1.0, -float("inf"), 0.0]])
    coeffs = torch.tensor([[0.0, 1.0], [1.0, -1.0], [1.0, 0.0]])
    got = kernels.combine_into(coeffs, anchors, torch.empty(3, 4), rows_of([4], 2, 3, flat=True))
    torch.testing.assert_close(got, coeffs @ anchors, rtol=0, atol=0, equal_nan=True)


def test_limits(kernels):
    anchors = torch.randn(12289, 1)
    rows = rows_of([1], 12289, 1, flat=True)
    with pytest.raises(CudaError, match="1"):
        kernels.combine_into(torch.randn(1, 12289), anchors, torch.empty(1, 1), rows)
    coeffs, rows = torch.randn(1, 12288) / 100, rows_of([1], 12288, 1, flat=True)
    got = kernels.combine_into(coeffs, anchors[:-1], torch.empty(1, 1), rows)
    truth = coeffs.double() @ anchors[:-1].double()
    assert_as_exact("weights", got, coeffs @ anchors[:-1], truth)
    nothing = kernels.combine_into(torch.randn(0, 2), anchors[:2], torch.empty(0, 1), rows)
    assert nothing.numel() == 0
