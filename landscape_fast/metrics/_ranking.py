"""Rows in the order of a score, with ties kept together: what ROC and risk curves are made of."""

from typing import NamedTuple

import torch
from torch import Tensor

from landscape_fast.ops._checks import check_tensor, require


class Ranking(NamedTuple):
    """N rows by falling score. A tie is a set of rows of equal score.

    Attributes:
        marks: [N] bool, of each row.
        marked: [N + 1] int64, marked rows among the first k.
        start: [N] int64, rows before the tie that the row is in.
        stop: [N] int64, rows up to the end of that tie.
        undefined: 0-dim bool, whether a score is NaN.
    """

    marks: Tensor
    marked: Tensor
    start: Tensor
    stop: Tensor
    undefined: Tensor

    @property
    def unmarked(self) -> Tensor:
        """[N + 1] int64, rows without a mark among the first k."""
        return torch.arange(len(self.marked), device=self.marked.device) - self.marked

    def known(self, value: Tensor) -> Tensor:
        """`value`, or NaN if a score is."""
        return torch.where(self.undefined, float("nan"), value)


def ranking(op: str, name: str, scores: Tensor, mark: str, marks: Tensor) -> Ranking:
    """Sorts [N] scores, largest first; `name` and `mark` are what the caller calls its arguments.

    Exact for every dtype: scores are compared, never added. No host synchronisation.
    """
    check_tensor(op, name, scores, "N", (None,))
    require(scores.shape[0] > 0, op, name, "[N] with N at least 1", list(scores.shape))
    check_tensor(op, mark, marks, "N", (scores.shape[0],), dtypes=(torch.bool,))
    on_device = f"on the device of {name}, {scores.device}"
    require(marks.device == scores.device, op, mark, on_device, str(marks.device))
    falling, order = (-scores.detach()).sort()
    marks = marks[order]
    marked = torch.cat([marks.new_zeros(1, dtype=torch.int64), marks.cumsum(0)])
    row, differs = torch.arange(len(marks), device=marks.device), falling[1:] != falling[:-1]
    end = differs.new_ones(1)
    first, last = torch.cat([end, differs]), torch.cat([differs, end])
    start = torch.where(first, row, 0).cummax(0).values
    stop = torch.where(last, row + 1, len(marks)).flip(0).cummin(0).values.flip(0)
    return Ranking(marks, marked, start, stop, scores.isnan().any())
