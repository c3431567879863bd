"""Snow, frost, fog and spatter, against plain loops, scipy and what they do to simple images."""

import numpy as np
import pytest
import torch

from landscape_fast.data import _liquid, _weather, corrupt
from landscape_fast.data._draws import Draws

INDEX = torch.arange(4)


class Recorded(Draws):
    """Draws that can be looked at afterwards."""

    def __init__(self, *args):
        super().__init__(*args)
        self.seen = []

    def uniform(self, *shape):
        self.seen.append(super().uniform(*shape))
        return self.seen[-1]


@pytest.mark.parametrize("size, decay", [((8, 8), 2.0), ((16, 16), 3.0), ((9, 13), 1.75)])
def test_plasma_by_hand(size, decay):
    """Diamond-square on a torus, one point at a time, with the same random numbers."""
    draws = Recorded(0, "fog", INDEX)
    made = _weather.plasma(size, decay, draws)
    side = 8 if max(size) <= 8 else 16
    numbers = iter(draws.seen)
    field = np.zeros((4, side, side))
    step, bound = side, 100.0
    while step > 1:
        half, k = step // 2, side // step
        middle, right, down = (next(numbers).double().numpy() * 2 - 1 for _ in range(3))
        for i, j in np.ndindex(k, k):
            corners = [(i, j), (i + 1, j), (i, j + 1), (i + 1, j + 1)]
            total = sum(field[:, a % k * step, b % k * step] for a, b in corners)
            field[:, i * step + half, j * step + half] = total / 4 + bound**2 * middle[:, i, j]
        for i, j in np.ndindex(k, k):
            for moved, dy, dx in ((right, 0, half), (down, half, 0)):
                y, x = i * step + dy, j * step + dx
                near = [(y - half, x), (y + half, x), (y, x - half), (y, x + half)]
                total = sum(field[:, a % side, b % side] for a, b in near)
                field[:, y, x] = total / 4 + bound**2 * moved[:, i, j]
        step, bound = half, bound / decay
    field -= field.min((1, 2), keepdims=True)
    field /= field.max((1, 2), keepdims=True)
    truth = field[:, None, : size[0], : size[1]]
    # Each level adds a few roundings of numbers up to the range, 2 * 100^2 at the first.
    assert abs(made.double().numpy() - truth).max() < 64 * 2.0**-24


def test_fog_keeps_the_range_of_an_image():
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.8
    for severity, (thickness, decay) in enumerate(
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)), 1
    ):
        made = corrupt(x, "fog", severity)
        most = x.amax((1, 2, 3), keepdim=True).double()
        cloud = _weather.plasma((16, 16), decay, Draws(0, "fog", INDEX)).double()
        truth = (x.double() + thickness * cloud) * most / (most + thickness)
        assert (made - truth).abs().max() < 8 * 2.0**-24
        assert (made <= most + 2.0**-20).all()
    assert not corrupt(torch.zeros(1, 3, 8, 8), "fog", 5).any()


def test_snow_falls_on_black_and_vanishes_on_white():
    black, white = torch.zeros(200, 3, 32, 32), torch.ones(1, 3, 32, 32)
    assert torch.equal(corrupt(white, "snow", 5), white)
    means = []
    for severity, kept in enumerate((0.95, 0.9, 0.9, 0.85, 0.8), 1):
        made = corrupt(black, "snow", severity)
        assert torch.equal(made, made.flip(2, 3))  # flakes fall both ways
        assert torch.equal(made[:, 0], made[:, 1])
        ground = 0.5 * (1 - kept)  # black is whitened to a half
        assert abs(float(made.min()) - ground) < 1e-6
        means.append(float(made.mean()) - ground)
    assert means == sorted(means) and means[0] > 0.005


def test_frost_has_the_colours_of_the_photographs():
    draws = Draws(0, "frost", torch.arange(2000))
    kinds = Draws(0, "frost", torch.arange(2000)).below(5)
    made = _weather.ice(3, (32, 32), draws)
    for kind, (colour, deviation) in enumerate(_weather._FROST):
        mine = made[kinds == kind]
        assert len(mine) > 300
        # Of about 400 textures whose means deviate by less than half of `deviation`.
        error = 4 * 0.5 * deviation / len(mine) ** 0.5
        assert (mine.mean((0, 2, 3)) - torch.tensor(colour)).abs().max() < error
        assert abs(mine.std((2, 3)).mean() - deviation) < error
    x = torch.full((3, 3, 32, 32), 0.4)
    for severity, (kept, added) in enumerate(
        ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)), 1
    ):
        ice = _weather.ice(3, (32, 32), Draws(0, "frost", torch.arange(3)))
        assert torch.equal(corrupt(x, "frost", severity), (x * kept + ice * added).clamp(0, 1))


def test_mud_covers_and_water_brightens():
    x = torch.rand(50, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.3 + 0.4
    mud = torch.tensor([63, 42, 20]).view(3, 1, 1) / 255
    for severity in (4, 5):
        made = corrupt(x, "spatter", severity)
        untouched = (made == x).all(1)
        covered = ((made - mud).abs() < 0.2 * (x - mud).abs() + 1e-6).all(1)
        assert (untouched | covered).all()  # a cover below 0.8 is none
        assert 0.002 < covered.float().mean() < 0.3
    for severity in (1, 2, 3):
        added = corrupt(x, "spatter", severity) - x
        assert (added >= 0).all() and 0.5 < (added == 0).all(1).float().mean() < 1
        inner = (added > 1e-3).all(1) & (x + added < 0.99).all(1)
        red, green, blue = added.permute(1, 0, 2, 3)[:, inner]
        assert len(red) > 100 and (green - blue).abs().max() < 1e-6
        assert (red / green - 175 / 238).abs().max() < 1e-3


def test_distance_of_scipy():
    ndimage = pytest.importorskip("scipy.ndimage")
    outlines = torch.rand(6, 1, 40, 56, generator=torch.Generator().manual_seed(0)) < 0.002
    made = _liquid._distance(outlines)
    for n in range(6):
        truth = ndimage.distance_transform_edt(~outlines[n, 0].numpy()).clip(max=20)
        assert abs(made[n, 0].numpy() - truth).max() < 1e-5
    assert (_liquid._distance(torch.zeros(1, 1, 8, 8) > 0) == 20).all()


def test_equalised_by_hand():
    level = torch.randint(2, 9, (3, 1, 10, 10), generator=torch.Generator().manual_seed(0)).float()
    made = _liquid._equalised(level)
    for n in range(3):
        values = level[n].flatten().tolist()
        first = min(values)
        others = sum(v > first for v in values)
        for v, got in zip(values, made[n].flatten().tolist(), strict=True):
            assert abs(got - 255 * sum(first < u <= v for u in values) / others) < 0.5 + 1e-4
    alike = torch.full((1, 1, 8, 8), 7.0)
    assert torch.equal(_liquid._equalised(alike), alike)


def test_outlines_of_a_disk_are_thin_and_closed():
    ndimage = pytest.importorskip("scipy.ndimage")
    row = torch.arange(40.0).view(-1, 1) - 20
    radius = (row**2 + row.T**2).sqrt()
    layer = ((10 - radius).clamp(-1, 1) * 100 + 100)[None, None]
    edge = _liquid._outlines(layer)[0, 0]
    assert ((radius[edge] - 10).abs() < 1.5).all()
    assert 50 < edge.sum() < 95  # a circumference is 63 pixels, a staircase of it up to 80
    outside, _ = ndimage.label(~edge.numpy())
    assert outside[20, 20] != outside[0, 0]


def test_no_liquid_no_light():
    assert not _liquid.emboss_of_drops(torch.zeros(2, 1, 16, 16)).any()
