"""How differently M members predict: pairwise Jensen-Shannon, Kullback-Leibler, disagreement."""

from collections.abc import Iterator

import torch
from torch import Tensor

from landscape_fast import _extension
from landscape_fast.ops._checks import check_tensor, require
from landscape_fast.ops._compiled import launch_cuda, logits_arguments
from landscape_fast.ops._dispatch import (
    KERNEL_DTYPES,
    declare,
    pick,
    transforming,
    wants_grad,
)
from landscape_fast.ops._library import define

KINDS = {"js": 0, "kl": 1, "disagreement": 2}  # Divergence of csrc/api.h
LABELS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8, torch.bool)

declare("pairwise_divergence", cpp=KERNEL_DTYPES, cuda=KERNEL_DTYPES)
declare("pairwise_disagreement", cpp=LABELS, cuda=LABELS)


def pairwise_divergence(logits: Tensor, kind: str = "js", *, backend: str = "auto") -> Tensor:
    r"""How differently each pair of M members predicts, averaged over N examples.

    .. math::
        \mathrm{KL}_{ij} = \frac1N \sum_{nc} p_{inc} \ln\frac{p_{inc}}{p_{jnc}}, \quad
        \mathrm{JS}_{ij} = \frac1{2N} \sum_{nc}
            \Big(p_{inc} \ln\frac{2 p_{inc}}{p_{inc} + p_{jnc}} +
                 p_{jnc} \ln\frac{2 p_{jnc}}{p_{inc} + p_{jnc}}\Big), \quad
        p = \operatorname{softmax}_c(\text{logits})

    Args:
        logits: [M, N, C], what member m says about class c of example n; any strides, C at least 1.
            float32, bfloat16 or float16 (both widened to float32), or float64. -inf rules a class
            out.
        kind: "js" (symmetric, at most ln 2), "kl" (entry [i, j] is KL of i from j), or
            "disagreement", the share of the examples whose first largest logit is in different
            classes (NaN counts as the largest, as in `torch.argmax`).
        backend: "auto", "torch", "cpp" or "cuda"; see `landscape_fast.show_config`.

    Returns:
        [M, M], float32 (float64 for float64 logits), in nats, or a fraction for "disagreement".
        The diagonal is exactly 0, JS and disagreement are exactly symmetric, and the kernels never
        return less than 0. `0 * ln 0` is 0, where a probability too small for the dtype counts as
        0; KL is inf where member j rules out what i does not. Zero examples give NaN; for "js" and
        "kl", so do all entries of a member with a NaN, a +inf or a row of -inf. Same bits for any
        number of threads.

    Raises:
        TypeError: if `logits` is not a tensor.
        ValueError: if its shape or dtype is not as above, `kind` is unknown, or the backend cannot
            run here.

    Cost: one read of the logits; M * N * C exponentials, and for "js" N * C logarithms per member
        and per pair of members; no temporary of the size of the logits on the CPU. Nearly equal
        members keep their digits: where a block's mean is below 4e-3 nats it is summed again from
        terms without cancellation. "js" and "kl" are differentiable to any order; "disagreement"
        is constant almost everywhere, and its result requires no gradient.

    Source: prediction-space diversity of Fort et al. 2019 (arXiv:1912.02757); Lin 1991 for JS.

    Example:
        >>> import torch
        >>> from landscape_fast.ops.pairwise_divergence import pairwise_divergence
        >>> p = torch.tensor([[[0.5, 0.5]], [[1.0, 0.0]]])  # two members, one example
        >>> pairwise_divergence(p.log(), "js")
        tensor([[0.0000, 0.2158],
                [0.2158, 0.0000]])
        >>> pairwise_divergence(p.log(), "kl")
        tensor([[0.0000,    inf],
                [0.6931, 0.0000]])
    """
    op = "pairwise_divergence"
    check_tensor(op, "logits", logits, "M, N, C", (None, None, None))
    require(logits.shape[2] > 0, op, "logits", "[M, N, C] with C at least 1", list(logits.shape))
    require(kind in KINDS, op, "kind", "'js', 'kl' or 'disagreement'", repr(kind))
    name = pick(op, backend, logits)
    if transforming() or name == "torch":
        return pairwise_divergence_reference(logits, kind)
    if not wants_grad(logits):
        return _divergence_op(logits, kind, name)
    if kind == "disagreement":
        return _divergence_op(logits.detach(), kind, name)
    return _PairwiseDivergence.apply(logits, kind, name)


def pairwise_disagreement(labels: Tensor, *, backend: str = "auto") -> Tensor:
    r"""Share of N examples to which each pair of M members gives different labels.

    .. math:: D_{ij} = \frac1N \sum_n [\, \ell_{in} \ne \ell_{jn} \,]

    Args:
        labels: [M, N], predicted classes: int64, int32, int16, uint8, int8 or bool, any strides;
            any values, since only equality counts.
        backend: "auto", "torch", "cpp" or "cuda"; see `landscape_fast.show_config`.

    Returns:
        [M, M] float32, a fraction in [0, 1]: exact counts, rounded once. NaN for zero examples.
        It has no gradient.

    Raises:
        TypeError: if `labels` is not a tensor.
        ValueError: if its shape or dtype is not as above, or the backend cannot run here.

    Cost: one comparison per example and pair of members; the labels stay in the cache.

    Source: prediction disagreement of Fort et al. 2019 (arXiv:1912.02757).

    Example:
        >>> import torch
        >>> from landscape_fast.ops.pairwise_divergence import pairwise_disagreement
        >>> pairwise_disagreement(torch.tensor([[3, 1, 2, 2], [3, 1, 0, 2]]))
        tensor([[0.0000, 0.2500],
                [0.2500, 0.0000]])
    """
    op = "pairwise_disagreement"
    check_tensor(op, "labels", labels, "M, N", (None, None), dtypes=LABELS)
    name = pick(op, backend, labels)
    if transforming() or name == "torch":
        return pairwise_disagreement_reference(labels)
    return _disagreement_op(labels, name)


def pairwise_divergence_reference(logits: Tensor, kind: str = "js") -> Tensor:
    """The definition: every backend is tested against this, run in float64."""
    x = _widened(logits)
    if kind == "disagreement":
        return pairwise_disagreement_reference(logits.argmax(-1)).to(x.dtype)
    rows = [row.mean(-1) for row in example_divergences(x, kind)]
    return torch.stack(rows) if rows else x.new_zeros(0, 0)


def pairwise_disagreement_reference(labels: Tensor) -> Tensor:
    """The definition: every backend is tested against this."""
    return (different_labels(labels) / labels.shape[1]).float()


def example_divergences(logits: Tensor, kind: str) -> Iterator[Tensor]:
    """For each member i, [M, N]: "js" or "kl" of i and every member on every example."""
    p, ln_p = _probabilities(_widened(logits), kind)
    for i in range(len(p)):
        if kind == "js":
            ln_m = _ln((p[i] + p) / 2)
            terms = (p[i] * (ln_p[i] - ln_m) + p * (ln_p - ln_m)) / 2
        else:
            terms = p[i] * _ratio(p[i], ln_p[i], ln_p)
        yield terms.sum(-1)


def different_labels(labels: Tensor) -> Tensor:
    """[M, M] float64: on how many of the examples two members differ."""
    rows = [(label != labels).sum(-1) for label in labels.unbind(0)]
    return (torch.stack(rows) if rows else labels.new_zeros(0, 0)).double()


def _widened(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _ln(p: Tensor) -> Tensor:
    """ln p, finite at 0: 0 * ln 0 is then 0, with a gradient of 0."""
    return p.clamp_min(torch.finfo(p.dtype).tiny).log()


def _probabilities(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """p and ln p. For JS the logarithm of the rounded p, so that equal members differ by exactly 0;
    for KL the accurate one, which tells a small q from none."""
    if kind == "js":
        p = x.softmax(-1)
        return p, _ln(p)
    ln_p = x.log_softmax(-1)
    return ln_p.exp(), ln_p


def _ratio(p: Tensor, ln_p: Tensor, ln_q: Tensor) -> Tensor:
    """ln (p / q), and 0 where p = 0."""
    return (ln_p - ln_q).masked_fill(p == 0, 0.0)


class _PairwiseDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, kind, backend):
        ctx.save_for_backward(logits)
        ctx.kind = kind
        return _divergence_op(logits, kind, backend)

    @staticmethod
    def backward(ctx, grad):
        (logits,) = ctx.saved_tensors
        return _gradient(logits, ctx.kind, grad), None, None


def _gradient(logits: Tensor, kind: str, grad: Tensor) -> Tensor:
    """Gradient with respect to the logits, one member at a time: M times less memory than autograd
    keeps for the reference. Plain PyTorch, so with create_graph it is differentiated in turn."""
    x = _widened(logits)
    p, ln_p = _probabilities(x, kind)
    weights = ((grad + grad.T) / 2 if kind == "js" else grad)[..., None, None]
    dx = []
    for i in range(x.shape[0]):
        if kind == "js":
            slope = (weights[i] * (ln_p[i] - _ln((p[i] + p) / 2))).sum(0)
        else:
            slope = (weights[i] * _ratio(p[i], ln_p[i], ln_p)).sum(0)
        slope = p[i] * (slope - (p[i] * slope).sum(-1, keepdim=True))  # through the softmax
        if kind == "kl":
            slope = slope + (weights[:, i] * (p[i] - p)).sum(0)  # as the second argument
        dx.append(slope / x.shape[1])
    return (torch.stack(dx) if dx else torch.zeros_like(x)).to(logits.dtype)


def _divergence(logits: Tensor, kind: str, backend: str) -> Tensor:
    out = _divergence_fake(logits, kind, backend)
    arguments = (*logits_arguments(logits), KINDS[kind])
    if backend == "cpp":
        threads = torch.get_num_threads()
        _extension.C.pairwise_divergence(*arguments, out.data_ptr(), 0, threads)
    elif out.numel():
        sizes = (*logits.shape, KINDS[kind])
        launch_cuda("pairwise_divergence", logits, sizes, arguments, (out, None))
    return out


def _divergence_fake(logits: Tensor, kind: str, backend: str) -> Tensor:
    return logits.new_empty((logits.shape[0], logits.shape[0]), dtype=torch.float32)


def _disagreement(labels: Tensor, backend: str) -> Tensor:
    out = _disagreement_fake(labels, backend)
    arguments = (labels.data_ptr(), labels.itemsize, *labels.shape, *labels.stride())
    if backend == "cpp":
        _extension.C.pairwise_disagreement(*arguments, out.data_ptr(), 0, torch.get_num_threads())
    elif out.numel():
        launch_cuda("pairwise_disagreement", labels, tuple(labels.shape), arguments, (out, None))
    return out


def _disagreement_fake(labels: Tensor, backend: str) -> Tensor:
    return labels.new_empty((labels.shape[0], labels.shape[0]), dtype=torch.float32)


_divergence_op = define(
    "pairwise_divergence(Tensor logits, str kind, str backend) -> Tensor",
    _divergence,
    _divergence_fake,
)
_disagreement_op = define(
    "pairwise_disagreement(Tensor labels, str backend) -> Tensor", _disagreement, _disagreement_fake
)
