"""The sums behind the scores of an ensemble: over batches of examples they add up."""

import torch
from torch import Tensor

from landscape_fast import _extension
from landscape_fast.ops._compiled import launch_cuda, logits_arguments
from landscape_fast.ops._dispatch import KERNEL_DTYPES, declare, pick, transforming
from landscape_fast.ops._library import define
from landscape_fast.ops.ensemble_summary import check, check_range, example_scores, refuse

OP = "summary_sums"

declare(OP, cpp=KERNEL_DTYPES, cuda=KERNEL_DTYPES)


def summary_sums(
    logits: Tensor,
    targets: Tensor,
    bins: int = 15,
    *,
    ignore_index: int = -100,
    backend: str = "auto",
) -> Tensor:
    r"""What `ensemble_summary` divides by the number of examples, in one read of the logits.

    .. math:: \sum_n [\hat y_n = y_n], \quad \sum_n \mathrm{NLL}_n, \quad \sum_n \mathrm{Brier}_n,
        \quad \sum_{n \in b} ([\hat y_n = y_n] - \max_c p_{nc}) \text{ for each bin } b

    Sums of batches add up, where means do not: see `landscape_fast.metrics.SummaryAccumulator`.

    Args:
        logits: [M, N, C], as in `ensemble_summary`.
        targets: [N] int64, the true classes in [0, C).
        bins: of the calibration error, in [1, 4096].
        ignore_index: examples with this target are left out of every sum.
        backend: "auto", "torch", "cpp" or "cuda"; see `landscape_fast.show_config`.

    Returns:
        [(M + 1) * (3 + bins) + 3] float64. First M + 1 rows of 3 + bins numbers, one for each
        member and one for the averaged probabilities: right answers, NLL (nats), Brier scores, and
        in each bin right answers less confidences. Then the number of examples that count, the
        entropies of the averaged probabilities, and the mutual informations (nats). Numbers of
        answers and examples are exact. It has no gradient.

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if shapes, dtypes or devices are not as above, `bins` is out of range, or the
            backend cannot run here.
        IndexError: if a target is neither a class nor `ignore_index` and the tensors are on the
            CPU; on CUDA all that depends on targets is then NaN, as in `ensemble_summary`.

    Cost: that of `ensemble_summary`. Examples are added in float64, the classes of one (on a CPU of
        up to 32 where there are fewer than 64 classes) in float32.

    Source: as for `ensemble_summary`.

    Example:
        >>> import torch
        >>> from landscape_fast.ops import summary_sums
        >>> logits, targets = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]), torch.tensor([0, 0])
        >>> sums = summary_sums(logits, targets, bins=1)
        >>> rows, rest = sums[:-3].reshape(2, 4), sums[-3:]
        >>> rows[:, 0], rest[0]  # one of two answers is right, of the member and of the average
        (tensor([1., 1.], dtype=torch.float64), tensor(2., dtype=torch.float64))
    """
    check(OP, logits, targets, bins)
    name = pick(OP, backend, logits)
    logits = logits.detach()
    if transforming():
        return summary_sums_reference(logits, targets, bins, ignore_index=ignore_index)
    if name == "torch":
        check_range(OP, targets, logits.shape[2], ignore_index)
        return summary_sums_reference(logits, targets, bins, ignore_index=ignore_index)
    return _sums_op(logits, targets, bins, ignore_index, name)


def summary_sums_reference(
    logits: Tensor, targets: Tensor, bins: int = 15, *, ignore_index: int = -100
) -> Tensor:
    """The definition: every backend is tested against this, run in float64."""
    each = example_scores(logits, targets, bins, ignore_index)
    scores = torch.stack([each.correct, each.nll, each.brier], 1)  # [M + 1, 3, N]
    rows = torch.cat([scores, each.gaps], 1).double().sum(-1) + each.poison
    rest = torch.stack([each.used.double(), each.entropy.double(), each.information.double()])
    return torch.cat([rows.flatten(), rest.sum(-1)])


def _sums(logits: Tensor, targets: Tensor, bins: int, ignore_index: int, backend: str) -> Tensor:
    sums = _sums_fake(logits, targets, bins, ignore_index, backend)
    means = [sums.new_empty(n, dtype=torch.float32) for n in (4 * logits.shape[0], 6)]
    targets = targets.contiguous()
    about = (*logits_arguments(logits), targets.data_ptr(), bins, ignore_index)
    if backend == "cpp":
        pointers = [t.data_ptr() for t in (*means, sums)]
        n = _extension.C.ensemble_summary(*about, *pointers, torch.get_num_threads())
        if n >= 0:
            refuse(OP, targets, logits.shape[2], ignore_index, n)
        return sums
    bad = targets.new_empty(1)
    launch_cuda("ensemble_summary", logits, (*logits.shape, bins), about, (*means, bad, sums))
    check_range(OP, targets, logits.shape[2], ignore_index)
    return sums


def _sums_fake(
    logits: Tensor, targets: Tensor, bins: int, ignore_index: int, backend: str
) -> Tensor:
    size = (logits.shape[0] + 1) * (3 + bins) + 3
    return logits.new_empty(size, dtype=torch.float64)


_sums_op = define(
    "summary_sums(Tensor logits, Tensor targets, int bins, int ignore_index, str backend)"
    " -> Tensor",
    _sums,
    _sums_fake,
)
