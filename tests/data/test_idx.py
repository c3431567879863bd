"""IDX files: small ones written here, and real MNIST where the checkout has it near."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from landscape_fast.data import mnist, read_idx

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "MNIST"
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


def idx(array):
    """The bytes of an IDX file, by the definition of the format."""
    head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.tobytes()


def arrays():
    random = np.random.default_rng(0)
    sizes = {IMAGES: (7, 5, 3), LABELS: (7,), TEST_IMAGES: (4, 5, 3), TEST_LABELS: (4,)}
    tops = {name: 256 if len(size) == 3 else 10 for name, size in sizes.items()}
    return {n: random.integers(0, tops[n], size, dtype=np.uint8) for n, size in sizes.items()}


def write(folder, packed):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays().items():
        content = idx(array)
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("below", ["", "MNIST", "MNIST/raw", "raw"])
def test_content_and_places(tmp_path, packed, below):
    write(tmp_path / below, packed)
    data = mnist(tmp_path, scale="uint8")
    want = arrays()
    assert data.train_x.shape == (7, 1, 5, 3) and data.train_x.dtype == torch.uint8
    assert np.array_equal(data.train_x[:, 0].numpy(), want[IMAGES])
    assert np.array_equal(data.test_x[:, 0].numpy(), want[TEST_IMAGES])
    assert data.train_y.tolist() == want[LABELS].tolist() and data.train_y.dtype == torch.int64
    assert data.test_y.tolist() == want[TEST_LABELS].tolist()
    raw = mnist(tmp_path, scale="raw").train_x
    assert raw.dtype == torch.float32 and torch.equal(raw, data.train_x.float())
    assert torch.equal(mnist(tmp_path).train_x, raw / 255)


def test_names_and_classes(tmp_path):
    write(tmp_path / "FashionMNIST" / "raw", True)
    data = mnist(tmp_path, name="FashionMNIST")
    assert data.name == "FashionMNIST" and data.classes[9] == "Ankle boot"
    own = mnist(tmp_path / "FashionMNIST", name="mine", classes=list("abcdefghij"))
    assert own.name == "mine" and own.classes == tuple("abcdefghij")
    with pytest.raises(ValueError, match="mnist: name must be one of 'MNIST', .*; got 'mine'; or"):
        mnist(tmp_path, name="mine")


@pytest.mark.filterwarnings("error")
def test_any_array_of_bytes(tmp_path):
    """A tensor of its own: one over the bytes read would be read-only, and torch warns of it."""
    torch.set_warn_always(True)
    for shape in ((0,), (3,), (2, 0, 4), (2, 3, 4, 5)):
        array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
        (tmp_path / "a").write_bytes(idx(array))
        assert np.array_equal(read_idx(tmp_path / "a").numpy(), array)
    torch.set_warn_always(False)


def spoiled(name, change, packed=False):
    """Files of which one is changed: `change` maps its bytes (unpacked) to those written."""

    def apply(folder):
        write(folder, packed)
        path = folder / (f"{name}.gz" if packed else name)
        path.write_bytes(change(path.read_bytes()))
        return folder

    return apply


def bump(content):
    """The first label out of range."""
    return content[:8] + bytes([10]) + content[9:]


def broken_sum(content):
    """A gzip file whose checksum does not fit: its data is intact."""
    return content[:-8] + bytes(4) + content[-4:]


GIANT = struct.pack(">HBB3I", 0, 8, 3, 2**32 - 1, 2**32 - 1, 28)


@pytest.mark.parametrize(
    "make, text",
    [
        (
            spoiled(IMAGES, lambda b: b[:-1]),
            f"{IMAGES} must hold 121 bytes, a header and 7 x 5 x 3; got 120 bytes; copy",
        ),
        (spoiled(IMAGES, lambda b: b + b"x"), f"{IMAGES} must hold 121 bytes, .*; got more"),
        (
            spoiled(IMAGES, lambda b: idx(np.zeros(7, np.uint8))),
            f"{IMAGES} must begin with 00 00 08 03 .*; got 00 00 08 01; copy",
        ),
        (spoiled(LABELS, lambda b: b"\x00\x00\x0d" + b[3:]), "08 01 .*; got 00 00 0d 01"),
        (spoiled(LABELS, lambda b: b""), f"{LABELS} must begin with .*; got an empty file"),
        (spoiled(LABELS, lambda b: b[:6]), f"{LABELS} must hold a header of 8 bytes; got 6 bytes"),
        (
            spoiled(TEST_LABELS, bump),
            f"{TEST_LABELS} must hold labels from 0 to 9; got 10 at 0; pass",
        ),
        (
            spoiled(LABELS, lambda b: idx(np.zeros(6, np.uint8))),
            f"{LABELS} must hold as many labels as {IMAGES} holds images, 7; got 6",
        ),
        (spoiled(IMAGES, lambda b: GIANT + b[16:]), "bytes, a header and .* x 28; got 121 bytes"),
        (
            spoiled(IMAGES, lambda b: gzip.compress(GIANT + bytes(200)), True),
            "x 28; got 216 bytes",
        ),
        (
            spoiled(IMAGES, lambda b: b[:-20], True),
            f"{IMAGES}.gz must be a whole gzip file; got Compressed file ended.*; copy",
        ),
        (spoiled(IMAGES, lambda b: b"\x1f\x8b" + bytes(40), True), "must be a whole gzip file"),
        (spoiled(LABELS, broken_sum, True), "must be a whole gzip file; got CRC check failed"),
        (spoiled(LABELS, lambda b: b"not packed", True), "whole gzip file; got Not a gzipped file"),
        (
            spoiled(IMAGES, lambda b: b[:10] + b"\xff" * 30, True),
            "must be a whole gzip file; got Error -3",
        ),
    ],
)
def test_damaged_files(tmp_path, make, text):
    with pytest.raises(ValueError, match=f"(mnist|read_idx): .*{text}"):
        mnist(make(tmp_path))


def test_missing_files(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=f"mnist: {IMAGES} must be in .*; got nothing; copy"
    ):
        mnist(tmp_path)
    with pytest.raises(
        FileNotFoundError, match="mnist: root must be a folder; got .*no such folder"
    ):
        mnist(tmp_path / "nowhere")
    (write(tmp_path, True) / f"{TEST_LABELS}.gz").unlink()
    text = (
        f"mnist: {TEST_LABELS} or {TEST_LABELS}.gz must be in .*; got t10k-images.*; copy the off"
    )
    with pytest.raises(FileNotFoundError, match=text):
        mnist(tmp_path)


def test_a_link_may_not_lead_outside(tmp_path):
    root = write(tmp_path / "root", False)
    (root / IMAGES).rename(tmp_path / "elsewhere")
    link = root / IMAGES
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"{IMAGES} must be inside .*; got a link to .*elsewhere"):
        mnist(root)
    link.unlink()
    write(tmp_path / "other", False)
    with pytest.raises(ValueError, match="must be inside"):
        mnist(root, name="../other", classes=tuple("0123456789"))


@pytest.mark.skipif(not REAL.is_dir(), reason="no ../shared/data beside the checkout")
def test_real_mnist():
    """Counts as published; a nearest-class-mean rule works only if images and labels match."""
    data = mnist(REAL, scale="raw")
    assert len(data.train_y) == 60_000 and len(data.test_y) == 10_000
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert torch.bincount(data.train_y).tolist() == counts
    assert torch.bincount(data.test_y).tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip
    train, test = data.train_x.flatten(1), data.test_x.flatten(1)
    means = torch.stack([train[data.train_y == c].mean(0) for c in range(10)])
    nearest = torch.cdist(test, means).argmin(1)
    assert (nearest == data.test_y).float().mean() > 0.8  # chance: 0.1
