"""Every shipped configuration of subspace_linear runs on this GPU and is right.

The op itself takes the one it expects to be quickest, so most would otherwise wait for a user.
"""

import pytest
import torch

from landscape_fast.ops.subspace_linear import subspace_linear_reference
from landscape_fast.testing import assert_as_exact, fenced

pytest.importorskip("triton")
from landscape_fast.kernels import subspace_linear_tiles as tiles  # noqa: E402
from landscape_fast.kernels._launch import arch  # noqa: E402
from landscape_fast.kernels.subspace_linear import subspace_linear_product  # noqa: E402
from landscape_fast.kernels.subspace_linear_backward import (  # noqa: E402
    subspace_linear_bwd_weight,
)

pytestmark = pytest.mark.gpu
BUCKETS = sorted({bucket for _, bucket in tiles.SHIPPED})
M, B, I, O = 3, 200, 264, 328  # no tile fits, yet rows are aligned to 16 bytes


def problem(kind, K, device):
    """x, anchors, coeffs, bias, dy in the dtype of `kind`; without coeffs where K is 0."""
    dtype = torch.bfloat16 if kind == "half" else torch.float32
    anchors = torch.randn(K or M, O, I) / I**0.5
    made = [torch.randn(M, B, I), anchors, torch.randn(M, K), torch.randn(K or M, O)]
    x, anchors, coeffs, bias = (t.to(device, dtype) for t in made)
    return x, anchors, coeffs if K else None, bias, torch.randn(M, B, O).to(device, dtype)


def results(*arguments):
    """y, dx and the gradients of the members' own weights and biases, by the definition."""
    x, anchors, coeffs, bias, dy = arguments
    if coeffs is not None:
        anchors, bias = (torch.tensordot(coeffs, t, 1) for t in (anchors, bias))
    leaves = [t.detach().requires_grad_() for t in (x, anchors, bias)]
    y = subspace_linear_reference(leaves[0], leaves[1], None, leaves[2])
    names = ("y", "dx", "dweight", "dbias")
    return dict(zip(names, (y.detach(), *torch.autograd.grad(y, leaves, dy)), strict=True))


def launched(stage, config, tf32, arguments):
    """What the kernel of `stage` computes with `config`, in memory that held NaN."""
    x, weight, coeffs, bias, dy = arguments
    if stage == "weight":
        dweight, dbias = (torch.full_like(t, float("nan")) for t in (weight, bias))
        subspace_linear_bwd_weight(dy, x, dweight, dbias, tf32, config=config)
        return {"dweight": dweight, "dbias": dbias}
    y, dx = (torch.full_like(t, float("nan")) for t in (dy, x))
    subspace_linear_product(x, weight, coeffs, bias, y, tf32, config=config)
    subspace_linear_product(dy, weight, coeffs, None, dx, tf32, True, config=config)
    return {"y": y, "dx": dx}


@pytest.mark.parametrize("bucket", BUCKETS)
def test_a_shipped_configuration_is_right(bucket, device):
    """Against float64, no worse than twice plain PyTorch with the same matmul precision."""
    stage, kind = bucket.split()[:2]
    for K in (2, tiles.MOST_ANCHORS) if stage == "mixed" else (0,):
        arguments = problem(kind, K, device)
        config = tiles.SHIPPED.get((arch(arguments[0]), bucket))
        if config is None:
            pytest.skip("not a configuration of this architecture")
        truth = results(*[None if t is None else t.double() for t in arguments])
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
        try:
            plain = results(*arguments)
        finally:
            torch.set_float32_matmul_precision(before)
        placed = [None if t is None else fenced(t) for t in arguments]
        got = launched(stage, config, kind == "tf32", placed)
        for name, value in got.items():
            assert_as_exact(f"{bucket} K={K}, {name}", value, plain[name], truth[name])
