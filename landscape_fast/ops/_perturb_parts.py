"""The registered ops of perturb: what the kernels are told, on each backend."""

import torch
from torch import Tensor

from landscape_fast import _extension
from landscape_fast.ops._compiled import DTYPE_CODES, call_cuda
from landscape_fast.ops._library import define


def _fwd_impl(
    weights, sigma, scales, dropouts, seeds, scale, dropout, seed, members, first_member, backend
):
    y = _fwd_fake(weights, sigma, scales, dropouts, seeds, scale, dropout, seed, members, 0, "")
    if y.numel() == 0:
        return y
    scales, dropouts = _small(scales), _small(dropouts)
    if backend == "triton":
        from landscape_fast.kernels import perturb as kernels

        draw = kernels.Draw(sigma, scales, dropouts, seeds, scale, dropout, seed, first_member)
        kernels.perturb_fwd(weights, draw, y)
        return y
    about = _described(y, sigma, scales, dropouts, seeds, scale, dropout, seed, first_member)
    stride_m = _stride_m(weights, members)
    if backend == "cpp":
        threads = torch.get_num_threads()
        _extension.C.perturb(*about, weights.data_ptr(), stride_m, y.data_ptr(), threads)
    else:
        code = DTYPE_CODES[weights.dtype]
        call_cuda("perturb_cuda", y, *about, weights.data_ptr(), code, stride_m, y.data_ptr())
    return y


def _bwd_impl(
    dy, weights, sigma, scales, dropouts, seeds, scale, dropout, seed, members, first_member,
    backend, needs,
):  # fmt: skip
    outputs = _bwd_fake(dy, weights, sigma, scales, *[None] * 6, None, "", needs)
    if dy.numel() == 0:
        return tuple(t.zero_() for t in outputs)
    dweights, dsigma, dscales = (t if n else None for t, n in zip(outputs, needs, strict=True))
    scales, dropouts = _small(scales), _small(dropouts)
    if backend == "triton":
        from landscape_fast.kernels import perturb as kernels

        draw = kernels.Draw(sigma, scales, dropouts, seeds, scale, dropout, seed, first_member)
        parts = kernels.perturb_bwd(dy, draw, dweights, dsigma, dscales is not None)
    else:
        about = _described(dy, sigma, scales, dropouts, seeds, scale, dropout, seed, first_member)
        tiles = _extension.C.perturb_tiles(dy.shape[1])
        parts = None
        if dscales is not None:
            sums = torch.float64 if backend == "cpp" else torch.float32
            parts = dy.new_empty((tiles, members), dtype=sums)
        places = (_place(dweights, members), _place(dsigma, members), _address(parts))
        stride_m = _stride_m(dy, members)
        if backend == "cpp":
            threads = torch.get_num_threads()
            _extension.C.perturb_backward(*about, dy.data_ptr(), stride_m, *places, threads)
        else:
            code = DTYPE_CODES[dy.dtype]
            call_cuda("perturb_backward_cuda", dy, *about, dy.data_ptr(), code, stride_m, *places)
    if dscales is not None:
        dscales.copy_(parts.sum(0, dtype=torch.float64))
    return outputs


def _small(numbers: Tensor | None) -> Tensor | None:
    """[M] as the kernels read it."""
    return None if numbers is None else numbers.float().contiguous()


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _stride_m(rows: Tensor, members: int) -> int:
    """Elements from one member's row to the next; 0 where all share it."""
    return rows.stride(0) if rows.shape[:-1] == (members,) else 0


def _place(t: Tensor | None, members: int) -> tuple[int, int]:
    """The address of a gradient, and whether it is one for all members."""
    return _address(t), int(t is not None and t.shape[:-1] != (members,))


def _described(like, sigma, scales, dropouts, seeds, scale, dropout, seed, first_member):
    """Perturbation of csrc/api.h: integers, then numbers."""
    M, P = like.shape
    rows = (0, 0) if sigma is None else (DTYPE_CODES[sigma.dtype], _stride_m(sigma, M))
    addresses = [_address(t) for t in (seeds, scales, dropouts, sigma)]
    return (M, P, first_member, seed, *addresses, *rows), scale, dropout


def _fwd_fake(
    weights, sigma, scales, dropouts, seeds, scale, dropout, seed, members, first_member, backend
):
    return weights.new_empty((members, weights.shape[-1]))


def _bwd_fake(
    dy, weights, sigma, scales, dropouts, seeds, scale, dropout, seed, members, first_member,
    backend, needs,
):  # fmt: skip
    wanted = zip((weights, sigma, scales), needs, strict=True)
    return tuple([t.new_empty(t.shape) if need else dy.new_empty(0) for t, need in wanted])


_ARGUMENTS = (
    "Tensor weights, Tensor? sigma, Tensor? scales, Tensor? dropouts, Tensor? seeds, float scale, "
    "float dropout, SymInt seed, SymInt members, SymInt first_member, str backend"
)
perturb_op = define(f"perturb({_ARGUMENTS}) -> Tensor", _fwd_impl, _fwd_fake)
perturb_backward_op = define(
    f"perturb_backward(Tensor dy, {_ARGUMENTS}, bool[] needs) -> (Tensor, Tensor, Tensor)",
    _bwd_impl,
    _bwd_fake,
)
