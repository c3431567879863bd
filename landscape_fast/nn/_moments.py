"""Mean and variance of numbers that come in parts: batches of any sizes, processes, members."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class BatchMoments(NamedTuple):
    """How many numbers there were, their mean, and the sum of their squared deviations from it.

    Attributes:
        count: [] or [...], broadcast over `mean`; 0 where nothing was seen.
        mean: [..., F] float64.
        m2: [..., F] float64, sum of (x - mean)^2.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    @classmethod
    def of(cls, x: Tensor, dims: tuple[int, ...]) -> "BatchMoments":
        """The moments of `x` over the dimensions `dims`, in float64.

        Example:
            >>> BatchMoments.of(torch.tensor([[1.0], [3.0]]), (0,)).m2
            tensor([2.], dtype=torch.float64)
        """
        x = x.double()
        mean = x.mean(dims, keepdim=True)
        m2 = (x - mean).square().sum(dims)
        n = x.numel() // max(m2.numel(), 1)
        return cls(m2.new_tensor(float(n)), mean.view_as(m2), m2)

    @classmethod
    def merge(cls, parts: Iterable["BatchMoments"]) -> "BatchMoments":
        """The moments of all numbers together, from those of disjoint parts of any sizes.

        No difference of large sums is formed: deviations are taken from the common mean.

        Example:
            >>> x = torch.arange(6.0).view(6, 1)
            >>> parts = [BatchMoments.of(rows, (0,)) for rows in x.split((1, 5))]
            >>> BatchMoments.merge(parts).m2 == BatchMoments.of(x, (0,)).m2
            tensor([True])
        """
        count, mean, m2 = (torch.stack(column) for column in zip(*parts, strict=True))
        n = count.reshape(*count.shape, *[1] * (mean.ndim - count.ndim))
        total = count.sum(0)
        all_n = n.sum(0)
        mean = torch.where(n > 0, mean, 0.0)  # an empty part may hold anything
        common = (n * mean).sum(0) / all_n.clamp_min(1.0)
        m2 = torch.where(n > 0, m2 + n * (mean - common).square(), 0.0).sum(0)
        return cls(total, common, m2)

    def variance(self, correction: int = 1) -> Tensor:
        """m2 / (count - correction): unbiased by default, as running statistics are."""
        n = self.count.reshape(*self.count.shape, *[1] * (self.mean.ndim - self.count.ndim))
        return self.m2 / (n - correction)


def over_ranks(moments: Sequence[BatchMoments], group: Any) -> list[BatchMoments]:
    """Each of them over all processes of a group, the same bits on every one.

    All processes must call it, with moments of the same shapes; one exchange carries them all.
    """
    numbers = [t for one in moments for t in one]
    own = torch.cat([t.flatten() for t in numbers])
    every = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(every, own, group=group)
    ranks = []
    for one in every:
        parts = one.split([t.numel() for t in numbers])
        parts = iter(p.view_as(t) for p, t in zip(parts, numbers, strict=True))
        ranks.append([BatchMoments(*three) for three in zip(parts, parts, parts, strict=True)])
    return [BatchMoments.merge(parts) for parts in zip(*ranks, strict=True)]
