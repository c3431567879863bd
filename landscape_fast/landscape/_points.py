"""Models at many points of the space that some models span, scored in one sweep."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from landscape_fast.methods.sweep import exact_accuracy, sweep
from landscape_fast.nn.flat import FlatLayout, Source
from landscape_fast.ops import combine
from landscape_fast.ops._checks import require, whole


class Points(NamedTuple):
    """Scores of S points, on the CPU.

    Attributes:
        loss: [S] float64, mean cross-entropy, nats.
        accuracy: [S] float64, fraction.
        agreement: [A, S] float64, the fraction of rows to which a point and anchor a give the same
            class.
        logits: [S, N, C], or None.
    """

    loss: Tensor
    accuracy: Tensor
    agreement: Tensor
    logits: Tensor | None


def rows_of(op: str, argument: str, model: nn.Module, given: Tensor | Sequence[Source]) -> Tensor:
    """Weights [K, P] on the device of the model, from these or from K networks or state dicts."""
    layout = FlatLayout(model)
    device = next(model.parameters()).device
    if not isinstance(given, Tensor):
        return layout.flatten_many(given).to(device)
    fits = given.ndim == 2 and given.shape[0] >= 1 and given.shape[1] == layout.P
    rule = f"[K, P] with K of at least 1 and P = {layout.P}"
    require(fits, op, argument, rule, list(given.shape))
    return given.detach().to(device, layout.dtype)


def score_points(
    op: str,
    model: nn.Module,
    anchors: Tensor,
    coeffs: Tensor,
    x: Tensor,
    y: Tensor,
    *,
    agree_with: Sequence[int] = (),
    keep_logits: bool = False,
    **options: Any,
) -> Points:
    """Scores of the models `coeffs` [S, K] of `anchors` [K, P].

    The anchors to agree with go through the same sweep, before the points, so that the agreement of
    a point that is an anchor is 1.
    """
    K = anchors.shape[0]
    fits = all(whole(a, 0) and a < K for a in agree_with)
    require(fits, op, "agree_with", f"integers from 0 to K - 1 = {K - 1}", tuple(agree_with))
    A = len(agree_with)
    own = torch.eye(K, dtype=torch.float64)[list(agree_with)]
    every = torch.cat([own, coeffs.detach().double().cpu()])
    every = every.to(anchors.device, torch.promote_types(anchors.dtype, torch.float32))
    found = sweep(
        model,
        lambda start, stop: combine(every[start:stop], anchors),
        len(every),
        x,
        y,
        keep_logits=keep_logits,
        keep_labels=A > 0,
        **options,
    )
    loss = found.loss[A:].double()
    accuracy = exact_accuracy(found.accuracy[A:], len(y))
    agreement = loss.new_empty(A, len(coeffs))
    for a in range(A):
        agreement[a] = (found.labels[A:] == found.labels[a]).sum(1).double() / len(y)
    return Points(loss, accuracy, agreement, found.logits[A:] if keep_logits else None)
