"""All 19 corruptions: which image gets which bits, how strong they are, and what is refused."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from landscape_fast.data import CORRUPTIONS, _pixels, corrupt, digits

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "cifar10-test-jpeg.npz"
GREY = tuple(name for name in CORRUPTIONS if name != "saturate")
# Severities in the order of the distance from the clean image, where it is not 1 to 5 throughout:
# the authors' parameters trade one change for another there. Each chain must rise.
CHAINS = {
    "glass_blur": ((1, 4), (3, 5)),  # a stronger blur, or each pixel moved twice
    "motion_blur": ((1, 2, 3, 5), (1, 2, 4, 5)),  # 3 and 4 differ in weights below 1e-7
    "frost": ((1, 2, 3),),  # then the image is darkened more
    "elastic_transform": ((5, 4, 3, 2, 1),),  # the affine map shrinks, finer displacements grow
    "spatter": ((1, 2, 3), (4, 5)),  # water, mud
    "saturate": ((1, 2), (3, 4, 5)),  # less, more
}


def pictures(count=24, height=32, width=32, channels=3):
    """A bright disk and a dark bar before a coloured gradient: edges, surfaces and a mean."""
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(count, 4, channels, 1, 1, generator=generator)
    row = torch.linspace(-1, 1, height).view(1, 1, -1, 1)
    column = torch.linspace(-1, 1, width).view(1, 1, 1, -1)
    x = 0.2 + 0.4 * u[:, 0] + 0.15 * row * u[:, 1] + 0.15 * column * u[:, 2]
    place = u[:, 3, :1] - 0.5
    x = torch.where((row - place) ** 2 + column**2 < 0.2, 0.6 + 0.3 * u[:, 1], x)
    x = torch.where((column - 2 * place).abs() < 0.1, 0.1 * u[:, 2], x)
    return (x * 255).round() / 255


@pytest.fixture(scope="module")
def real_pictures():
    """40 real test images of CIFAR-10."""
    image = pytest.importorskip("PIL.Image")
    with np.load(REAL) as pack:
        at, jpeg = pack["offsets"][:41], pack["jpeg"]
        parts = [jpeg[at[i] : at[i + 1]].tobytes() for i in range(40)]
    pixels = np.stack([np.asarray(image.open(io.BytesIO(part)).convert("RGB")) for part in parts])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def distances(x, name):
    return {s: float((corrupt(x, name, s) - x).square().mean()) for s in range(1, 6)}


def assert_rises(x, name):
    found = distances(x, name)
    assert min(found.values()) > 0
    for chain in CHAINS.get(name, ((1, 2, 3, 4, 5),)):
        values = [found[s] for s in chain]
        assert values == sorted(values), f"{name}: {found}"


def test_the_19_names():
    assert len(CORRUPTIONS) == len(set(CORRUPTIONS)) == 19


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_has_the_same_bits_in_any_company(name, monkeypatch):
    x = pictures()
    whole = corrupt(x, name, 3, seed=5)
    some = torch.tensor([17, 3, 4, 23])
    assert torch.equal(corrupt(x[some], name, 3, seed=5, index=some), whole[some])
    assert torch.equal(corrupt(x[2:3], name, 3, seed=5, index=torch.tensor([2])), whole[2:3])
    strided = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    monkeypatch.setattr(_pixels, "_VALUES", 7 * x[0].numel())  # chunks of 7, 7, 7 and 3
    assert torch.equal(corrupt(strided, name, 3, seed=5), whole)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_randomness(name):
    """Equal images differ where chance has a part; the seed decides."""
    x = pictures(1).expand(6, -1, -1, -1)
    before = x.clone()
    made = corrupt(x, name, 4, seed=1)
    assert torch.equal(x, before)
    same = all(torch.equal(made[0], other) for other in made[1:])
    fixed = ("gaussian_blur", "defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate")
    assert same == (name in (*fixed, "jpeg_compression", "saturate"))
    assert torch.equal(corrupt(x, name, 4, seed=2), made) == same
    assert torch.equal(corrupt(x, name, 4, seed=1), made)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_strength(name):
    assert_rises(pictures(), name)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.skipif(not REAL.is_file(), reason="no ../shared/data beside the checkout")
def test_strength_on_real_images(name, real_pictures):
    assert_rises(real_pictures, name)


@pytest.mark.parametrize("name", GREY)
def test_strength_on_digits(name):
    """Of 8 x 8 pixels without colour. The least zoom, 1.06, is no pixel there."""
    pytest.importorskip("sklearn")
    x = digits().test_x[:100]
    found = distances(x, name)
    assert found[1] < found[5]
    assert all(found[s] > 0 for s in range(1 if name != "zoom_blur" else 2, 6))


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(8, 8), (9, 13), (40, 33)])
def test_any_size_stays_in_range(name, shape):
    channels = (3,) if name == "saturate" else (1, 3)
    for c in channels:
        x = torch.cat([pictures(2, *shape, c), torch.zeros(1, c, *shape), torch.ones(1, c, *shape)])
        for severity in (1, 5):
            made = corrupt(x, name, severity)
            assert made.shape == x.shape and made.dtype == torch.float32
            assert made.isfinite().all() and 0 <= made.min() and made.max() <= 1
    assert corrupt(x[:0], name, 1).shape == x[:0].shape


@pytest.mark.parametrize(
    "name", ["gaussian_noise", "jpeg_compression", "contrast", "gaussian_blur"]
)
def test_levels_of_bytes(name):
    x = pictures()
    free, cut = corrupt(x, name, 2), corrupt(x, name, 2, levels=True)
    whole = (cut * 255).round()
    assert torch.equal(whole / 255, cut)
    assert torch.equal(whole, (free.double() * 255 + 2.0**-10).floor().float())
    if name == "jpeg_compression":
        assert torch.equal(cut, free)  # bytes already; none falls to the next lower


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(images=torch.zeros(2, 2, 8, 8)), r"\[N, C, H, W\] with C 1 or 3 .* got \[2, 2, 8, 8"),
        (dict(images=torch.zeros(2, 3, 7, 8)), r"H, W of at least 8; got \[2, 3, 7, 8\]"),
        (dict(images=torch.zeros(3, 8, 8)), r"got \[3, 8, 8\]"),
        (dict(images=torch.full((1, 1, 8, 8), 1.5)), r"in \[0, 1\]; got 1.5 to 1.5; load them w"),
        (dict(images=torch.full((1, 1, 8, 8), float("nan"))), r"in \[0, 1\]; got nan"),
        (dict(images=torch.zeros(1, 1, 8, 8).byte()), "float32 in .* got torch.uint8; load them"),
        (dict(images=[1]), "images must be a tensor; got list"),
        (dict(name="rain"), "name must be one of gaussian_noise, .*; got 'rain'"),
        (dict(severity=0), "severity must be 1, 2, 3, 4 or 5; got 0"),
        (dict(severity=True), "severity must be .* got True"),
        (dict(severity=2.0), "severity must be .* got 2.0"),
        (dict(name="saturate"), r"images must be in colour for saturate; got \[2, 1, 8, 8\]"),
        (dict(index=torch.zeros(3).long()), r"index must be \[N\] int64 for N = 2 images; got .*3"),
        (dict(index=[0, 1]), r"index must be .*; got \[0, 1\]"),
    ],
)
def test_refusals(change, text):
    given = dict(images=torch.zeros(2, 1, 8, 8), name="contrast", severity=1) | change
    with pytest.raises(ValueError, match=f"corrupt: .*{text}"):
        corrupt(**given)
