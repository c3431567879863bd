"""What the hyper-batch ops share: their checks, the number of members, and products in float32."""

import torch
from torch import Tensor

from landscape_fast.ops._checks import FLOATS, check_tensor, message, names, require

HALVES = (torch.bfloat16, torch.float16)
ARGUMENTS = ("x", "weight", "delta", "e", "r", "s", "u", "v", "bias", "delta_bias", "e_bias")
REQUIRED = ("x", "weight", "delta", "e")


def check_types(op: str, tensors: dict[str, Tensor | None]) -> None:
    """TypeError unless every argument is a tensor, or None where it may be left out."""
    for name, t in tensors.items():
        if not isinstance(t, Tensor) and (t is not None or name in REQUIRED):
            raise TypeError(message(op, name, "a Tensor", type(t).__name__))


def check_fits(
    op: str, name: str, t: Tensor, letters: str, sizes: tuple[int | None, ...], x: Tensor
) -> None:
    """Shape, device, and the dtype of x, or float32 beside a 16-bit x."""
    allowed = (x.dtype, torch.float32) if x.dtype in HALVES else (x.dtype,)
    check_tensor(op, name, t, letters, sizes, dtypes=FLOATS)
    rule = f"of the dtype of x, {' or '.join(names([d]) for d in allowed)}"
    require(t.dtype in allowed, op, name, rule, names([t.dtype]))
    require(t.device == x.device, op, name, f"on the device of x, {x.device}", str(t.device))


def check_factors(op: str, given: dict[str, Tensor | None], M: int, I: int, O: int, x) -> None:
    """r, u [M, I]; s, v [M, O]; bias, delta_bias [M, O] or [O]; delta_bias and e_bias together."""
    for name, letter, size in (("r", "I", I), ("u", "I", I), ("s", "O", O), ("v", "O", O)):
        if given[name] is not None:
            check_fits(op, name, given[name], f"M, {letter}", (M, size), x)
    for name in ("bias", "delta_bias"):
        t = given[name]
        if t is not None and t.ndim == 1:
            check_fits(op, name, t, "O", (O,), x)
        elif t is not None:
            check_fits(op, name, t, "M, O", (M, O), x)
    missing = [name for name in ("delta_bias", "e_bias") if given[name] is None]
    if len(missing) == 1:
        other = "e_bias" if missing[0] == "delta_bias" else "delta_bias"
        raise ValueError(message(op, missing[0], f"given where {other} is", None))


def per_member(given: dict[str, Tensor | None]) -> int | None:
    """M, from the first factor that has a row per member."""
    for name in ("r", "s", "u", "v", "bias", "delta_bias"):
        if given[name] is not None and given[name].ndim == 2:
            return given[name].shape[0]
    return None


def tied(r, s, u, v) -> tuple:
    """(r, s, u, v) with u = r and v = s where those are left out."""
    return r, s, r if u is None else u, s if v is None else v


def rounded(t: Tensor | None, x: Tensor) -> Tensor | None:
    """`t` in the dtype of x, in which products are formed."""
    return t if t is None else t.to(x.dtype)


def wide(low: torch.dtype, wanted: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which gradients in `wanted` are computed from tensors in `low`.

    On CUDA products of 16-bit factors can have float32 results, so that nothing need be widened.
    """
    if low == wanted or (device.type == "cuda" and WIDE_PRODUCTS):
        return low
    return wanted


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b for matrices, in `dtype`, without a 16-bit rounding of the sums on the way."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda and WIDE_PRODUCTS:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def _wide_products() -> bool:
    """Whether `torch.mm` takes `out_dtype` (torch 2.8 and later)."""
    overloads = torch.ops.aten.mm.overloads()
    return "dtype" in overloads


WIDE_PRODUCTS = _wide_products()
