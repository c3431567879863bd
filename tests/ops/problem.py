"""Inputs of the linear op, and what the tests of several ops ask."""

import torch


def inputs(M, B, I, O, layout="member_major", device="cpu", dtype=torch.float32):
    """x, weight, r, s, bias for a layout; "shared" before it where the members share x."""
    rows = {"member_major": (M, B), "batch_major": (B, M), "folded": (M * B,)}
    rows = (B,) if layout.startswith("shared") else rows[layout]
    shapes = ((*rows, I), (O, I), (M, I), (M, O), (M, O))
    return [torch.randn(*shape, dtype=dtype).to(device) for shape in shapes]


def keyword(layout):
    """The layout that the op is told."""
    return {"shared": "member_major"}.get(layout, layout.removeprefix("shared "))


def gradients(y, tensors, dy=None):
    dy = torch.randn_like(y) if dy is None else dy
    return torch.autograd.grad(y, tensors, dy)


def assert_held(a, b, limit=1e-6):
    """As close to float64 as float32 sums are: rounding to 16 bits on the way would leave 1e-3."""
    error, size = (a.double() - b).norm(), b.norm()
    assert error <= limit * size, f"relative error {error / size:.1e}"
