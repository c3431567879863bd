"""What the Gram matrix of the anchors tells: lengths, planes, volumes, principal directions.

The Gram matrix G = A A^T [K, K] (`landscape_fast.ops.gram`, in float64) is all that is needed to
measure in the space that K anchors span, and to place points there. Nothing here is as large as the
parameters, and all of it is differentiable.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from landscape_fast.nn.coefficients import line
from landscape_fast.ops._checks import require, whole


def cosines(gram: Tensor) -> Tensor:
    """[..., K, K] -> [..., K, K], cosines of the angles between anchors; NaN for a zero anchor."""
    squares = gram.diagonal(dim1=-2, dim2=-1)
    # the root of x * x is x: the diagonal is exactly 1
    return (gram / (squares.unsqueeze(-1) * squares.unsqueeze(-2)).sqrt()).clamp(-1, 1)


def distances(gram: Tensor) -> Tensor:
    """[..., K, K] -> [..., K, K], Euclidean distances between anchors."""
    squares = gram.diagonal(dim1=-2, dim2=-1)
    between = squares.unsqueeze(-1) + squares.unsqueeze(-2) - 2 * gram
    return _root(between)


def lengths(coeffs: Tensor, gram: Tensor) -> Tensor:
    """Norms of the vectors C A: coeffs [..., K], gram [K, K] -> [...]."""
    coeffs = coeffs.to(gram.dtype)
    return _root(torch.einsum("...i,ij,...j->...", coeffs, gram, coeffs))


def _root(squares: Tensor) -> Tensor:
    """Square roots; 0, with gradient 0, where rounding has left a square at 0 or below."""
    none = squares <= 0
    return squares.masked_fill(none, 1).sqrt().masked_fill(none, 0)


def arc_length(coeffs: Tensor, gram: Tensor) -> Tensor:
    """Length of the path through S points, up to each of them.

    Args:
        coeffs: [S, K].
        gram: [K, K].

    Returns:
        [S], beginning with 0.

    Example:
        >>> arc_length(line(torch.linspace(0, 1, 3)), torch.eye(2) * 2)
        tensor([0., 1., 2.])
    """
    steps = lengths(coeffs.diff(dim=0), gram)
    return torch.cat([steps.new_zeros(1), steps.cumsum(0)])


def simplex_volume(gram: Tensor) -> Tensor:
    """Volume of the simplex whose corners are the anchors: [..., K, K] -> [...].

    Example:
        >>> simplex_volume(torch.tensor([[0.0, 0, 0], [0, 9, 0], [0, 0, 4]]))  # triangle, 3 by 2
        tensor(3.)
    """
    first = gram[..., :1, :1]
    edges = gram[..., 1:, 1:] - gram[..., 1:, :1] - gram[..., :1, 1:] + first
    return _root(torch.linalg.det(edges)) / math.factorial(gram.shape[-1] - 1)


class Plane(NamedTuple):
    """A plane through the anchors' space, in coefficients [K].

    Attributes:
        origin: the point (0, 0).
        u: the first axis; u A has length 1.
        v: the second axis; v A has length 1, at a right angle to the first.
    """

    origin: Tensor
    u: Tensor
    v: Tensor

    def at(self, x: Tensor, y: Tensor) -> Tensor:
        """Coefficients [..., K] of the points (x, y) [...], in units of weight space."""
        return self.origin + x.unsqueeze(-1) * self.u + y.unsqueeze(-1) * self.v

    def coordinates(self, coeffs: Tensor, gram: Tensor) -> Tensor:
        """(x, y) [..., 2] of the projections of the points `coeffs` [..., K]."""
        away = coeffs.to(gram.dtype) - self.origin
        return torch.stack([away @ gram @ self.u, away @ gram @ self.v], -1)


def plane(gram: Tensor, anchors: tuple[int, int, int] = (0, 1, 2)) -> Plane:
    """The plane through three anchors, which lie at (0, 0), (x, 0) and (x', y').

    Args:
        gram: [K, K].
        anchors: which three. They must not be on one line, where the second axis has no direction
            and comes out as NaN or infinite.

    Source: the plane figures of Garipov et al. 2018 (arXiv:1802.10026).

    Example:
        >>> corners = torch.tensor([[1.0, 0.0], [1.0, 3.0], [3.0, 1.0]])
        >>> corner = plane(corners @ corners.T)
        >>> corner.at(torch.tensor(0.0), torch.tensor(2.0)) @ corners
        tensor([3., 0.])
    """
    _check_places("plane", anchors, gram, 3)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    origin, second, third = (eye[i] for i in anchors)
    return Plane(origin, *_orthonormal(second - origin, third - origin, gram))


def radial_plane(gram: Tensor, anchors: tuple[int, int] = (0, 1)) -> Plane:
    """The plane through two anchors and the origin of weight space, which is at (0, 0).

    Args:
        gram: [K, K].
        anchors: which two. The first lies on the x axis.

    Source: Fort, Hu and Lakshminarayanan 2019 (arXiv:1912.02757).
    """
    _check_places("radial_plane", anchors, gram, 2)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    first, second = (eye[i] for i in anchors)
    return Plane(torch.zeros_like(first), *_orthonormal(first, second, gram))


def pca_plane(gram: Tensor, centre: int = -1) -> Plane:
    """The plane through one snapshot along the two directions in which the others leave it most.

    Args:
        gram: [n, n] of the snapshots, n at least 3.
        centre: the snapshot at (0, 0); the last one of a run, as the authors have it.

    Returns:
        `Plane`, with the first snapshot (the second, if the first is the centre) at coordinates of
        at least 0. Where the snapshots are on one line, the second axis has no direction.

    Source: Li et al. 2018 (arXiv:1712.09913), section 7.

    Example:
        >>> run = torch.tensor([[4.0, 1.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 3.0]])
        >>> pca_plane(run @ run.T).coordinates(torch.eye(3), run @ run.T).shape
        torch.Size([3, 2])
    """
    op, n = "pca_plane", gram.shape[-1]
    require(n >= 3, op, "gram", "[n, n] with n of at least 3", list(gram.shape))
    rule = f"an integer from {-n} to {n - 1}"
    require(whole(centre, -n) and centre < n, op, "centre", rule, centre)
    eye = torch.eye(n, dtype=gram.dtype, device=gram.device)
    away = eye - eye[centre]
    values, vectors = torch.linalg.eigh(away @ gram @ away.T)
    axes = vectors[:, -2:].flip(1).T @ away / values[-2:].flip(0).clamp(min=0).sqrt()[:, None]
    first = away[1 if centre in (0, -n) else 0]
    negative = axes @ gram @ first < 0
    return Plane(eye[centre], *torch.where(negative[:, None], -axes, axes))


def _orthonormal(a: Tensor, b: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Gram-Schmidt in coefficient space."""
    u = a / lengths(a, gram)
    v = b - (b @ gram @ u) * u
    return u, v / lengths(v, gram)


def _check_places(op: str, anchors: tuple[int, ...], gram: Tensor, count: int) -> None:
    K = gram.shape[-1]
    fits = len(set(anchors)) == count == len(anchors)
    fits = fits and all(whole(i, 0) and i < K for i in anchors)
    require(fits, op, "anchors", f"{count} different integers from 0 to {K - 1}", anchors)


def slerp(gram: Tensor, t: Tensor) -> Tensor:
    """From the first anchor to the second along the arc, not the chord.

    Args:
        gram: [2, 2].
        t: [...] positions.

    Returns:
        [..., 2]; those of `line` where the anchors are parallel. Between opposite ones no arc is
        marked out, and the result is huge or not finite, as rounding has it.

    Example:
        >>> slerp(torch.eye(2), torch.tensor(0.5))
        tensor([0.7071, 0.7071])
    """
    angle = cosines(gram)[0, 1].arccos()
    t = t.to(gram.dtype)
    shares = torch.sinc(line(t) * angle / math.pi) * line(t)
    return shares / torch.sinc(angle / math.pi)


def pca_gaussian(gram: Tensor, z: Tensor, *, scale: str = "unit") -> Tensor:
    """Samples of a Gaussian along the principal directions of n snapshots, around their mean.

    Args:
        gram: [n, n] of the snapshots.
        z: [..., k] standard normal, k below n; times the wanted standard deviation.
        scale: "unit": along directions of length 1, whatever the snapshots' spread, as the authors'
            code; "singular": with the standard deviation that the snapshots have along each.

    Returns:
        [..., n], with sum 1. Directions in which the snapshots do not differ are left out.

    Source: Fort, Hu and Lakshminarayanan 2019 (arXiv:1912.02757), the low-rank subspace.
    """
    op, n, k = "pca_gaussian", gram.shape[-1], z.shape[-1]
    require(1 <= k < n, op, "z", f"[..., k] with 1 <= k < n = {n}", list(z.shape))
    require(scale in ("unit", "singular"), op, "scale", "'unit' or 'singular'", repr(scale))
    centre = torch.eye(n, dtype=gram.dtype, device=gram.device) - 1 / n
    values, vectors = torch.linalg.eigh(centre @ gram @ centre)
    values, vectors = values[-k:].flip(0), vectors[:, -k:].flip(1)
    noise = n * torch.finfo(gram.dtype).eps * gram.diagonal().max()
    spread = values > noise
    divisors = torch.where(spread, values, 1).sqrt() if scale == "unit" else math.sqrt(n - 1)
    shares = z.to(gram.dtype) * spread / divisors
    return 1 / n + shares @ (centre @ vectors).T
