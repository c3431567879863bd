"""The Triton kernels as a way of the member convolution (`_subspace_conv2d_kernels`)."""

from torch import Tensor

from landscape_fast.ops._batch_ensemble_conv2d_fused import tf32_allowed


def obstacle(weight, options) -> str:
    """They do every convolution without groups."""
    return ""


def forward(x: Tensor, weight: Tensor, coeffs, bias, y: Tensor, options) -> None:
    from landscape_fast.kernels.subspace_conv2d import subspace_conv2d_fwd

    subspace_conv2d_fwd(x, weight, coeffs, bias, y, *_shorter(options), tf32_allowed())


def input_gradient(dy: Tensor, weight: Tensor, coeffs, dx: Tensor, options) -> None:
    from landscape_fast.kernels.subspace_conv2d import subspace_conv2d_bwd_x

    subspace_conv2d_bwd_x(dy, weight, coeffs, dx, *_shorter(options), tf32_allowed())


def weight_gradient(dy: Tensor, x: Tensor, dweight: Tensor, options) -> None:
    from landscape_fast.kernels.subspace_conv2d_backward import subspace_conv2d_bwd_weight

    subspace_conv2d_bwd_weight(dy, x, dweight, *_shorter(options), tf32_allowed())


def _shorter(options):
    """(stride, (above, left), dilation): the rest follows from the size of y."""
    stride, pads, dilation = options
    return stride, pads[:2], dilation
