"""What the `Metric` classes share: float64 states, as sums or as rows, and rules of arguments."""

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from landscape_fast.metrics.reliability import check_predictions
from landscape_fast.ops._checks import check_tensor, require, whole


def _metric() -> type:
    try:
        from torchmetrics import Metric
    except ImportError as error:
        raise ImportError(
            "landscape_fast.metrics.torchmetrics: torchmetrics must be installed; "
            "got no such module; pip install 'landscape-fast[metrics]'"
        ) from error
    return Metric


class EnsembleMetric(_metric()):
    """A metric whose states are float64, and stay so.

    torchmetrics casts states along with a module that holds the metric (`module.to(bfloat16)`),
    which would stop counts at 256.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    @property
    def op(self) -> str:
        """Its name in messages."""
        return type(self).__name__

    @property
    def dtype(self) -> torch.dtype:
        """Of all states. A process without rows takes part in gathering with an empty one."""
        return torch.float64

    def _apply(self, fn: Callable, *args, **kwargs):
        def move(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        return super()._apply(move, *args, **kwargs)

    def check_members(self, members: int) -> None:
        """ValueError unless `members` can be M."""
        require(whole(members, 1), self.op, "members", "an integer of at least 1", members)

    def check_batch(self, logits: Tensor) -> None:
        """ValueError if a batch [M, N, C] is of another M."""
        check_tensor(self.op, "logits", logits, "M, N, C", (self.members, None, None))


class SumsMetric(EnsembleMetric):
    """States are sums over examples: exact for counts, in any batches and processes."""

    def add_sums(self, name: str, *shape: int) -> None:
        """A state of zeros."""
        self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def add_to(self, name: str, values: Tensor | int) -> None:
        """Adds the sums of a batch."""
        setattr(self, name, getattr(self, name) + values)


class RowsMetric(EnsembleMetric):
    """States are a score and a mark of every row: 16 bytes of each, in every process at `compute`.

    A score in float64 is the one that was given, whatever its dtype, so that ties stay ties.
    """

    rows = ("confidence", "right")  # names of the two states

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        for name in self.rows:
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, probabilities: Tensor, targets: Tensor) -> None:
        """Adds probabilities [N, C], whose largest is the confidence, and targets [N]."""
        check_predictions(self.op, probabilities, targets)
        confidence, labels = probabilities.max(1)
        self.add_rows(confidence, labels == targets)

    def add_rows(self, scores: Tensor, marks: Tensor) -> None:
        """[N] floats and [N] bools."""
        for name, values in zip(self.rows, (scores, marks), strict=True):
            getattr(self, name).append(values.detach().double())

    def compute(self):
        """The figures of all rows; NaN if there is none."""
        scores, marks = (self._joined(getattr(self, name)) for name in self.rows)
        if not len(scores):  # one row that nothing is known about
            scores, marks = scores.new_full((1,), float("nan")), marks.new_zeros(1)
        return self.figures(scores, marks.bool())

    @abstractmethod
    def figures(self, scores: Tensor, marks: Tensor):
        """What `compute` returns, for scores [N] float64 and marks [N] bool."""

    def _joined(self, state: list[Tensor] | Tensor) -> Tensor:
        if isinstance(state, Tensor):  # gathered from processes
            return state
        return torch.cat(state or [torch.zeros(0, dtype=torch.float64, device=self.device)])
