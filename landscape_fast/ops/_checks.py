"""The one error style of the ops: `<op>: <argument> must be <rule>; got <value>[; <remedy>]`.

Checks read shapes, dtypes, devices and strides, never values, so they cost no device
synchronisation.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LOW = (torch.bfloat16, torch.float16)


def require(ok: bool, op: str, argument: str, rule: str, got, remedy: str | None = None) -> None:
    """Raises ValueError in the house style unless `ok`."""
    if not ok:
        raise ValueError(message(op, argument, rule, got, remedy))


def message(op: str, argument: str, rule: str, got, remedy: str | None = None) -> str:
    """The text of an error, for the exceptions that are not ValueError."""
    return f"{op}: {argument} must be {rule}; got {got}" + (f"; {remedy}" if remedy else "")


def names(dtypes: Sequence[torch.dtype]) -> str:
    """torch.float32, torch.float64 -> "float32, float64"."""
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def whole(value, least: int) -> bool:
    """Whether it is an integer, no bool, of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_types(op: str, given: Mapping[str, object], required: Sequence[str]) -> None:
    """TypeError unless each argument is a tensor, or None where it is not required."""
    for name, value in given.items():
        if not isinstance(value, Tensor) and (value is not None or name in required):
            raise TypeError(message(op, name, "a Tensor", type(value).__name__))


def check_tensor(
    op: str,
    argument: str,
    value: Tensor,
    letters: str,
    sizes: Sequence[int | None],
    *,
    dtypes: Sequence[torch.dtype] = FLOATS,
    like: Tensor | None = None,
    like_name: str = "",
    or_float32: bool = False,
) -> None:
    """Type, number of dimensions, sizes, dtype and device of one tensor argument.

    Args:
        letters: the shape in letters, "M, B, I", for the message.
        sizes: what each dimension must be; None where any size will do.
        dtypes: the dtypes it may have, unless `like` is given.
        like: a tensor whose dtype and device it must share; `like_name` names it in the message.
        or_float32: it may also be float32 where `like` is bfloat16 or float16.

    Raises:
        TypeError: if `value` is not a tensor.
        ValueError: if its shape, dtype or device is not as said.
    """
    if not isinstance(value, Tensor):
        raise TypeError(message(op, argument, f"a Tensor [{letters}]", type(value).__name__))
    shape = value.shape
    ok = len(shape) == len(sizes)
    if ok:
        for size, want in zip(shape, sizes, strict=True):
            ok = ok and (want is None or size == want)
    if not ok:
        raise ValueError(message(op, argument, shape_rule(letters, sizes), list(shape)))
    if like is None:
        require(value.dtype in dtypes, op, argument, f"one of {names(dtypes)}", value.dtype)
        return
    short = or_float32 and like.dtype in LOW
    if value.dtype != like.dtype and not (short and value.dtype == torch.float32):
        rule = f"of the dtype of {like_name}, {names([like.dtype])}"
        rule += ", or float32" if short else ""
        raise ValueError(message(op, argument, rule, names([value.dtype])))
    if value.device != like.device:
        rule = f"on the device of {like_name}, {like.device}"
        raise ValueError(message(op, argument, rule, str(value.device)))


def shape_rule(letters: str, sizes: Sequence[int | None]) -> str:
    """("S, S, 2", (5, 5, 2)) -> "[S, S, 2] with S = 5"."""
    known = [
        f"{letter} = {size}"
        for letter, size in zip(letters.split(", "), sizes, strict=True)
        if size is not None and letter != str(size)
    ]
    return f"[{letters}]" + (" with " + ", ".join(dict.fromkeys(known)) if known else "")
