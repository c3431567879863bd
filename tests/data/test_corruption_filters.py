"""What single corruptions compute, against scipy, PIL, the standard library or a plain loop."""

import colorsys
import io
import math

import numpy as np
import pytest
import torch

from landscape_fast.data import _blurs, _digital, _jpeg, _pixels, corrupt
from landscape_fast.data._draws import DIRECTIONS, Draws

EPSILON = 2.0**-24  # half the distance of float32 numbers below 1


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(got, truth, roundings):
    """Values at most 1, each rounded so many times on its way."""
    difference = (got.double() - torch.as_tensor(np.asarray(truth)).double()).abs().max()
    assert difference <= roundings * EPSILON, f"{difference / EPSILON} roundings"


@pytest.mark.parametrize("sigma", [0.1, 0.4, 1.0, 2.5, 6.4])
@pytest.mark.parametrize("edge", ["nearest", "reflect", "mirror"])
def test_gaussian_of_scipy(sigma, edge):
    ndimage = pytest.importorskip("scipy.ndimage")
    x = noise(2, 3, 9, 14)
    for truncate in (3.0, 4.0):
        truth = ndimage.gaussian_filter(
            x.double().numpy(), (0, 0, sigma, sigma), mode=edge, truncate=truncate
        )
        taps = 2 * int(truncate * sigma + 0.5) + 1
        assert_close(_pixels.gaussian(x, sigma, edge, truncate), truth, 4 * taps + 2)


def test_gaussian_blur_is_that_filter():
    ndimage = pytest.importorskip("scipy.ndimage")
    x = noise(1, 3, 32, 32)
    for severity, sigma in enumerate((0.4, 0.6, 0.7, 0.8, 1.0), 1):
        truth = ndimage.gaussian_filter(x.double().numpy(), (0, 0, sigma, sigma), mode="nearest")
        assert_close(corrupt(x, "gaussian_blur", severity), truth, 40)


def test_filtered_is_a_correlation():
    ndimage = pytest.importorskip("scipy.ndimage")
    x, kernel = noise(1, 1, 8, 11), torch.tensor([[0.0, 0.5, 0.1], [0.0, 0.2, 0.0], [0.1, 0, 0.1]])
    truth = ndimage.correlate(x[0, 0].double().numpy(), kernel.double().numpy(), mode="mirror")
    assert_close(_pixels.filtered(x, kernel.double(), "mirror")[0, 0], truth, 12)


@pytest.mark.parametrize("edge", ["nearest", "reflect", "mirror"])
def test_bilinear_of_scipy(edge):
    ndimage = pytest.importorskip("scipy.ndimage")
    x = noise(1, 1, 8, 11)
    rows, columns = 24 * noise(1, 9, 9, seed=1) - 8, 33 * noise(1, 9, 9, seed=2) - 11
    truth = ndimage.map_coordinates(
        x[0, 0].double().numpy(), [rows[0].double(), columns[0].double()], order=1, mode=edge
    )
    assert_close(_pixels.bilinear(x, rows, columns, edge)[0, 0], truth, 9)


def enlarged(image, factor):
    """The middle of one image [H, W], by scipy's zoom."""
    ndimage = pytest.importorskip("scipy.ndimage")
    for axis in (0, 1):
        size = image.shape[axis]
        part = math.ceil(size / factor)
        first = (size - part) // 2
        image = image.take(range(first, first + part), axis)
        image = ndimage.zoom(image, [factor if a == axis else 1 for a in (0, 1)], order=1)
        first = (image.shape[axis] - size) // 2
        image = image.take(range(first, first + size), axis)
    return image


@pytest.mark.parametrize("factor", [1, 1.03, 1.25, 1.75, 2.25])
@pytest.mark.parametrize("shape", [(32, 32), (9, 14)])
def test_zoom_of_scipy(factor, shape):
    x = noise(1, 1, *shape)
    assert_close(_pixels.zoomed(x, factor)[0, 0], enlarged(x[0, 0].double().numpy(), factor), 10)


def test_zoom_blur_is_a_mean():
    x = noise(1, 1, 32, 32)
    for severity, steps in enumerate((7, 12, 16, 21, 26), 1):
        image = x[0, 0].double().numpy()
        truth = image + sum(enlarged(image, 1 + k / 100) for k in range(steps))
        truth /= steps + 1
        assert_close(corrupt(x, "zoom_blur", severity)[0, 0], truth, 2 * steps + 10)


def test_defocus_kernel():
    """Radius 1 is a plus of five pixels; the 3 x 3 Gaussian of sigma 0.2 hardly changes it."""
    impulse = torch.zeros(1, 1, 9, 9)
    impulse[..., 4, 4] = 1
    made = corrupt(impulse, "defocus_blur", 4)[0, 0]
    side = math.exp(-1 / (2 * 0.2**2))
    total = 1 + 2 * side
    truth = np.zeros((9, 9))
    for y, x in ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0)):
        for v in (-1, 0, 1):
            for h in (-1, 0, 1):
                truth[4 + y + v, 4 + x + h] += side ** (abs(v) + abs(h)) / total**2 / 5
    assert_close(made, truth, 3)
    flat = torch.full((1, 3, 8, 8), 0.7)
    for severity in range(1, 6):
        assert_close(corrupt(flat, "defocus_blur", severity), flat, 30)


def test_motion_blur_by_hand():
    """One pixel at a time: weights exp(-i^2 / 2 sigma^2) along the drawn direction."""
    x, index = noise(3, 1, 12, 16), torch.arange(3)
    made = corrupt(x, "motion_blur", 5, seed=2)
    places = Draws(2, "motion_blur", index).below(DIRECTIONS)
    weights = np.exp(-(np.arange(19) ** 2) / (2 * 2.5**2))
    weights /= weights.sum()
    truth = np.zeros((3, 1, 12, 16))
    for n in range(3):
        angle = math.radians(-45 + 90 * (int(places[n]) + 0.5) / DIRECTIONS)
        for row in range(12):
            for column in range(16):
                for i in range(19):
                    r = row + math.ceil(i * math.sin(angle) - 0.5)
                    c = column + math.ceil(i * math.cos(angle) - 0.5)
                    value = x[n, 0, min(max(r, 0), 11), min(max(c, 0), 15)]
                    truth[n, 0, row, column] += weights[i] * float(value)
    assert_close(made, truth, 2 * 19 + 4)  # 4: the taps that are too light for float32


def test_glass_takes_neighbours():
    """Without a blur every pixel is itself, the one above, left of it, or both, equally often."""
    x = (torch.arange(900.0) / 900).view(1, 1, 30, 30).expand(20, -1, -1, -1)
    made = _blurs.glass_blur(x, (0.05, 1), Draws(0, "glass", torch.arange(20)))
    back = ((x - made) * 900).round()
    assert not back[:, :, :2].any() and not back[..., :2].any()
    values, counts = back[:, :, 2:, 2:].unique(return_counts=True)
    assert values.tolist() == [0, 1, 30, 31]
    expected = counts.sum() / 4
    assert (counts - expected).abs().max() < 5 * expected**0.5


def test_elastic_affine_moves_the_corners():
    """An image that holds its own coordinates tells where each pixel came from."""
    row, column = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    image = torch.stack([column, row, row])[None] / 31
    moves = 4 * noise(5, 3, 2) - 2
    made = _digital._affine(image.expand(5, -1, -1, -1), moves)
    corners = np.array([[26, 26], [26, 6], [6, 6]], float)  # 16 plus or minus 10, (x, y)
    for n in range(5):
        goal = corners + moves[n].double().numpy()
        back = np.linalg.solve(np.c_[goal, np.ones(3)], corners)  # [3, 2]: from new to old places
        y, x = np.mgrid[8:24, 8:24]
        truth = np.stack([x, y, np.ones_like(x)], -1) @ back
        got = made[n, :2, 8:24, 8:24].permute(1, 2, 0).double().numpy() * 31
        # Coordinates up to 32 go through about 20 roundings, with divisors near 1.
        assert abs(got - truth).max() < 20 * 32 * 2 * EPSILON
    still = _digital._affine(image, torch.zeros(1, 3, 2))
    assert torch.equal(still, image)


def test_contrast_and_noise_of_a_constant():
    x = noise(4, 3, 16, 16)
    for severity, factor in enumerate((0.75, 0.5, 0.4, 0.3, 0.15), 1):
        mean = x.double().mean((2, 3), keepdim=True)
        assert_close(corrupt(x, "contrast", severity), (x - mean) * factor + mean, 6)
    x = torch.full((200, 3, 16, 16), 0.5)
    count = x.numel()
    for name, severity, deviation in [
        ("gaussian_noise", 5, 0.1),
        ("speckle_noise", 5, 0.1),
        ("shot_noise", 5, (128 / 255 / 50) ** 0.5),  # 0.5 is taken as 128/255
    ]:
        made = corrupt(x, name, severity).double()
        error = 6 * deviation / (2 * count) ** 0.5
        assert abs(made.std() - deviation) < error, name
        assert abs(made.mean() - (128 / 255 if name == "shot_noise" else 0.5)) < 2 * error, name
    made = corrupt(x, "impulse_noise", 5)
    for value, share in ((0, 0.035), (1, 0.035), (0.5, 0.93)):
        found = (made == value).double().mean()
        assert abs(found - share) < 5 * (share * (1 - share) / count) ** 0.5


def hsv(x, change):
    """Each pixel through the standard library's HSV."""
    out = x.double().clone()
    for n, h, w in np.ndindex(x.shape[0], *x.shape[2:]):
        hue, saturation, value = colorsys.rgb_to_hsv(*out[n, :, h, w].tolist())
        out[n, :, h, w] = torch.tensor(colorsys.hsv_to_rgb(hue, *change(saturation, value)))
    return out


def test_brightness_and_saturation_in_hsv():
    x = noise(1, 3, 10, 10)
    x[0, :, 0, 0], x[0, :, 0, 1], x[0, :, 0, 2] = 0, 1, 0.5  # black, white, grey
    x[0, :, 0, 3] = torch.tensor([0.0, 1.0, 0.0])
    for severity, added in enumerate((0.05, 0.1, 0.15, 0.2, 0.3), 1):
        truth = hsv(x, lambda s, v, added=added: (s, min(v + added, 1)))
        assert_close(corrupt(x, "brightness", severity), truth, 8)
    for severity, (factor, added) in enumerate(
        ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)), 1
    ):
        truth = hsv(x, lambda s, v, f=factor, a=added: (min(s * f + a, 1), v))
        assert_close(corrupt(x, "saturate", severity), truth, 12)
    grey = noise(1, 1, 8, 8)
    assert_close(corrupt(grey, "brightness", 1), (grey + 0.05).clamp(max=1), 4)


@pytest.mark.parametrize("height, width", [(32, 32), (28, 17), (8, 40)])
def test_pixelate_of_pil(height, width):
    """PIL rounds to bytes after each direction: half a level twice."""
    image = pytest.importorskip("PIL.Image")
    x = torch.randint(0, 256, (2, 3, height, width), generator=torch.Generator().manual_seed(0))
    for severity, share in enumerate((0.95, 0.9, 0.85, 0.75, 0.65), 1):
        made = corrupt(x.float() / 255, "pixelate", severity) * 255
        for n in range(2):
            one = image.fromarray(x[n].permute(1, 2, 0).byte().numpy())
            box = image.Resampling.BOX
            one = one.resize((int(width * share), int(height * share)), box)
            one = torch.from_numpy(np.array(one.resize((width, height), box))).permute(2, 0, 1)
            assert (made[n] - one).abs().max() <= 1 + 1e-3


def through_pil(pixels, quality):
    """One image of bytes [C, H, W] through PIL's JPEG."""
    image = pytest.importorskip("PIL.Image")
    array, file = pixels.permute(1, 2, 0).byte().numpy(), io.BytesIO()
    image.fromarray(array if array.shape[2] == 3 else array[..., 0]).save(
        file, "JPEG", quality=quality
    )
    back = torch.from_numpy(np.array(image.open(file)))
    return back.permute(2, 0, 1) if back.ndim == 3 else back[None]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("height, width", [(32, 32), (8, 8), (17, 18), (27, 21), (9, 48)])
def test_jpeg_has_the_pixels_of_pil(height, width, channels):
    features = pytest.importorskip("PIL.features")
    if not features.check_feature("libjpeg_turbo"):
        pytest.skip("a PIL with another JPEG library than libjpeg-turbo")
    generator = torch.Generator().manual_seed(0)
    rough = torch.randint(0, 256, (3, channels, height, width), generator=generator)
    smooth = (_pixels.gaussian(rough.float(), 2.0) - 100) * 6
    pixels = torch.cat([rough, smooth.clamp(0, 255).long()]).int()
    for quality in (95, 80, 65, 58, 50, 40, 5):
        made = _jpeg.jpeg(pixels, quality)
        truth = torch.stack([through_pil(one, quality) for one in pixels])
        assert torch.equal(made, truth.int()), quality


def test_jpeg_qualities_of_the_severities():
    pytest.importorskip("PIL")
    x = (noise(1, 3, 16, 16) * 255).round()
    for severity, quality in enumerate((80, 65, 58, 50, 40), 1):
        made = (corrupt(x / 255, "jpeg_compression", severity) * 255).round().int()
        assert torch.equal(made, _jpeg.jpeg(x.int(), quality))
