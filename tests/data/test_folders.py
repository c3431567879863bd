"""Images in folders, written here: which are found, in which order, how they are cut."""

import numpy as np
import pytest
import torch

from landscape_fast.data import image_folder

Image = pytest.importorskip("PIL.Image")


def picture(path, height, width, seed=0, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels, mode).save(path)
    return torch.from_numpy(pixels)


@pytest.fixture
def root(tmp_path):
    """Two classes to train, one of them to test; sizes, endings and modes differ."""
    picture(tmp_path / "train" / "n02" / "b.JPEG", 20, 30)
    picture(tmp_path / "train" / "n02" / "a.png", 16, 16, 1)
    picture(tmp_path / "train" / "n01" / "images" / "x.png", 24, 16, 2, "L")
    picture(tmp_path / "val" / "n02" / "y.png", 16, 21, 3)
    (tmp_path / "train" / "n02" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "readme.txt").write_text("no class")
    return tmp_path


def test_classes_order_and_the_middle(root):
    data = image_folder(root, 16, scale="uint8", name="some")
    assert data.classes == ("n01", "n02") and data.name == "some"
    assert data.train_y.tolist() == [0, 1, 1] and data.test_y.tolist() == [1]
    assert data.train_x.shape == (3, 3, 16, 16) and data.test_x.shape == (1, 3, 16, 16)
    grey = torch.from_numpy(np.array(Image.open(root / "train" / "n01" / "images" / "x.png")))
    assert torch.equal(data.train_x[0], grey[4:20].expand(3, -1, -1))  # the middle of 24 rows
    whole = torch.from_numpy(np.array(Image.open(root / "train" / "n02" / "a.png")))
    assert torch.equal(data.train_x[1], whole.permute(2, 0, 1))  # a before b
    wide = torch.from_numpy(np.array(Image.open(root / "val" / "n02" / "y.png")))
    assert torch.equal(data.test_x[0], wide[:, 2:18].permute(2, 0, 1))
    unit = image_folder(root, 16)
    assert torch.equal(unit.train_x, data.train_x.float() / 255) and unit.name == root.name


def test_resized_to_the_shorter_side(root):
    """20 x 30 pixels with a shorter side of 10 are 10 x 15, of which the middle 8 x 8 stay."""
    data = image_folder(root, 8, shorter=10, scale="uint8")
    image = Image.open(root / "train" / "n02" / "b.JPEG").convert("RGB")
    image = image.resize((15, 10), Image.Resampling.BILINEAR)
    truth = torch.from_numpy(np.array(image))[1:9, 3:11].permute(2, 0, 1)
    assert torch.equal(data.train_x[2], truth)
    assert image_folder(root, 40, scale="uint8").image == (3, 40, 40)  # enlarged


def test_parts_and_limits(root):
    assert image_folder(root, 16, per_class=1).train_y.tolist() == [0, 1]
    alone = image_folder(root, 16, train=None)
    assert alone.classes == ("n02",) and len(alone.train_y) == 0 and alone.test_y.tolist() == [0]
    picture(root / "snow" / "3" / "n02" / "z.png", 16, 16)
    shifted = image_folder(root, 16, test="snow/3")
    assert shifted.test_y.tolist() == [1]
    with pytest.raises(
        ValueError, match=r"within most_gb = 1e-06 GB of memory; got 4 images .*smaller size or"
    ):
        image_folder(root, 16, most_gb=1e-6)
    assert len(image_folder(root, 16, scale="uint8", most_gb=4 * 768e-9).train_y) == 3


def test_damaged_images(root):
    path = root / "train" / "n02" / "b.JPEG"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match="image_folder: .*b.JPEG must be a readable image; got"):
        image_folder(root, 16)
    path.write_text("not an image")
    with pytest.raises(ValueError, match="b.JPEG must be a readable image; got .*; remove it"):
        image_folder(root, 16)


@pytest.mark.parametrize(
    "given, error, text",
    [
        (dict(size=0), ValueError, "size must be a positive integer; got 0"),
        (dict(size=16, shorter=15), ValueError, "shorter must be at least size, 16; got 15"),
        (dict(size=16, per_class=True), ValueError, "per_class must be a positive integer"),
        (dict(size=16, scale="byte"), ValueError, "scale must be one of"),
        (dict(size=16, train=None, test=None), ValueError, "train must be given, or test"),
        (dict(size=16, test="test"), FileNotFoundError, "test must be a folder; got no such"),
        (dict(size=16, test="val/n02"), FileNotFoundError, "of images per class; got y.png; arr"),
    ],
)
def test_wrong_arguments(root, given, error, text):
    with pytest.raises(error, match=f"image_folder: .*{text}"):
        image_folder(root, **given)
