"""Every shipped configuration of batch_ensemble_linear runs on this GPU and is right.

The op itself takes the one it expects to be quickest, so most would otherwise wait for a user.
"""

import pytest
import torch

from landscape_fast.ops.batch_ensemble_linear import batch_ensemble_linear_reference
from landscape_fast.testing import assert_as_exact, fenced

pytest.importorskip("triton")
from landscape_fast.kernels import batch_ensemble_linear_tiles as tiles  # noqa: E402
from landscape_fast.kernels._launch import arch  # noqa: E402
from landscape_fast.kernels.batch_ensemble_linear import batch_ensemble_linear_fwd  # noqa: E402
from landscape_fast.kernels.batch_ensemble_linear_backward import (  # noqa: E402
    batch_ensemble_linear_bwd,
)

pytestmark = pytest.mark.gpu
BUCKETS = sorted({bucket for _, bucket in tiles.SHIPPED})
M, B, I, O = 3, 200, 264, 328  # no tile fits, yet rows are aligned to 16 bytes
NAMES = ("y", "dx", "dweight", "dr", "ds", "dbias")


def problem(kind, shared, device):
    """x, weight, r, s, bias, dy in the dtype of `kind`."""
    dtype = torch.bfloat16 if kind == "half" else torch.float32
    shapes = ((B, I) if shared else (M, B, I), (O, I), (M, I), (M, O), (M, O), (M, B, O))
    made = [torch.randn(shape) for shape in shapes]
    made[1] /= I**0.5
    made[2:4] = [1 + 0.3 * t for t in made[2:4]]
    return [t.to(device, dtype) for t in made]


def results(*arguments):
    """y and all gradients of the definition, by name."""
    *inputs, dy = arguments
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = batch_ensemble_linear_reference(*leaves)
    return dict(zip(NAMES, (y.detach(), *torch.autograd.grad(y, leaves, dy)), strict=True))


def launched(stage, config, tf32, arguments):
    """What the kernel of `stage` computes with `config`, in memory that held NaN."""
    x, weight, r, s, bias, dy = arguments
    wanted = {
        "fwd": ("y",),
        "x": ("dx", "dr"),
        "x shared": ("dx", "dr"),
        "weight": ("dweight", "ds", "dbias"),
        "weight+r": ("dweight", "dr", "ds", "dbias"),
    }[stage]
    like = dict(zip(NAMES, (dy, x, weight, r, s, bias), strict=True))
    out = {name: torch.full_like(like[name], float("nan")) for name in wanted}
    if stage == "fwd":
        batch_ensemble_linear_fwd(x, weight, r, s, bias, out["y"], tf32, config=config)
        return out
    gradients = [out.get(name) for name in NAMES[1:]]
    if stage.startswith("x"):
        options = {"x_config": config}
    else:
        options = {"weight_config": config, "dr_with_dx": False}
    batch_ensemble_linear_bwd(dy, x, weight, r, s, *gradients, tf32, **options)
    return out


@pytest.mark.parametrize("bucket", BUCKETS)
def test_a_shipped_configuration_is_right(bucket, device):
    """Against float64, no worse than twice plain PyTorch with the same matmul precision."""
    stage, kind = bucket.removesuffix(" tma").rsplit(" ", 2)[:2]
    arguments = problem(kind, stage == "x shared", device)
    config = tiles.SHIPPED.get((arch(arguments[0]), bucket))
    if config is None:
        pytest.skip("not a configuration of this architecture")
    truth = results(*[t.double() for t in arguments])
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    try:
        plain = results(*arguments)
    finally:
        torch.set_float32_matmul_precision(before)
    placed = [fenced(t) for t in arguments]
    got = launched(stage, config, kind == "tf32", placed)
    for name, value in got.items():
        assert_as_exact(f"{bucket}, {name}", value, plain[name], truth[name])
