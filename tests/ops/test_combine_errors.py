"""The contract of combine: what it refuses, and in which words."""

import sys

import pytest
import torch

from landscape_fast.ops.combine import combine, combine_reference

PAGE = sys.modules[combine.__module__]  # `landscape_fast.ops.combine` is the function
C, A = torch.zeros(4, 2), torch.zeros(2, 5)
LAYERS = torch.zeros(4, 2, 2)
BAD = {
    "coeffs type": ([[1.0]], A, {}, TypeError, r"coeffs must be a Tensor \[M, K\] or .*; got list"),
    "coeffs ndim": (torch.zeros(2), A, {}, ValueError, r"coeffs must be \[M, K\] or .*; got \[2\]"),
    "anchors type": (C, 3, {}, TypeError, r"anchors must be a Tensor .* or a list .*; got int"),
    "anchors K": (C, A[:1], {}, ValueError, r"anchors must be \[K, P\] with K = 2; got \[1, 5\]"),
    "anchors ndim": (C, A[0], {}, ValueError, r"anchors must be \[K, P\] with K = 2; got \[5\]"),
    "anchors dtype": (C, A.int(), {}, ValueError, r"anchors must be one of float32, .*int32"),
    "anchors stride": (
        C, torch.zeros(5, 2).T, {}, ValueError,
        r"anchors must be of unit stride along P; got strides \(1, 2\); call .contiguous\(\) once",
    ),
    "coeffs dtype": (
        C.half(), A, {}, ValueError,
        r"coeffs must be float32 or of the dtype of anchors, float32; got float16",
    ),
    "coeffs device": (
        torch.zeros(4, 2, device="meta"), A, {}, ValueError,
        r"coeffs must be on the device of anchors, cpu; got meta",
    ),
    "no sizes": (
        LAYERS, A, {}, ValueError,
        r"sizes must be given with coeffs \[M, L, K\]; got None; sizes=\(P,\) makes one part",
    ),
    "sizes sum": (
        LAYERS, A, {"sizes": (2, 2)}, ValueError,
        r"sizes must be L = 2 sizes of parts with sum P = 5; got \(2, 2\)",
    ),
    "sizes number": (LAYERS, A, {"sizes": [5]}, ValueError, r"must be L = 2 sizes .*; got \(5,\)"),
    "sizes sign": (LAYERS, A, {"sizes": (6, -1)}, ValueError, r"L = 2 sizes .*; got \(6, -1\)"),
    "sizes unneeded": (C, A, {"sizes": (2, 2)}, ValueError, r"sum P = 5; got \(2, 2\)"),
    "list sizes": (C, [A], {"sizes": (5,)}, ValueError, r"sizes must be None for a list, .*\(5,\)"),
    "list length": (
        LAYERS, [A], {}, ValueError,
        r"coeffs must be \[M, L, K\] with L = 1, the number of anchor tensors; got \[4, 2, 2\]",
    ),
    "list item": (C, [A, 1], {}, TypeError, r"anchors\[1\] must be a Tensor \[K, ...\]; got int"),
    "list K": (C, [A, A[:1]], {}, ValueError, r"anchors\[1\] must be .* K = 2; got \[1, 5\]"),
    "list scalar": (C, [torch.zeros(())], {}, ValueError, r"anchors\[0\] must be .*; got \[\]"),
    "list dtype": (
        C, [A, A.half()], {}, ValueError,
        r"anchors\[1\] must be of the dtype of anchors\[0\], float32; got float16; make one call",
    ),
    "list device": (
        C, [A, A.to("meta")], {}, ValueError,
        r"anchors\[1\] must be on the device of anchors\[0\], cpu; got meta",
    ),
    "list ints": (C, [A.int()], {}, ValueError, r"anchors must be one of float32, .*; got int32"),
    "out of a list": (C, [A], {"out": torch.zeros(4, 5)}, ValueError, r"out must be None for a"),
    "out type": (
        C, A.clone().requires_grad_(), {"out": 5}, TypeError,
        r"out must be a Tensor \[M, P\]; got int",
    ),
    "out in a graph": (
        C, A.clone().requires_grad_(), {"out": torch.zeros(4, 5)}, ValueError,
        r"out must be None for a list, or where a gradient is recorded; got Tensor",
    ),
    "out shape": (
        C, A, {"out": torch.zeros(4, 4)}, ValueError,
        r"out must be \[M, P\] with M = 4, P = 5; got \[4, 4\]",
    ),
    "out dtype": (
        C, A, {"out": torch.zeros(4, 5).half()}, ValueError,
        r"out must be of the dtype of anchors, float32; got float16",
    ),
    "out strides": (
        C, A, {"out": torch.zeros(5, 4).T}, ValueError,
        r"out must be contiguous; got strides \(1, 4\)",
    ),
    "list stride": (
        C, [torch.zeros(2, 3, 4).mT], {}, ValueError,
        r"anchors\[0\] must be contiguous within each anchor; got strides \(12, 1, 4\); call",
    ),
    "backend": (C, A, {"backend": "gpu"}, ValueError, r"backend must be one of .*; got 'gpu'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_errors_say_what_must_be_and_what_is(case):
    coeffs, anchors, options, error, text = BAD[case]
    with pytest.raises(error, match="^combine: .*" + text):
        combine(coeffs, anchors, **options)


def test_the_cuda_kernel_is_not_given_more_anchors_than_it_takes(monkeypatch, device):
    monkeypatch.setattr(PAGE, "CUDA_ANCHORS", 2)
    asked = []

    def pick(op, backend, tensor):
        asked.append(backend)
        return "cuda" if backend == "auto" else backend

    monkeypatch.setattr(PAGE, "pick", pick)
    coeffs, anchors = torch.randn(2, 3, device=device), torch.randn(3, 5, device=device)
    torch.testing.assert_close(combine(coeffs, anchors), combine_reference(coeffs, anchors))
    assert asked == ["auto", "triton"]
    with pytest.raises(ValueError, match="must be 'triton' or 'torch' for more than 2 anchors"):
        combine(coeffs, anchors, backend="cuda")
