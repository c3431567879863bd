"""BatchEnsemble convolutions as functions, and the moves between member layouts."""

from torch import Tensor

from landscape_fast.ops._batch_ensemble_conv_checks import check_count, conv_options, pair
from landscape_fast.ops._batch_ensemble_conv_nd import as_image, prepare, run_by_library
from landscape_fast.ops._checks import require
from landscape_fast.ops.batch_ensemble_conv2d import batch_ensemble_conv2d, run_images

__all__ = [
    "batch_ensemble_conv",
    "batch_ensemble_conv2d",
    "check_count",
    "conv_options",
    "merged_weight",
    "pair",
    "split_members",
    "tile_members",
]


def batch_ensemble_conv(
    x: Tensor,
    weight: Tensor,
    r: Tensor | None = None,
    s: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    output_padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    layout: str = "member_major",
    transposed: bool = False,
    activation: str | None = None,
) -> Tensor:
    r"""M convolutions of one to three dimensions that share one weight up to rank-one factors.

    .. math:: y_m = s_m \circ \mathrm{conv}(x_m \circ r_m, W) + b_m

    The number of dimensions is that of `weight`. Two are `batch_ensemble_conv2d`, which has kernels
    of its own; one runs as an image of one row; the rest by library calls. Of the
    activations, whatever runs keeps x for the backward, and y with an `activation`.

    Args:
        x: [M, B, I, *pixels], or [B, I, *pixels] shared by all members; [M*B, I, *pixels] with
            members in consecutive rows for the folded layout.
        weight: [O, I / groups, *kernel]; transposed: [I, O / groups, *kernel].
        r: [M, I] or None.
        s: [M, O] or None.
        bias: [M, O], or [O] shared by all members, or None.
        stride, padding, dilation, groups: as in `torch.nn.functional`.
        output_padding: rows and columns added to a transposed convolution, as there.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        layout: "member_major" or "folded".
        transposed: the gradient of a convolution in place of one; padding as numbers only.
        activation: None, or "relu" on the result.

    Returns:
        [M, B, O, *pixels], or [M*B, O, *pixels] for the folded layout, in the dtype of `x`
        (of autocast where it is on).

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if shapes, dtypes, devices or options disagree, or nothing tells M.

    Cost: one convolution of M*B images, and at most one pass over its input and output for the
        factors. Differentiable to any order.

    Source: Wen et al. 2020 (arXiv:2002.06715).

    Example:
        >>> import torch
        >>> x = torch.ones(1, 1, 3)  # one sequence, shared by two members
        >>> s = torch.tensor([[1.0], [-2.0]])
        >>> batch_ensemble_conv(x, torch.ones(1, 1, 2), s=s).flatten()
        tensor([ 2.,  2., -4., -4.])
    """
    op = "batch_ensemble_conv"
    if isinstance(weight, Tensor) and weight.ndim == 4 and not transposed:
        op = "batch_ensemble_conv2d"
    tensors = (x, weight, r, s, bias)
    options = (stride, padding, dilation, groups, padding_mode, output_padding, transposed)
    tensors, members, conv = prepare(op, tensors, options, layout, activation)
    if transposed or weight.ndim == 5:
        y = run_by_library(tensors, members, conv, activation)
    elif weight.ndim == 4:
        y = run_images(tensors, members, conv, activation)
    else:
        row, wide = as_image(tensors, conv)
        y = run_images(row, members, wide, activation).squeeze(-2)
    return y.flatten(0, 1) if layout == "folded" else y


def tile_members(x: Tensor, members: int) -> Tensor:
    """[B, ...] -> [M*B, ...]: every member gets the whole batch, members in consecutive rows."""
    check_count("tile_members", "members", members)
    require(x.ndim > 0, "tile_members", "x", "[B, ...]", list(x.shape))
    return x.expand(members, *x.shape).flatten(0, 1)


def split_members(y: Tensor, members: int) -> Tensor:
    """[M*B, ...] -> [M, B, ...], a view: the inverse of folding members into rows."""
    check_count("split_members", "members", members)
    ok = y.ndim > 0 and y.shape[0] % members == 0
    require(ok, "split_members", "y", f"[M*B, ...] with M = {members}", list(y.shape))
    return y.unflatten(0, (members, y.shape[0] // members))


def merged_weight(weight: Tensor, r: Tensor | None, s: Tensor | None, groups: int = 1) -> Tensor:
    """The weight of one member, `weight * s[o] * r[i]`: r [I] or None, s [O] or None."""
    merged = weight.clone()
    tail = (1,) * (weight.ndim - 2)
    if s is not None:
        merged *= s.view(-1, 1, *tail)
    if r is not None:
        # Input channel j of group g is feature g * I / groups + j.
        per_output = r.view(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)
        merged *= per_output.view(*per_output.shape, *tail)
    return merged
