"""BatchEnsemble convolutions of one to three dimensions: checks, layouts, the library path."""

from math import prod

from torch import Tensor

from landscape_fast.ops._batch_ensemble_conv2d_plan import Plan, composed_plan
from landscape_fast.ops._batch_ensemble_conv_autograd import apply
from landscape_fast.ops._batch_ensemble_conv_checks import (
    KERNEL,
    Conv,
    check,
    geometry,
    output_size,
)
from landscape_fast.ops._batch_ensemble_conv_ways import definition
from landscape_fast.ops._checks import check_types, require
from landscape_fast.ops._dispatch import autocast_input, free, transforming, without_autocast


def prepare(
    op: str,
    tensors: tuple,
    options: tuple,
    layout: str,
    activation: str | None,
    dims: tuple[int, ...] = (1, 2, 3),
) -> tuple[tuple, int, Conv]:
    """Checks everything; returns the tensors with x as [M or 1, B, I, *pixels], M, and the options.

    Args:
        tensors: x, weight, r, s, bias.
        options: stride, padding, dilation, groups, padding_mode, output_padding, transposed.
        dims: how many the kernel may have.
    """
    names = ("x", "weight", "r", "s", "bias")
    check_types(op, dict(zip(names, tensors, strict=True)), names[:2])
    shape = tensors[1].shape
    rule = f"[O, I / groups, {KERNEL[2]}]" if dims == (2,) else "of 3 to 5 dimensions"
    require(len(shape) - 2 in dims, op, "weight", rule, list(shape))
    x, weight, *rest = autocast_input(*tensors)
    conv = geometry(op, tuple(weight.shape[2:]), *options)
    members = check(op, x, weight, *rest, conv, layout, activation)
    if layout == "folded":
        x = x.unflatten(0, (members, x.shape[0] // members))
    elif x.ndim == weight.ndim:
        x = x.unsqueeze(0)
    return (x, weight, *rest), members, conv


def run_by_library(tensors: tuple, members: int, conv: Conv, activation: str | None) -> Tensor:
    """[M, B, O, *pixels] of prepared tensors by library calls, in the quicker way."""
    if transforming() or tensors[0].numel() == 0:
        with without_autocast(tensors[0].device.type):
            return definition(*tensors, conv, activation)
    plan = library_plan(tensors, members, conv)
    return apply(*tensors, members, conv, activation, plan)


def library_plan(tensors: tuple, members: int, conv: Conv) -> Plan:
    """The quicker library path on a CPU."""
    x, weight, r = tensors[:3]
    pixels = tuple(x.shape[3:])
    if not conv.transposed:
        pixels = output_size(pixels, tuple(weight.shape[2:]), conv)
    outputs = weight.shape[1] * conv.groups if conv.transposed else weight.shape[0]
    elements = x[0].numel() + x.shape[1] * outputs * prod(pixels)
    products = x.shape[1] * prod(pixels) * weight.numel()
    if free(elements, members):
        return Plan("once", "once")
    return composed_plan(members, elements, products, x.shape[0] == 1 and r is None)


def as_image(tensors: tuple, conv: Conv) -> tuple[tuple, Conv]:
    """A convolution in one dimension as one in two, of images of one row."""
    x, weight, *rest = tensors
    before = (*conv.before, 0, 0) if conv.before else ()
    wide = Conv(
        (1, *conv.stride), (0, *conv.padding), (1, *conv.dilation), conv.groups,
        output_padding=(0, 0), before=before, mode=conv.mode,
    )  # fmt: skip
    return (x.unsqueeze(-2), weight.unsqueeze(-2), *rest), wide
