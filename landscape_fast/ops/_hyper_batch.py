"""What the hyper-batch ops share: their arguments, checks, layouts and dtypes."""

from typing import NamedTuple

from torch import Tensor

from landscape_fast.ops._checks import check_tensor, message
from landscape_fast.ops._dispatch import held


class Inputs(NamedTuple):
    """The arguments of a hyper-batch op, or something for each of them."""

    x: Tensor
    weight: Tensor
    delta: Tensor
    e: Tensor
    r: Tensor | None = None
    s: Tensor | None = None
    u: Tensor | None = None
    v: Tensor | None = None
    bias: Tensor | None = None
    delta_bias: Tensor | None = None
    e_bias: Tensor | None = None


REQUIRED = Inputs._fields[:4]
PARAMETERS = ("weight", "delta", "r", "s", "u", "v", "bias", "delta_bias")


def check_factors(op: str, t: Inputs, M: int, I: int, O: int) -> None:
    """r, u [M, I]; s, v [M, O]; bias, delta_bias [M, O] or [O]; delta_bias and e_bias together."""
    like = {"like": t.x, "like_name": "x", "or_float32": True}
    given = t._asdict()
    for name, letter, size in (("r", "I", I), ("s", "O", O), ("u", "I", I), ("v", "O", O)):
        if given[name] is not None:
            check_tensor(op, name, given[name], f"M, {letter}", (M, size), **like)
    for name in ("bias", "delta_bias"):
        value = given[name]
        if value is not None and value.ndim == 1:
            check_tensor(op, name, value, "O", (O,), **like)
        elif value is not None:
            check_tensor(op, name, value, "M, O", (M, O), **like)
    for name, other in (("delta_bias", "e_bias"), ("e_bias", "delta_bias")):
        if given[name] is None and given[other] is not None:
            raise ValueError(message(op, name, f"given where {other} is", None))


def folded_members(t: Inputs) -> int:
    """M of folded rows, from the first factor that has a row per member; without one, 1."""
    for factor in (t.r, t.s, t.u, t.v, t.bias, t.delta_bias):
        if factor is not None and factor.ndim == 2:
            return factor.shape[0]
    return 1


def unfolded(t: Inputs, members: int) -> Inputs:
    """[M*B, ...] -> [M, B, ...] for what differs by example."""
    rows = (members, t.x.shape[0] // members if members else 0)
    x, e, e_bias = (
        None if value is None else value.unflatten(0, rows) for value in (t.x, t.e, t.e_bias)
    )
    return t._replace(x=x, e=e, e_bias=e_bias)


def tied(t: Inputs) -> tuple[Tensor | None, ...]:
    """(r, s, u, v) with u = r and v = s where those are left out."""
    return t.r, t.s, t.r if t.u is None else t.u, t.s if t.v is None else t.v


def needs_z2(t: Inputs, needs: Inputs) -> bool:
    """Whether the backward of the library path reads the product with delta."""
    for_v = needs.s if t.v is None else needs.v
    return needs.e or (for_v and not held_in_float32(t, needs))  # which makes it again, unrounded


def held_in_float32(t: Inputs, needs: Inputs) -> bool:
    """Whether the gradient of a float32 parameter is wanted beside an x of 16 bits."""
    params, wanted = ([getattr(of, name) for name in PARAMETERS] for of in (t, needs))
    return held(t.x, params, wanted)


def in_dtypes(gradients: list[Tensor | None], t: Inputs) -> list[Tensor | None]:
    """Each gradient in the dtype of its argument."""
    pairs = zip(gradients, t, strict=True)
    return [g if g is None else g.to(value.dtype) for g, value in pairs]
