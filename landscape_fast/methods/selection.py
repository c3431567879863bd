"""Which members an ensemble needs: greedy selection on rows that no member was trained on."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from landscape_fast.ops._checks import check_tensor, require, whole

OBJECTIVES = ("nll", "accuracy", "brier", "nll-accuracy", "mse")
INPUTS = ("logits", "probabilities")
# Elements of [P, rows, C] held at a time in float64: 64 MiB, whatever N is.
_CHUNK = 2**23


class Selection(NamedTuple):
    """What `select_members` found; an ensemble is its members, each counted `weights` times.

    Attributes:
        members: the different members, in the order in which they were first picked.
        weights: how often each of them was picked.
        picks: every pick, in order, repetitions included.
        trajectory: the objective after each pick: nll in nats, accuracy a fraction, and so on;
            falling, but for accuracy, which rises.
        objective: the objective it was selected by.
        inputs: what the predictions were: "logits", "probabilities" or, of mse, "values".
    """

    members: list[int]
    weights: list[int]
    picks: list[int]
    trajectory: list[float]
    objective: str
    inputs: str

    def predict(self, predictions: Tensor) -> Tensor:
        """The weighted mean of the selected members' probabilities (of mse, of their values).

        Args:
            predictions: [P, N, C], the whole pool on any rows, of the same kind as `select_members`
                was given.

        Returns:
            [N, C] in the dtype of `predictions`.
        """
        members = torch.tensor(self.members, device=predictions.device)
        chosen = predictions.index_select(0, members)
        if self.inputs == "logits":
            chosen = chosen.softmax(-1)
        weights = torch.tensor(self.weights, dtype=chosen.dtype, device=chosen.device)
        return torch.tensordot(weights / sum(self.weights), chosen, dims=1)


def select_members(
    predictions: Tensor,
    targets: Tensor,
    size: int,
    objective: str = "nll",
    *,
    inputs: str = "logits",
    replacement: bool = True,
    max_picks: int | None = None,
) -> Selection:
    r"""Greedy choice of members whose mean prediction is best, from a pool of P.

    Starting from nothing, the member that most improves the objective of the mean prediction joins,
    again and again; it may join more than once, which gives it weight. It ends when `size`
    different members are there or none improves the objective, so there may be fewer. Of equally
    good members the first one joins. Objectives of the mean p over the picks, y the true class:

    .. math::
        \mathrm{nll} = -\overline{\ln p_y}, \quad
        \mathrm{accuracy} = \overline{[\arg\max p = y]}, \quad
        \mathrm{brier} = \overline{\textstyle\sum_c (p_c - [c = y])^2}, \quad
        \textrm{nll-accuracy} = \mathrm{nll} - \mathrm{accuracy}

    Args:
        predictions: [P, N, C], what each member of the pool says about N rows that it was not
            trained on; of `mse` [P, N] or [P, N, D], real values. Of a TabM, [N, P, C], pass
            `.transpose(0, 1)`.
        targets: [N] int64 true classes; of `mse` [N] or [N, D] true values.
        size: K, the number of different members wanted, from 1 to P.
        objective: "nll" (nats), "accuracy" (which is maximised), "brier", "nll-accuracy" or "mse".
        inputs: what `predictions` are: "logits" or "probabilities"; without meaning for `mse`.
        replacement: False gives exactly `size` different members of weight one, also where the
            last ones improve nothing: the way to prune a model to a given size.
        max_picks: the most picks, repetitions included; None for no limit.

    Returns:
        `Selection`; `Selection.predict` applies it to new rows.

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if shapes, dtypes or values are not as above.

    Cost: each round one pass over the pool ("nll": over [P, N] only; "brier" and "mse": none for a
        member that joined before), in float64, in pieces of at most 64 MiB.

    Source: Caruana et al. 2004, ensemble selection; hyper_ens of Wenzel et al. 2020
    (arXiv:2006.13570).

    Example:
        >>> sure_of_first, sure_of_second = [[4.0, 0.0], [0.1, 0.0]], [[0.0, 0.1], [0.0, 4.0]]
        >>> logits = torch.tensor([sure_of_first, sure_of_second, [[0.0, 9.0], [9.0, 0.0]]])
        >>> selection = select_members(logits, torch.tensor([0, 1]), size=2)
        >>> selection.members, selection.weights
        ([0, 1], [1, 1])
    """
    op = "select_members"
    require(objective in OBJECTIVES, op, "objective", f"one of {OBJECTIVES}", repr(objective))
    kind = "values" if objective == "mse" else inputs
    pool = _Pool(predictions, targets, kind)
    rule = f"an integer from 1 to P = {pool.members}"
    require(whole(size, 1) and size <= pool.members, op, "size", rule, size)
    limited = max_picks is None or whole(max_picks, 1)
    require(limited, op, "max_picks", "None or an integer of at least 1", max_picks)
    if kind != "values":
        pool.check_values()
    score = _SCORES[objective](pool)
    best, picks, losses = float("inf"), [], []
    while len(set(picks)) < size and (max_picks is None or len(picks) < max_picks):
        candidates = score.with_each(len(picks) + 1).tolist()
        free = [j for j in range(pool.members) if replacement or j not in picks]
        j = min(free, key=candidates.__getitem__)  # the first of equals
        if picks and replacement and not candidates[j] < best:
            break
        best = candidates[j]
        score.add(j)
        picks.append(j)
        losses.append(best)
    members = list(dict.fromkeys(picks))
    sign = -1.0 if objective == "accuracy" else 1.0
    return Selection(
        members,
        [picks.count(member) for member in members],
        picks,
        [sign * loss for loss in losses],
        objective,
        kind,
    )


class _Pool:
    """The predictions of P members, as float64 pieces of bounded size."""

    def __init__(self, predictions: Tensor, targets: Tensor, kind: str):
        op = "select_members"
        if kind == "values":
            several = getattr(predictions, "ndim", 3) != 2
            letters = "P, N, D" if several else "P, N"
            check_tensor(op, "predictions", predictions, letters, (None,) * (2 + several))
            sizes = tuple(predictions.shape[1:])
            check_tensor(op, "targets", targets, letters[3:], sizes)
            if not several:
                predictions, targets = predictions[..., None], targets[..., None]
        else:
            require(kind in INPUTS, op, "inputs", f"one of {INPUTS}", repr(kind))
            check_tensor(op, "predictions", predictions, "P, N, C", (None, None, None))
            N = predictions.shape[1]
            check_tensor(op, "targets", targets, "N", (N,), dtypes=(torch.int64,))
        filled = min(predictions.shape) >= 1
        require(filled, op, "predictions", "without an empty dimension", list(predictions.shape))
        same = predictions.device == targets.device
        require(same, op, "targets", f"on {predictions.device}", str(targets.device))
        self.kind = kind
        self.predictions, self.targets = predictions.detach(), targets
        self.members, self.rows, self.width = predictions.shape
        self.device, self.whole = predictions.device, None

    def check_values(self) -> None:
        op, N, C = "select_members", self.rows, self.width
        low, high = int(self.targets.min()), int(self.targets.max())
        rule = f"classes from 0 to {C - 1}"
        require(0 <= low <= high < C, op, "targets", rule, f"{low} to {high}")
        for rows in self.chunks():
            # the largest of a row is finite unless one is NaN or +inf, or all are -inf
            finite = bool(self.predictions[:, rows].amax(-1).isfinite().all())
            require(finite, op, "predictions", "free of NaN", "at least one NaN or +inf")
        proper, low, high = self._sums()
        if self.kind == "probabilities":
            rule, remedy = "probabilities, none negative, that sum to 1 over C", "pass inputs="
            got = f"sums from {low:.4g} to {high:.4g}"
            require(proper, op, "predictions", rule, got, f"{remedy}'logits' if they are")
        else:
            got = f"only rows that sum to 1, {N} rows of {self.members} members"
            wrong = proper and C > 1
            require(not wrong, op, "predictions", "logits", got, "pass inputs='probabilities'")

    def _sums(self) -> tuple[bool, float, float]:
        """Whether all are probabilities, and the range of their sums as far as that was seen."""
        low, high, few = float("inf"), -float("inf"), slice(0, 8)
        for rows in (few, *self.chunks()):  # of logits the first few rows say that they are
            piece = self.predictions[:, rows].double()
            sums = piece.sum(-1)
            low, high = min(low, float(sums.min())), max(high, float(sums.max()))
            if bool((piece < 0).any()) or not bool(((sums - 1).abs() < 1e-2).all()):
                return False, low, high
        return True, low, high

    def chunks(self) -> Iterator[slice]:
        step = max(1, _CHUNK // (self.members * self.width))
        for begin in range(0, self.rows, step):
            yield slice(begin, min(begin + step, self.rows))

    def read(self, rows: slice, members: slice = slice(None)) -> Tensor:
        """[P, rows, C] in float64: probabilities, or values; not to be written to."""
        if self.predictions.numel() > _CHUNK:
            return self._convert(self.predictions[members, rows])
        if self.whole is None:  # a pool of one piece is converted once
            self.whole = self._convert(self.predictions)
        return self.whole[members, rows]

    def _convert(self, piece: Tensor) -> Tensor:
        return piece.double().softmax(-1) if self.kind == "logits" else piece.double()

    def true_class(self, rows: slice, y: Tensor) -> Tensor:
        """[P, rows] in float64: the probabilities of the classes y [P, rows, 1]."""
        piece = self.predictions[:, rows].double()
        picked = piece.gather(-1, y)[..., 0]
        return (picked - piece.logsumexp(-1)).exp() if self.kind == "logits" else picked

    def residuals(self, rows: slice) -> Tensor:
        """[P, rows * C] in float64: predictions minus targets (one-hot, of classes)."""
        piece, y = self.read(rows), self.targets[rows]
        if self.kind == "values":
            return (piece - y.double()).flatten(1)
        y = y.expand(self.members, -1)[..., None]
        return piece.scatter_add(-1, y, -torch.ones_like(piece[..., :1])).flatten(1)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.device)


class _Nll:
    """Needs the probability of the true class only."""

    def __init__(self, pool: _Pool):
        self.pool = pool
        self.table = pool.zeros(pool.members, pool.rows)
        for rows in pool.chunks():
            y = pool.targets[rows].expand(pool.members, -1)[..., None]
            self.table[:, rows] = pool.true_class(rows, y)
        self.sum = pool.zeros(pool.rows)

    def with_each(self, count: int) -> Tensor:
        """[P] losses of the mean over `count` picks, the last of which is each member in turn."""
        total = self.pool.zeros(self.pool.members)
        for rows in self.pool.chunks():
            total -= ((self.sum[rows] + self.table[:, rows]) / count).log().sum(-1)
        return total / self.pool.rows

    def add(self, member: int) -> None:
        self.sum += self.table[member]


class _Accuracy:
    """Its negative, as all scores are minimised."""

    def __init__(self, pool: _Pool):
        self.pool = pool
        self.sum = pool.zeros(pool.rows, pool.width)

    def with_each(self, count: int) -> Tensor:
        right = self.pool.zeros(self.pool.members)
        for rows in self.pool.chunks():
            labels = (self.sum[rows] + self.pool.read(rows)).argmax(-1)
            right += (labels == self.pool.targets[rows]).sum(-1)
        return -right / self.pool.rows

    def add(self, member: int) -> None:
        for rows in self.pool.chunks():
            self.sum[rows] += self.pool.read(rows, slice(member, member + 1))[0]


class _NllAccuracy:
    def __init__(self, pool: _Pool):
        self.parts = _Nll(pool), _Accuracy(pool)

    def with_each(self, count: int) -> Tensor:
        return sum(part.with_each(count) for part in self.parts)

    def add(self, member: int) -> None:
        for part in self.parts:
            part.add(member)


class _Squares:
    """Brier score and mean squared error: norms of mean residuals, from inner products.

    |S + e_j|^2 = |S|^2 + 2 S.e_j + |e_j|^2 for the sum S of the picks' residuals, so a pick costs
    one pass for its inner products with all members, and nothing when it is picked again.
    """

    def __init__(self, pool: _Pool):
        self.pool = pool
        self.count = pool.rows * (pool.width if pool.kind == "values" else 1)
        self.norms = pool.zeros(pool.members)
        for rows in pool.chunks():
            self.norms += pool.residuals(rows).square_().sum(-1)
        self.total, self.cross = pool.zeros(), pool.zeros(pool.members)
        self.products = {}

    def with_each(self, count: int) -> Tensor:
        return (self.total + 2 * self.cross + self.norms) / (count**2 * self.count)

    def add(self, member: int) -> None:
        if member not in self.products:
            column = self.pool.zeros(self.pool.members)
            for rows in self.pool.chunks():
                residuals = self.pool.residuals(rows)
                # not a matrix product: equal members must have equal sums to the last bit
                column += (residuals * residuals[member]).sum(-1)
            self.products[member] = column
        self.total = self.total + 2 * self.cross[member] + self.norms[member]
        self.cross += self.products[member]


_SCORES = {
    "nll": _Nll,
    "accuracy": _Accuracy,
    "brier": _Squares,
    "nll-accuracy": _NllAccuracy,
    "mse": _Squares,
}
