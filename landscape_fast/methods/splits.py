"""Rows held out of the training rows, for decisions that the test rows must have no part in."""

import torch
from torch import Tensor

from landscape_fast.methods.seeds import stream_seed
from landscape_fast.ops._checks import require

Validation = float | tuple[Tensor, Tensor]


def check_rows(op: str, x: Tensor, y: Tensor) -> None:
    """Raises unless x [N, ...] and y [N] int64 are rows to train on and their classes."""
    rule = "[N, ...] with at least one row"
    require(x.ndim >= 2 and x.shape[0] >= 1, op, "x", rule, list(x.shape))
    require(y.shape == x.shape[:1], op, "y", f"[N] with N = {x.shape[0]}", list(y.shape))
    require(y.dtype == torch.int64, op, "y", "int64", y.dtype, "call .long()")


def stratified_split(y: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Positions of the rows to train on and of those held out, the same share of every class.

    Of a class with n rows, `fraction * n` rows, rounded, are held out, but at least one where
    there are two, and never all.

    Args:
        y: [N] int64 classes.
        fraction: of the rows to hold out, in (0, 1).
        seed: which rows.

    Returns:
        Two int64 tensors on the CPU in ascending order.

    Example:
        >>> kept, held = stratified_split(torch.tensor([0, 0, 0, 0, 1, 1]), 0.25, seed=0)
        >>> len(kept), len(held)
        (4, 2)
    """
    op = "stratified_split"
    require(y.ndim == 1 and y.shape[0] >= 2, op, "y", "[N] with N at least 2", list(y.shape))
    require(0 < fraction < 1, op, "fraction", "a number in (0, 1)", fraction)
    y = y.cpu()
    held = torch.zeros(len(y), dtype=torch.bool)
    for label in y.unique().tolist():
        rows = (y == label).nonzero()[:, 0]
        count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        generator = torch.Generator().manual_seed(stream_seed(seed, 0, "split", label))
        held[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]


def hold_out(
    op: str, x: Tensor, y: Tensor, validation: Validation, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, y) to train on and (x, y) to decide on, from a fraction or from rows given apart."""
    check_rows(op, x, y)
    if isinstance(validation, tuple):
        own_x, own_y = validation
        fits = own_x.shape[1:] == x.shape[1:] and own_y.shape == own_x.shape[:1] and len(own_y) > 0
        got = f"{list(own_x.shape)} and {list(own_y.shape)}"
        rule = f"a fraction, or rows [N, {', '.join(map(str, x.shape[1:]))}] and classes [N]"
        require(fits, op, "validation", rule, got)
        long = own_y.dtype == torch.int64
        require(long, op, "validation", "with int64 classes", own_y.dtype, "call .long()")
        return x, y, own_x, own_y
    number = isinstance(validation, float) and 0 < validation < 1
    require(number, op, "validation", "a fraction in (0, 1), or rows and classes", validation)
    kept, held = stratified_split(y, validation, seed)
    kept, held = kept.to(x.device), held.to(x.device)
    return x[kept], y[kept.to(y.device)], x[held], y[held.to(y.device)]
