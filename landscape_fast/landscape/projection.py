"""Where models lie in a plane of weight space, and which grid covers them."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from landscape_fast.nn.geometry import Plane, lengths
from landscape_fast.ops import gram
from landscape_fast.ops._checks import require, whole

_AT_A_TIME = 16  # models projected together: their Gram matrix with the anchors stays small
_BLURRED = 0.1  # of an axis: rounding of the weights beyond this, and it has no direction


class Projection(NamedTuple):
    """Where models lie in a plane; on the CPU, float64.

    Attributes:
        at: [T, 2], the nearest points of the plane.
        away: [T], the distances to them; 0 in the plane, to about 1e-6 of the norm.
        norm: [T], the norms of the weights.
    """

    at: Tensor
    away: Tensor
    norm: Tensor


@torch.no_grad()
def project(weights: Tensor, anchors: Tensor, plane: Plane) -> Projection:
    """Models projected to a plane: a trajectory of training, samples of a Gaussian, other optima.

    Args:
        weights: [T, P].
        anchors: [K, P], those of the plane.
        plane: its origin and axes, [K] each; they need not be orthonormal.

    Returns:
        `Projection`. In a plane of weight space all that is not near it is far away: the distances
        of independent networks are of the order of their norms.

    Raises:
        ValueError: if shapes do not fit or the plane is not finite.

    Cost: T / 16 * (K + 16)^2 * P multiplications in float64, and copies of K + 16 models.

    Source: Fort, Hu and Lakshminarayanan 2019 (arXiv:1912.02757), figure 5.

    Example:
        >>> from landscape_fast.nn.geometry import radial_plane
        >>> anchors = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
        >>> axes = radial_plane(gram(anchors))
        >>> project(torch.tensor([[1.0, 1.0, 4.0]]), anchors, axes).away
        tensor([4.], dtype=torch.float64)
    """
    op = "project"
    require(anchors.ndim == 2, op, "anchors", "[K, P]", list(anchors.shape))
    K, P = anchors.shape
    fits = weights.ndim == 2 and weights.shape[1] == P
    require(fits, op, "weights", f"[T, P] with P = {P}", list(weights.shape))
    plane, parts = check_plane(op, plane, gram(anchors).cpu(), anchors.dtype), []
    for rows in weights.split(_AT_A_TIME):
        products = gram(torch.cat([anchors, rows.to(anchors)])).cpu()
        wide = Plane(*(nn.functional.pad(each, (0, len(rows))) for each in plane))
        points = torch.eye(len(products), dtype=torch.float64)[K:]
        at = nearest(wide, points, products)
        away = lengths(points - wide.at(*at.unbind(1)), products)
        parts.append(Projection(at, away, lengths(points, products)))
    empty = Projection(*(torch.zeros(s, dtype=torch.float64) for s in ((0, 2), 0, 0)))
    return Projection(*map(torch.cat, zip(empty, *parts, strict=True)))


def grid_around(
    at: Tensor, points: int | tuple[int, int] = 41, margin: float = 0.2
) -> tuple[Tensor, Tensor]:
    """Coordinates of a grid over all of some points, for `map_plane`.

    Args:
        at: [T, 2].
        points: of the grid along each axis, or (W, H).
        margin: how far it reaches beyond them, as a fraction of their width and height.

    Returns:
        x [W] and y [H], float64, at equal steps.

    Raises:
        ValueError: if there are fewer than two points along an axis, or all of `at` is on a line
            along one.

    Example:
        >>> grid_around(torch.tensor([[0.0, 0.0], [4.0, 2.0]]), points=(3, 2), margin=0.5)[0]
        tensor([-2.,  2.,  6.], dtype=torch.float64)
    """
    op = "grid_around"
    sizes = (points, points) if isinstance(points, int) else tuple(points)
    fits = len(sizes) == 2 and all(whole(n, 2) for n in sizes)
    require(fits, op, "points", "an integer of at least 2, or two of them", points)
    require(margin >= 0, op, "margin", "at least 0", margin)
    require(at.ndim == 2 and at.shape[1] == 2, op, "at", "[T, 2]", list(at.shape))
    low, high = at.double().cpu().aminmax(dim=0)
    wide = bool((high > low).all())
    require(wide, op, "at", "points that differ along both axes", at.tolist())
    low, high = low - margin * (high - low), high + margin * (high - low)
    ends = zip(low.tolist(), high.tolist(), sizes, strict=True)
    return tuple(torch.linspace(a, b, n, dtype=torch.float64) for a, b, n in ends)


def nearest(plane: Plane, points: Tensor, products: Tensor) -> Tensor:
    """(x, y) [..., 2] nearest to the points [..., K], also where axes are not orthonormal."""
    axes = torch.stack([plane.u, plane.v])
    along = plane.coordinates(points, products)
    return torch.linalg.solve(axes @ products @ axes.T, along.mT).mT


def check_plane(op: str, plane: Plane, products: Tensor, dtype: torch.dtype) -> Plane:
    """The plane in float64 on the CPU, if its axes are more than rounding of the anchors.

    Args:
        op: for the message.
        plane: in coefficients of K anchors.
        products: [K, K], their Gram matrix.
        dtype: of the anchors.
    """
    K = products.shape[0]
    for name, value in zip(Plane._fields, plane, strict=True):
        rule, got = f"[K] with K = {K}, of the anchors", list(value.shape)
        require(value.shape == (K,), op, f"plane.{name}", rule, got)
    plane = Plane(*(value.detach().double().cpu() for value in plane))
    # of an axis of length 1 that is a difference of long vectors; the Gram matrix has half the
    # digits of float64 for a length
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float64).eps ** 0.5)
    axes = torch.stack([plane.u, plane.v])
    share = (plane.v @ products @ plane.u) / (plane.u @ products @ plane.u)
    apart = torch.stack([plane.u, plane.v - share * plane.u])  # two axes along one line span none
    blur = eps * (axes.abs() @ products.diagonal().sqrt()) / lengths(apart, products)
    finite = all(bool(value.isfinite().all()) for value in plane)
    rule, remedy = "spanned by anchors", "models on one line, or too close to each other, span none"
    require(finite and bool((blur < _BLURRED).all()), op, "plane", rule, axes.tolist(), remedy)
    return plane
