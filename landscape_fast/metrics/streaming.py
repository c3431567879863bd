"""Metrics of evaluations whose logits never fit in memory together: batch by batch, then merged.

What is kept are float64 sums, [M, M] for each divergence and 3 + bins numbers per member for a
summary, whatever the number of examples. Sums add up where means do not, so parts of an evaluation
may be accumulated anywhere, in any sizes, and merged.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from landscape_fast.ops import EnsembleSummary, divergence_sums, summary_sums
from landscape_fast.ops._checks import message, require
from landscape_fast.ops._divergence_sums import check_kinds
from landscape_fast.ops.ensemble_summary import check_bins


class _Accumulator:
    """Named float64 sums, none before the first update, and the settings they were made with."""

    def __init__(self, settings: dict):
        self._settings = settings
        self._sums: dict[str, Tensor] = {}

    @property
    def _op(self) -> str:
        return type(self).__name__

    def reset(self) -> None:
        """Forgets all that was added."""
        self._sums = {}

    def merge(self, *others: "_Accumulator") -> "_Accumulator":
        """Adds what others have accumulated, in the order given, and returns itself.

        Args:
            others: accumulators of the same class and settings, of as many members; those that were
                never updated change nothing.

        Raises:
            ValueError: if class, settings or numbers of members differ; nothing is then added.
        """
        total = dict(self._sums)
        for other in others:
            same = type(other) is type(self) and other._settings == self._settings
            rule = f"{self._op} with {self._settings}"
            got = getattr(other, "_settings", "none")
            require(same, self._op, "others", rule, f"{type(other).__name__} with {got}")
            total = self._added(total, other._sums)
        self._sums = total
        return self

    def reduce_(self, group: "dist.ProcessGroup | None" = None) -> "_Accumulator":
        """Adds up what all processes of a group have accumulated, and returns itself.

        Every process then holds the total, added in the order of ranks: the same bits on each. They
        may have seen different numbers of batches, or none. Call it once, after the last update.
        Without a process group it does nothing.

        Args:
            group: of torch.distributed; None is the default one.

        Raises:
            ValueError: if settings or numbers of members differ between the processes.

        Cost: one gathering of the sums, through the memory of the host.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return self
        here = next((t.device for t in self._sums.values()), torch.device("cpu"))
        parts: list = [None] * dist.get_world_size(group)
        own = {name: t.cpu() for name, t in self._sums.items()}
        dist.all_gather_object(parts, (self._settings, own), group=group)
        total: dict[str, Tensor] = {}
        for settings, sums in parts:
            require(settings == self._settings, self._op, "settings", str(self._settings), settings)
            total = self._added(total, sums)
        self._sums = {name: t.to(here) for name, t in total.items()}
        return self

    def state_dict(self) -> dict:
        """Settings and sums, of plain types and tensors: `torch.save` keeps it."""
        sums = {name: t.clone() for name, t in self._sums.items()}
        return {"settings": dict(self._settings), "sums": sums}

    def load_state_dict(self, state: Mapping) -> None:
        """Takes the place of what was added.

        Args:
            state: from `state_dict` of an accumulator with the same settings.

        Raises:
            ValueError: if the settings differ.
        """
        settings = state["settings"]
        require(settings == self._settings, self._op, "settings", str(self._settings), settings)
        self._sums = {name: t.clone() for name, t in state["sums"].items()}

    def _add(self, new: dict[str, Tensor]) -> None:
        self._sums = self._added(self._sums, new)

    def _added(self, old: dict[str, Tensor], new: dict[str, Tensor]) -> dict[str, Tensor]:
        """The sums follow the newest batch to its device."""
        if not old or not new:
            return dict(old or new)
        for name, t in new.items():
            if t.shape != old[name].shape:
                got = f"{list(t.shape)} sums beside {list(old[name].shape)}"
                raise ValueError(message(self._op, "M", "the same in every batch and part", got))
        return {name: old[name].to(t.device) + t for name, t in new.items()}

    def _total(self) -> dict[str, Tensor]:
        require(bool(self._sums), self._op, "compute", "called after an update", "no update")
        return self._sums


class DivergenceAccumulator(_Accumulator):
    """`pairwise_divergence` of M members over any number of batches.

    Counts are exact, and so is merging them. Divergences are added in float64; how examples were
    cut into batches shows only in float64 rounding on a CPU if the batches hold a multiple of 32
    examples, or the logits 64 classes or more, and otherwise in the rounding of float32 sums, about
    1e-7 of the value (see `landscape_fast.ops.divergence_sums`).

    Args:
        kinds: of "js", "kl" and "disagreement", each at most once.

    Raises:
        ValueError: if a kind is unknown or there twice.

    Cost: [M, M] float64 for each kind. An update costs the kernels' pass over the batch and keeps
        nothing of it: on a CPU 128 members of 1000 classes take about 10 MB beside the logits.
        float64 logits run in plain PyTorch, with temporaries of the size of the batch.

    Source: Fort et al. 2019 (arXiv:1912.02757), for evaluations of any size.

    Example:
        >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [2.0, 0.0]]])
        >>> seen = DivergenceAccumulator(("disagreement",))
        >>> for batch in logits.split(1, dim=1):
        ...     seen.update(batch)
        >>> seen.compute()["disagreement"]
        tensor([[0.0000, 0.5000],
                [0.5000, 0.0000]], dtype=torch.float64)
    """

    def __init__(self, kinds: Sequence[str] = ("js", "kl", "disagreement")):
        check_kinds(type(self).__name__, kinds)
        super().__init__({"kinds": list(kinds)})

    def update(self, logits: Tensor) -> None:
        """Adds a batch, without waiting for the device.

        Args:
            logits: [M, N, C], as in `pairwise_divergence`; any N, the same M every time.

        Raises:
            ValueError: if `divergence_sums` refuses the logits, or M differs.
        """
        new = divergence_sums(logits, self._settings["kinds"])
        examples = torch.full((), logits.shape[1], dtype=torch.float64, device=logits.device)
        self._add({"examples": examples, **new})

    def compute(self) -> dict[str, Tensor]:
        """{kind: [M, M] float64}: means over all examples added, in nats or as a fraction; NaN
        where there were none."""
        total = self._total()
        return {kind: total[kind] / total["examples"] for kind in self._settings["kinds"]}


class SummaryAccumulator(_Accumulator):
    """`ensemble_summary` of M members over any number of batches.

    Numbers of right answers and of examples are exact; all else is added in float64, with at most
    the dependence on batches that `DivergenceAccumulator` states.

    Args:
        bins: of the calibration error, in [1, 4096].
        ignore_index: examples with this target are left out.

    Raises:
        ValueError: if `bins` is out of range.

    Cost: (M + 1) * (3 + bins) + 3 float64 numbers, and one read of each batch.

    Source: as for `landscape_fast.ops.ensemble_summary`.

    Example:
        >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [2.0, 0.0]]])
        >>> seen = SummaryAccumulator()
        >>> for batch, targets in zip(logits.split(1, dim=1), torch.tensor([[0], [1]])):
        ...     seen.update(batch, targets)
        >>> seen.compute().member_accuracy
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """

    def __init__(self, bins: int = 15, ignore_index: int = -100):
        check_bins(type(self).__name__, bins)
        super().__init__({"bins": bins, "ignore_index": ignore_index})

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Adds a batch, without waiting for the device.

        Args:
            logits: [M, N, C], as in `ensemble_summary`; any N, the same M every time.
            targets: [N] int64, classes in [0, C) or `ignore_index`.

        Raises:
            ValueError: if `summary_sums` refuses the arguments, or M differs.
            IndexError: if a target is out of range, as in `ensemble_summary`.
        """
        self._add({"sums": summary_sums(logits, targets, **self._settings)})

    def compute(self) -> EnsembleSummary:
        """The summary of all examples added, in float64; NaN where none counted."""
        return summary_of(self._total()["sums"], self._settings["bins"])


def summary_of(sums: Tensor, bins: int) -> EnsembleSummary:
    """The summary, in float64, of examples with these `summary_sums`."""
    rows = sums[:-3].reshape(-1, 3 + bins)
    examples, entropy, information = sums[-3:]
    ece = rows[:, 3:].abs().sum(1, keepdim=True)
    scores = (torch.cat([rows[:, :3], ece], 1) / examples).T  # [4, M + 1]
    together = *scores[:, -1], entropy / examples, information / examples
    return EnsembleSummary(*scores[:, :-1], *together)
