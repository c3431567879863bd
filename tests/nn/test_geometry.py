"""What is read off the Gram matrix, against the same on the vectors."""

import math

import pytest
import torch

from landscape_fast.nn import geometry as g
from landscape_fast.nn.coefficients import bezier, line
from landscape_fast.ops.combine import combine
from landscape_fast.testing import assert_as_exact


@pytest.fixture
def anchors():
    return torch.randn(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def gram(anchors):
    return anchors @ anchors.T


def same(name, got, exact):
    assert_as_exact(name, got, exact, exact)


def close(name, got, exact, squared):
    """To the rounding of a Gram matrix, which holds squares: eps relative to the largest."""
    budget = 100 * torch.finfo(torch.float64).eps * squared
    assert got.shape == exact.shape
    assert (got - exact).abs().max() <= budget, f"{name}: {(got - exact).abs().max()} > {budget}"


def test_angles_distances_and_lengths(anchors, gram):
    unit = anchors / anchors.norm(dim=1, keepdim=True)
    close("cosines", g.cosines(gram), unit @ unit.T, 1)
    exact = (anchors[:, None] - anchors).norm(dim=-1)
    off = ~torch.eye(5, dtype=torch.bool)
    close("distances", g.distances(gram)[off], exact[off], exact.max())
    assert not g.distances(gram).diagonal().any()
    coeffs = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    exact = (coeffs @ anchors).norm(dim=1)
    close("lengths", g.lengths(coeffs, gram), exact, exact.max())
    stack = torch.stack([gram, 4 * gram])  # one Gram matrix per part
    close("per part", g.distances(stack)[1], 2 * g.distances(gram), 20)


def test_arc_length_is_the_sum_of_chords(anchors, gram):
    coeffs = bezier(torch.linspace(0, 1, 61, dtype=torch.float64), 5)
    steps = (coeffs @ anchors).diff(dim=0).norm(dim=1)
    exact = torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(0)])
    close("length", g.arc_length(coeffs, gram), exact, exact[-1])


def test_gradients_where_a_distance_is_0(anchors):
    """That of an anchor to itself, and of two equal points of a path."""
    leaves = anchors[:2].clone().requires_grad_()
    t = torch.tensor([0.0, 0.5, 0.5, 1.0], dtype=torch.float64)
    away = leaves.detach()[1] - leaves.detach()[0]
    exact = torch.stack([-away, away]) / away.norm()
    for name, length in (
        ("distance", lambda gram: g.distances(gram)[0, 1]),
        ("path", lambda gram: g.arc_length(line(t), gram)[-1]),
    ):
        (found,) = torch.autograd.grad(length(leaves @ leaves.T), leaves)
        close(name, found, exact, 1)
    assert g.distances(torch.full((2, 2), torch.nan)).isnan().all()


@pytest.mark.parametrize("corners", [2, 3, 4, 5])
def test_volume_of_a_regular_simplex(corners):
    points = 10 + torch.eye(corners, dtype=torch.float64)  # edges of length sqrt(2)
    n = corners - 1
    exact = torch.tensor(math.sqrt(n + 1) / math.factorial(n), dtype=torch.float64)
    volume = g.simplex_volume(points @ points.T)
    close("volume", volume, exact, (points @ points.T).max())
    flat = torch.cat([points, points.mean(0, keepdim=True)])  # no volume in one dimension more
    assert g.simplex_volume(flat @ flat.T) <= 1e-5


def test_plane_is_gram_schmidt_on_the_vectors(anchors, gram):
    plane = g.plane(gram, (3, 1, 4))
    u = anchors[1] - anchors[3]
    u = u / u.norm()
    v = anchors[4] - anchors[3]
    v = v - (v @ u) * u
    v = v / v.norm()
    close("u", plane.u @ anchors, u, 1)
    close("v", plane.v @ anchors, v, 1)
    x, y = torch.meshgrid(torch.arange(-1.0, 2), torch.arange(3.0), indexing="ij")
    x, y = x.double(), y.double()
    exact = anchors[3] + x[..., None] * u + y[..., None] * v
    close("points", plane.at(x, y) @ anchors, exact, exact.abs().max())
    eye = torch.eye(5, dtype=torch.float64)
    away = anchors - anchors[3]
    exact = torch.stack([away @ u, away @ v], -1)
    close("coordinates", plane.coordinates(eye, gram), exact, gram.max())
    close("back", plane.coordinates(plane.at(x, y), gram), torch.stack([x, y], -1), gram.max())


def test_radial_plane_passes_through_the_origin(anchors, gram):
    plane = g.radial_plane(gram, (1, 0))
    e1 = anchors[1] / anchors[1].norm()
    e2 = anchors[0] - (anchors[0] @ e1) * e1
    e2 = e2 / e2.norm()
    point = plane.at(torch.tensor(2.0).double(), torch.tensor(-3.0).double()) @ anchors
    close("point", point, 2 * e1 - 3 * e2, 3)
    zero = torch.zeros(()).double()
    assert not plane.at(zero, zero).any()
    trajectory = plane.coordinates(torch.eye(5, dtype=torch.float64)[2], gram)
    close("projection", trajectory, torch.stack([anchors[2] @ e1, anchors[2] @ e2]), gram.max())


def test_nearly_parallel_anchors_keep_a_right_angle(anchors):
    near = torch.stack([anchors[0], anchors[0] + 1e-5 * anchors[1]])
    gram = near @ near.T
    plane = g.radial_plane(gram)
    cosine = plane.u @ gram @ plane.v
    # the direction of v is known to eps / 1e-10 only, but the angle to the last digits of c^T G c
    budget = 10 * torch.finfo(torch.float64).eps * plane.v.abs().max() * gram.max()
    assert cosine.abs() <= budget


def test_slerp_keeps_the_length_and_the_speed_of_turning(anchors):
    ends = anchors[:2] / anchors[:2].norm(dim=1, keepdim=True)
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    points = combine(g.slerp(ends @ ends.T, t), ends)
    same("length", points.norm(dim=1), torch.ones(9, dtype=torch.float64))
    steps = (points[1:] * points[:-1]).sum(1).arccos()
    angle = (ends[0] @ ends[1]).arccos()
    close("steps", steps, (angle / 8).expand(8), 10)
    same("ends", points[[0, -1]], ends)
    parallel = torch.stack([ends[0], 3 * ends[0]])
    coeffs = g.slerp(parallel @ parallel.T, t)
    close("parallel", coeffs, line(t), 10)


@pytest.mark.parametrize("scale", ["unit", "singular"])
def test_pca_gaussian_has_the_directions_of_the_svd(anchors, gram, scale):
    mean = anchors.mean(0)
    _, values, directions = torch.linalg.svd(anchors - mean, full_matrices=False)
    rank = 3
    samples = combine(g.pca_gaussian(gram, torch.eye(rank).double(), scale=scale), anchors)
    found = samples - mean
    exact = directions[:rank]
    if scale == "singular":
        exact = exact * (values[:rank, None] / math.sqrt(len(anchors) - 1))
    signs = (found * exact).sum(1, keepdim=True).sign()  # a direction has two
    close("directions", signs * found, exact, values.max() ** 2)
    ones = torch.ones(2, dtype=torch.float64)
    z = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]], dtype=torch.float64)
    coeffs = g.pca_gaussian(gram, z, scale=scale)
    close("sum", coeffs.sum(-1), ones, 10)
    close("mean", coeffs[1], torch.full((5,), 0.2, dtype=torch.float64), 1)


def test_pca_gaussian_leaves_out_directions_without_spread(anchors):
    twice = anchors[[0, 1, 0, 1]]  # one direction, four snapshots
    coeffs = g.pca_gaussian(twice @ twice.T, torch.ones(1, 3).double())
    moved = (combine(coeffs, twice)[0] - twice.mean(0)).norm()
    close("one direction of length 1", moved, torch.ones(()).double(), 10)


@pytest.mark.parametrize("centre", [-1, 0, 2])
def test_pca_plane_has_the_two_directions_of_the_svd(anchors, gram, centre):
    away = anchors - anchors[centre]
    exact = torch.linalg.svd(away, full_matrices=False).Vh[:2]
    first = away[1 if centre == 0 else 0]
    exact = exact * (exact @ first).sign()[:, None]
    origin, u, v = (combine(each[None], anchors)[0] for each in g.pca_plane(gram, centre))
    assert torch.equal(origin, anchors[centre])
    close("axes", torch.stack([u, v]), exact, 100)


def test_everything_is_differentiable(anchors):
    small = anchors[:3, :4].clone().requires_grad_()
    t = torch.tensor([0.2, 0.7], dtype=torch.float64)
    functions = [
        lambda a: g.cosines(a @ a.T),
        lambda a: g.simplex_volume(a @ a.T),
        lambda a: g.lengths(bezier(t, 3), a @ a.T),
        lambda a: g.plane(a @ a.T).at(t, t),
        lambda a: g.slerp(a[:2] @ a[:2].T, t),
        lambda a: g.pca_gaussian(a @ a.T, torch.ones(1, 1).double()) @ a,
    ]
    for function in functions:
        assert torch.autograd.gradcheck(function, small)


def test_refusals(gram):
    with pytest.raises(ValueError, match=r"pca_plane: gram must be \[n, n\] with n of at least 3"):
        g.pca_plane(gram[:2, :2])
    with pytest.raises(
        ValueError, match="pca_plane: centre must be an integer from -5 to 4; got 5"
    ):
        g.pca_plane(gram, 5)
    with pytest.raises(ValueError, match="plane: anchors must be 3 different integers from 0 to 4"):
        g.plane(gram, (0, 1, 1))
    with pytest.raises(ValueError, match="radial_plane: anchors must be 2 different integers from"):
        g.radial_plane(gram, (0, 5))
    with pytest.raises(ValueError, match=r"pca_gaussian: z must be \[..., k\] with 1 <= k < n = 5"):
        g.pca_gaussian(gram, torch.zeros(5).double())
    with pytest.raises(ValueError, match="scale must be 'unit' or 'singular'; got 'pca'"):
        g.pca_gaussian(gram, torch.zeros(2).double(), scale="pca")
