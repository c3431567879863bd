"""Curvature of the loss: extreme eigenvalues and trace of its Hessian, also along a path.

Nothing of the size of the Hessian is made. Its products with vectors are gradients of gradients, so
they go through any module with two derivatives, the layers of this library among them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from landscape_fast.landscape._hessian import Eigenvalues, Hessian, Trace, hutchinson, lanczos
from landscape_fast.methods.progress import Progress
from landscape_fast.methods.sweep import given_weights, set_norms
from landscape_fast.nn.statistics import recalibrate_
from landscape_fast.ops._checks import require, whole

_ENDS = ("largest", "smallest")


class CurvaturePath(NamedTuple):
    """Curvature at S models; on the CPU, float64.

    Attributes:
        eigenvalues: [S, k], the largest first; NaN where the Hessian is not finite.
        residual: [S, k]: within so far of each there is an eigenvalue.
        trace: [S]; NaN without samples.
        trace_se: [S], its standard error.
        loss: [S], mean cross-entropy, nats, over the same rows.
        accuracy: [S], fraction.
    """

    eigenvalues: Tensor
    residual: Tensor
    trace: Tensor
    trace_se: Tensor
    loss: Tensor
    accuracy: Tensor


def hessian_top_eigenvalues(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    k: int = 1,
    which: str = "largest",
    tolerance: float = 1e-3,
    most: int = 100,
    batch_size: int = 1000,
    seed: int = 0,
) -> Eigenvalues:
    """The k largest, or smallest, eigenvalues of the Hessian of the mean cross-entropy.

    The method of Lanczos, with every new vector made orthogonal to all before it. It is preferred
    to power iteration with deflation: that converges like the ratio of neighbouring eigenvalues,
    which in the bulk is near 1, finds those of largest magnitude, be they positive or negative, and
    passes the errors of the first on to the next; Lanczos gets all k, of one sign, from one
    sequence of products, and a bound on the error of each. What it costs is the memory for the
    vectors, one for each product.

    Args:
        model: maps rows [B, ...] to logits [B, C], or [M, B, C], where the loss is the mean over
            members and rows. It is copied and put in evaluation mode: no dropout, and batch norms
            with the statistics that the model has, as constants. After
            `statistics_mode_(model, "batch")` norms take, and pass gradients through, those of each
            batch, so that `batch_size` matters.
        x: [N, ...] rows.
        y: [N] int64 classes.
        k: how many.
        which: "largest" or "smallest", by value and not by magnitude.
        tolerance: every value is within so much, relative to the largest magnitude found, of an
            eigenvalue, if `most` products are enough for it.
        most: Hessian-vector products at the most, and vectors [P] in memory.
        batch_size: rows of one forward and backward pass.
        seed: of the first vector, the same on every device.

    Returns:
        `Eigenvalues`. Parameters that need no gradient are held fixed: they have no part in the
        Hessian. A multiple eigenvalue may be found fewer times than it occurs, unless the products
        span the whole space.

    Raises:
        ValueError: if the model is of another dtype than float32 or float64, or k is more than the
            number of trained parameters or `most`.

    Cost: one product is two backward passes for every forward one, over all rows; where the rows
        are one batch, its graph is kept, and a further product is one backward pass.

    Source: Lanczos 1950; re-orthogonalised as in Golub and Van Loan, Matrix Computations, 10.3.

    Example:
        >>> net, rows = nn.Linear(4, 3).double(), torch.randn(20, 4).double()
        >>> found = hessian_top_eigenvalues(net, rows, torch.arange(20) % 3, k=2)
        >>> bool((found.values > 0).all())  # the loss of a linear model is convex
        True
    """
    op = "hessian_top_eigenvalues"
    hessian = Hessian(op, model, x, y, batch_size)
    _check_lanczos(op, k, which, tolerance, most, hessian)
    return lanczos(hessian, k, which, tolerance, most, seed)


def hessian_trace(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    samples: int | None = 16,
    batch_size: int = 1000,
    seed: int = 0,
) -> Trace:
    r"""The trace of the Hessian of the mean cross-entropy, estimated from random vectors.

    .. math:: \operatorname{tr} H = E\, v^T H v, \quad v_p = \pm 1

    Args:
        model: as `hessian_top_eigenvalues` takes it.
        x: [N, ...] rows.
        y: [N] int64 classes.
        samples: V, vectors of independent signs, which have the least variance among those with
            independent entries; None for the exact trace, from as many products as there are
            parameters.
        batch_size: rows of one forward and backward pass.
        seed: of the signs, the same on every device.

    Returns:
        `Trace`, with its standard error.

    Raises:
        ValueError: as `hessian_top_eigenvalues`.

    Cost: V Hessian-vector products over all rows, of which one graph per batch serves all.

    Source: Hutchinson 1990.

    Example:
        >>> net, rows = nn.Linear(2, 2).double(), torch.ones(4, 2).double()
        >>> for parameter in net.parameters():
        ...     _ = nn.init.zeros_(parameter)
        >>> hessian_trace(net, rows, torch.arange(4) % 2, samples=None).value  # 6 times p (1 - p)
        1.5
    """
    op = "hessian_trace"
    fits = samples is None or whole(samples, 1)
    require(fits, op, "samples", "None or an integer of at least 1", repr(samples))
    return hutchinson(Hessian(op, model, x, y, batch_size), samples, seed)


def curvature_along(
    model: nn.Module,
    weights: Callable[[int, int], Tensor],
    count: int,
    x: Tensor,
    y: Tensor,
    *,
    k: int = 1,
    samples: int = 0,
    statistics: str = "recalibrate",
    calibration: Tensor | None = None,
    tolerance: float = 1e-3,
    most: int = 100,
    batch_size: int = 1000,
    seed: int = 0,
    label: str = "curvature",
    progress: bool = True,
) -> CurvaturePath:
    """The largest eigenvalues of the Hessian, and its trace, at the models of a path.

    Args:
        model: the architecture, buffers and device; it is not changed.
        weights: `weights(start, stop)` returns the weights of these models, [stop - start, P], as
            for `landscape_fast.methods.sweep`; for instance
            `lambda start, stop: subspace.mix(coeffs[start:stop])`.
        count: S, how many models there are.
        x: [N, ...] rows.
        y: [N] int64 classes.
        k: eigenvalues at each.
        samples: of the trace at each, the same vectors everywhere, so that differences along the
            path are more exact than the values; 0 for no trace.
        statistics: of batch norms: "recalibrate": taken anew for every model from the rows of
            `calibration`, and constants in the Hessian; "shared": those of `model`, constants;
            "batch": those of each batch of x, through which gradients pass; "none": for networks
            without any.
        calibration: [N', ...] training rows without augmentation, needed where there are batch
            norms to recalibrate.
        tolerance: see `hessian_top_eigenvalues`, also `most`, `batch_size` and `seed`.
        most: Hessian-vector products for the eigenvalues of one model.
        batch_size: rows of one forward and backward pass.
        seed: of the first vector and the signs.
        label: what the progress display calls it.
        progress: show progress.

    Returns:
        `CurvaturePath`.

    Raises:
        TypeError: if `weights` gives no tensor.
        ValueError: as `hessian_top_eigenvalues`, or if arguments do not fit together.

    Cost: S times that of `hessian_top_eigenvalues` and `hessian_trace`.

    Example:
        >>> from landscape_fast.nn import FlatLayout
        >>> layout = FlatLayout(nn.Linear(4, 3))
        >>> ends = layout.flatten_many([nn.Linear(4, 3), nn.Linear(4, 3)])
        >>> t = torch.linspace(0, 1, 5)[:, None]
        >>> rows, classes = torch.randn(20, 4), torch.arange(20) % 3
        >>> path = lambda start, stop: torch.lerp(ends[:1], ends[1:], t[start:stop])
        >>> found = curvature_along(nn.Linear(4, 3), path, 5, rows, classes, k=2, progress=False)
        >>> found.eigenvalues.shape
        torch.Size([5, 2])
    """
    op = "curvature_along"
    require(whole(count, 1), op, "count", "an integer of at least 1", repr(count))
    require(whole(samples, 0), op, "samples", "an integer of at least 0", repr(samples))
    hessian = Hessian(op, model, x, y, batch_size)
    _check_lanczos(op, k, "largest", tolerance, most, hessian)
    rows = set_norms(op, hessian.model, x, calibration, statistics)
    values = torch.empty(count, k, dtype=torch.float64)
    residual = torch.empty_like(values)
    trace = torch.full((2, count), float("nan"), dtype=torch.float64)
    scores = torch.empty(2, count, dtype=torch.float64)
    bar = Progress(label, count, count, enabled=progress, rounds="model")
    try:
        for s in range(count):
            found = given_weights(op, weights, s, s + 1, hessian.layout, hessian.device)
            hessian.move_to(found[0])
            if rows is not None:
                recalibrate_(hessian.model, rows, batch_size=batch_size)
            scores[0, s], scores[1, s] = hessian.scores()
            top = lanczos(hessian, k, "largest", tolerance, most, seed)
            values[s], residual[s] = top.values, top.residual
            if samples:
                trace[0, s], trace[1, s] = hutchinson(hessian, samples, seed)[:2]
            bar.step()
            bar.epoch({"epoch": s + 1, "loss": scores[0, s], "accuracy": scores[1, s]})
    finally:
        bar.close()
    return CurvaturePath(values, residual, *trace, *scores)


def _check_lanczos(
    op: str, k: int, which: str, tolerance: float, most: int, hessian: Hessian
) -> None:
    require(which in _ENDS, op, "which", f"one of {_ENDS}", repr(which))
    require(0 <= tolerance < 1, op, "tolerance", "a number in [0, 1)", tolerance)
    require(whole(most, 1), op, "most", "an integer of at least 1", repr(most))
    limit = min(most, hessian.size)
    rule = f"an integer from 1 to {limit}, the least of `most` and the trained parameters"
    require(whole(k, 1) and k <= limit, op, "k", rule, repr(k))
