"""The sums that divergences are means of: over batches of examples they add up."""

from collections.abc import Sequence

import torch
from torch import Tensor

from landscape_fast import _extension
from landscape_fast.ops._checks import check_tensor, require
from landscape_fast.ops._compiled import launch_cuda, logits_arguments
from landscape_fast.ops._dispatch import KERNEL_DTYPES, declare, pick, transforming
from landscape_fast.ops._library import define
from landscape_fast.ops.pairwise_divergence import KINDS, different_labels, example_divergences

OP = "divergence_sums"

declare(OP, cpp=KERNEL_DTYPES, cuda=KERNEL_DTYPES)


def divergence_sums(
    logits: Tensor, kinds: Sequence[str] = ("js",), *, backend: str = "auto"
) -> dict[str, Tensor]:
    r"""How differently each pair of M members predicts, summed over N examples.

    .. math:: S_{ij} = N \cdot D_{ij}, \qquad D \text{ as in } \texttt{pairwise\_divergence}

    Sums of batches add up, where means do not: see `landscape_fast.metrics.DivergenceAccumulator`.

    Args:
        logits: [M, N, C], as in `pairwise_divergence`.
        kinds: of "js", "kl" and "disagreement", each at most once.
        backend: "auto", "torch", "cpp" or "cuda"; see `landscape_fast.show_config`.

    Returns:
        {kind: [M, M] float64}: nats, and for "disagreement" the number of examples, which is exact.
        Zeros for no examples. Divided by N and rounded to float32, to the bit what
        `pairwise_divergence` returns from the same kernel. It has no gradient.

    Raises:
        TypeError: if `logits` is not a tensor.
        ValueError: if its shape or dtype is not as above, a kind is unknown or there twice, or the
            backend cannot run here.

    Cost: that of `pairwise_divergence` for each kind. On a CPU examples are added in float64, the
        classes of one (of up to 32 where there are fewer than 64 classes) in float32, so that
        batches of any multiple of 32 examples, in one call or several, agree to float64 rounding.
        The CUDA kernels add more in float32 first, and batches agree to about 1e-7 of the value.

    Source: as for `pairwise_divergence`.

    Example:
        >>> import torch
        >>> from landscape_fast.ops import divergence_sums
        >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [2.0, 0.0]]])
        >>> divergence_sums(logits, ("disagreement",))["disagreement"]
        tensor([[0., 1.],
                [1., 0.]], dtype=torch.float64)
    """
    check_tensor(OP, "logits", logits, "M, N, C", (None, None, None))
    require(logits.shape[2] > 0, OP, "logits", "[M, N, C] with C at least 1", list(logits.shape))
    check_kinds(OP, kinds)
    name = pick(OP, backend, logits)
    logits = logits.detach()
    if transforming() or name == "torch":
        return divergence_sums_reference(logits, kinds)
    return {kind: _sums_op(logits, kind, name) for kind in kinds}


def divergence_sums_reference(logits: Tensor, kinds: Sequence[str] = ("js",)) -> dict[str, Tensor]:
    """The definition: every backend is tested against this, run in float64."""
    return {kind: _definition(logits, kind) for kind in kinds}


def check_kinds(op: str, kinds: Sequence[str]) -> None:
    """ValueError unless `kinds` are some of the three, each once."""
    good = not isinstance(kinds, str) and len(kinds) > 0 and set(kinds) <= set(KINDS)
    rule = "some of 'js', 'kl' and 'disagreement', each once"
    require(good and len(set(kinds)) == len(kinds), op, "kinds", rule, repr(kinds))


def _definition(logits: Tensor, kind: str) -> Tensor:
    if kind == "disagreement":
        return different_labels(logits.argmax(-1))
    rows = [row.double().sum(-1) for row in example_divergences(logits, kind)]
    return torch.stack(rows) if rows else logits.new_zeros((0, 0), dtype=torch.float64)


def _sums(logits: Tensor, kind: str, backend: str) -> Tensor:
    sums = _sums_fake(logits, kind, backend)
    means = sums.new_empty(sums.shape, dtype=torch.float32)
    arguments = (*logits_arguments(logits), KINDS[kind])
    if backend == "cpp":
        pointers = means.data_ptr(), sums.data_ptr()
        _extension.C.pairwise_divergence(*arguments, *pointers, torch.get_num_threads())
    elif sums.numel():
        sizes = (*logits.shape, KINDS[kind])
        launch_cuda("pairwise_divergence", logits, sizes, arguments, (means, sums))
    return sums


def _sums_fake(logits: Tensor, kind: str, backend: str) -> Tensor:
    return logits.new_empty((logits.shape[0], logits.shape[0]), dtype=torch.float64)


_sums_op = define(
    "divergence_sums(Tensor logits, str kind, str backend) -> Tensor", _sums, _sums_fake
)
