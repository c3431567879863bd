"""The kernels as functions of CPU tensors.

Each runs under several orders of blocks and threads, which must give the same bits: if they do not,
threads race.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from cuda_on_cpu.shim import ORDERS, Kernels
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = {"js": 0, "kl": 1, "disagreement": 2}


class Calls(Kernels):
    orders = ORDERS

    def quick(self) -> "Calls":
        """The same with two orders, for large cases."""
        other = copy.copy(self)
        other.orders = [ORDERS[0], ORDERS[-1]]
        return other

    def pairwise_divergence(self, logits: Tensor, kind: str = "js") -> Tensor:
        return _means(*self.divergence_sums(logits, kind), logits.shape[1])

    def divergence_sums(self, logits: Tensor, kind: str = "js") -> tuple[Tensor, Tensor]:
        """The means, and the float64 sums that they come from."""
        M = logits.shape[0]
        about = (logits.data_ptr(), DTYPES.index(logits.dtype), *logits.shape, *logits.stride())
        size = self.divergence_workspace(*logits.shape, KINDS[kind])

        def run(workspace, *outputs):
            self.divergence(*about, KINDS[kind], workspace, *outputs)

        return self._same(run, size, [torch.empty(M, M), torch.empty(M, M).double()])

    def pairwise_disagreement(self, labels: Tensor) -> Tensor:
        M = labels.shape[0]
        about = (labels.data_ptr(), labels.itemsize, *labels.shape, *labels.stride())

        def run(workspace, *outputs):
            self.disagreement(*about, workspace, *outputs)

        outputs = [torch.empty(M, M), torch.empty(M, M).double()]
        size = self.disagreement_workspace(*labels.shape)
        return _means(*self._same(run, size, outputs), labels.shape[1])

    def ensemble_summary(
        self, logits: Tensor, targets: Tensor, bins: int = 15, *, ignore_index: int = -100
    ) -> list[Tensor]:
        """The outputs of the op, in its order, then the number of bad targets."""
        members, ensemble, bad, _ = self.summary_sums(
            logits, targets, bins, ignore_index=ignore_index
        )
        return [*members.unbind(0), *ensemble.unbind(0), bad[0]]

    def summary_sums(
        self, logits: Tensor, targets: Tensor, bins: int = 15, *, ignore_index: int = -100
    ) -> list[Tensor]:
        """Members, ensemble, bad targets, and the float64 sums behind them."""
        M = logits.shape[0]
        about = (logits.data_ptr(), DTYPES.index(logits.dtype), *logits.shape, *logits.stride())
        size = self.summary_workspace(*logits.shape, bins)

        def run(workspace, *outputs):
            self.summary(*about, targets.data_ptr(), bins, ignore_index, workspace, *outputs)

        sums = torch.empty((M + 1) * (3 + bins) + 3).double()
        outputs = [torch.empty(4, M), torch.empty(6), torch.empty(1, dtype=torch.int64), sums]
        return self._same(run, size, outputs)

    def combine_into(self, coeffs: Tensor, anchors: Tensor, weights: Tensor, rows) -> Tensor:
        """`weights`, of which the parts in `rows` are written (see CombinePart in csrc/api.h)."""
        table = torch.tensor(rows).reshape(-1, 8)
        about = self._combine_arguments(table, coeffs, anchors)

        def run(workspace, out):
            self.combine(*about, anchors.data_ptr(), out)

        return self._same(run, 0, [weights])[0]

    def combine_backward_into(
        self, coeffs: Tensor, anchors: Tensor, dweights: Tensor, outputs: Sequence, rows
    ) -> list:
        """`outputs`: danchors and dcoeffs, either of which may be None."""
        table = torch.tensor(rows).reshape(-1, 8)
        about = self._combine_arguments(table, coeffs, anchors)
        sizes = (table.data_ptr(), len(table), about[2], about[5], about[6])
        wanted = [t for t in outputs if t is not None]

        def run(workspace, *addresses):
            addresses = iter(addresses)
            both = [None if t is None else next(addresses) for t in outputs]
            inputs = (anchors.data_ptr(), dweights.data_ptr())
            parts = coeffs.shape[1] if coeffs.ndim == 3 else 1
            self.combine_backward(*about, *inputs, workspace, *both, parts)

        results = iter(self._same(run, self.combine_backward_workspace(*sizes), wanted))
        return [None if t is None else next(results) for t in outputs]

    def _combine_arguments(self, table, coeffs, anchors):
        M, K = coeffs.shape[0], coeffs.shape[-1]
        stride_l = coeffs.stride(1) if coeffs.ndim == 3 else 0
        strides = (coeffs.stride(0), stride_l, coeffs.stride(-1))
        dtypes = DTYPES.index(anchors.dtype), DTYPES.index(coeffs.dtype)
        address = coeffs.data_ptr()
        return table.data_ptr(), len(table), dtypes[0], address, dtypes[1], M, K, *strides

    def _same(self, run: Callable, workspace: int, outputs: list[Tensor]) -> list[Tensor]:
        """What `run` writes to copies of `outputs`, the same in every order."""
        first = None
        for order in self.orders:
            scratch = torch.full((max(workspace, 1),), 0xFF, dtype=torch.uint8)
            fresh = [t.clone() for t in outputs]
            with self.order(*order):
                run(scratch.data_ptr(), *(t.data_ptr() for t in fresh))
            first = first or fresh
            for a, b in zip(first, fresh, strict=True):
                same = torch.equal(a.view(torch.uint8), b.view(torch.uint8))
                assert same, f"the order {order} of blocks and threads changes the result"
        return first


def _means(means: Tensor, sums: Tensor, N: int) -> Tensor:
    """`means`, which must be the sums divided by N, rounded once."""
    expected = (sums / N).float()
    if N == 0:
        assert (sums == 0).all()
    assert torch.equal(means.nan_to_num(9.0), expected.nan_to_num(9.0))
    return means
