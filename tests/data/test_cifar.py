"""CIFAR-10 files: small ones written here, and real images where the checkout has them near."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from landscape_fast.data import cifar10

NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()
FILES = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
REAL = Path(__file__).parents[2].parent / "shared" / "data" / "cifar10-test-jpeg.npz"


def write(folder, records=4):
    """Random files of the official layout; returns all bytes [6, records, 3073]."""
    folder.mkdir(parents=True, exist_ok=True)
    content = np.random.default_rng(0).integers(0, 256, (6, records, 3073), dtype=np.uint8)
    content[:, :, 0] %= 10
    for name, batch in zip(FILES, content, strict=True):
        (folder / name).write_bytes(batch.tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(NAMES) + "\n\n")
    return content


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    write(folder)
    return folder


def test_pixels_labels_and_order(tmp_path):
    content = write(tmp_path / "cifar-10-batches-bin")
    data = cifar10(tmp_path, scale="uint8", records=4)
    assert data.classes == tuple(NAMES) and data.name == "CIFAR-10"
    assert data.train_x.shape == (20, 3, 32, 32) and data.test_x.shape == (4, 3, 32, 32)
    for n, c, h, w in [(0, 0, 0, 0), (7, 2, 31, 5), (19, 1, 4, 30)]:
        assert data.train_x[n, c, h, w] == content[n // 4, n % 4, 1 + c * 1024 + h * 32 + w]
    assert data.train_y.tolist() == content[:5, :, 0].flatten().tolist()
    assert data.test_y.tolist() == content[5, :, 0].tolist()
    assert data.test_x.flatten(1).tolist() == content[5, :, 1:].tolist()


def test_scales_and_roots(folder):
    raw = cifar10(folder, scale="raw", records=4)
    assert raw.train_x.dtype == torch.float32 and raw.train_x.max() == 255
    assert torch.equal(cifar10(str(folder.parent), records=None).train_x, raw.train_x / 255)


def damage(name, change):
    def apply(folder):
        path = folder / name
        path.write_bytes(bytes(change(bytearray(path.read_bytes()))))

    return apply


def label(record, value):
    def change(content):
        content[record * 3073] = value
        return content

    return change


def pickled(folder):
    """Another download of the same data lies there instead."""
    for path in list(folder.iterdir()):
        path.unlink()
    folder.rename(folder.parent / "cifar-10-batches-py")


@pytest.mark.parametrize(
    "spoil, error, text",
    [
        (
            damage("data_batch_3.bin", lambda b: b[:-1]),
            ValueError,
            "data_batch_3.bin must hold 4 records of 3,073 bytes = 12,292 bytes; got 12,291 bytes",
        ),
        (
            damage("test_batch.bin", lambda b: b + b[:3073]),
            ValueError,
            "test_batch.bin must hold 4 records .* got 15,365 bytes; unpack cifar-10-binary.tar.gz",
        ),
        (damage("data_batch_1.bin", lambda b: b""), ValueError, "data_batch_1.bin .* got 0 bytes"),
        (
            damage("data_batch_2.bin", label(3, 10)),
            ValueError,
            "data_batch_2.bin must hold labels from 0 to 9; got label 10 in record 3; unpack",
        ),
        (
            damage("batches.meta.txt", lambda b: b[: b.index(b"ship")]),
            ValueError,
            "batches.meta.txt must name 10 classes; got 8 names; unpack",
        ),
        (
            lambda folder: (folder / "data_batch_4.bin").unlink(),
            FileNotFoundError,
            "data_batch_4.bin must be in .*; got batches.meta.txt, data_batch_1.bin, .*; unpack",
        ),
        (
            lambda folder: (folder / "batches.meta.txt").unlink(),
            FileNotFoundError,
            "batches.meta.txt must be in",
        ),
        (pickled, FileNotFoundError, "data_batch_1.bin must be in .*; that is the pickled version"),
    ],
)
def test_damaged_files(folder, spoil, error, text):
    spoil(folder)
    with pytest.raises(error, match=f"cifar10: .*{text}"):
        cifar10(folder.parent, records=4)


def test_wrong_arguments(folder):
    with pytest.raises(
        FileNotFoundError, match="root must be a folder; got .*no such folder; unpack"
    ):
        cifar10(folder / "nowhere")
    with pytest.raises(
        FileNotFoundError, match="root must be a folder; got .*test_batch.*, a file"
    ):
        cifar10(folder / "test_batch.bin")
    with pytest.raises(ValueError, match="cifar10: scale must be one of .*; got 'byte'"):
        cifar10(folder, scale="byte")
    with pytest.raises(
        ValueError, match="hold 10,000 records of 3,073 bytes = 30,730,000 bytes; got"
    ):
        cifar10(folder)
    with (folder / "test_batch.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(
        ValueError, match="hold one or more records of 3,073 bytes; got 12,293 bytes"
    ):
        cifar10(folder, records=None)


def test_a_link_may_not_lead_outside(folder, tmp_path):
    outside = tmp_path / "elsewhere.bin"
    outside.write_bytes((folder / "test_batch.bin").read_bytes())
    (folder / "test_batch.bin").unlink()
    (folder / "test_batch.bin").symlink_to(outside)
    with pytest.raises(
        ValueError, match="test_batch.bin must be inside .*; got a link to .*elsewhe"
    ):
        cifar10(folder, records=4)
    assert len(cifar10(tmp_path, records=4).test_y) == 4  # inside this root


@pytest.mark.skipif(not REAL.is_file(), reason="no ../shared/data beside the checkout")
def test_real_images_survive_the_layout(tmp_path):
    """180 of the real test images, written as official records, come back pixel by pixel."""
    image = pytest.importorskip("PIL.Image")
    with np.load(REAL) as pack:
        offsets, labels, names = pack["offsets"], pack["labels"], pack["classes"]
        jpeg = pack["jpeg"][: offsets[180]].tobytes()
    pixels = np.stack(
        [
            np.asarray(image.open(io.BytesIO(jpeg[offsets[i] : offsets[i + 1]])).convert("RGB"))
            for i in range(180)
        ]
    )
    for i, name in enumerate(FILES):
        part = slice(30 * i, 30 * i + 30)
        planes = pixels[part].transpose(0, 3, 1, 2).reshape(30, -1)
        records = np.concatenate([labels[part, None].astype(np.uint8), planes], 1)
        (tmp_path / name).write_bytes(records.tobytes())
    (tmp_path / "batches.meta.txt").write_text("\n".join(map(str, names)))
    data = cifar10(tmp_path, scale="uint8", records=30)
    assert data.classes == tuple(NAMES)
    back = torch.cat([data.train_x, data.test_x]).permute(0, 2, 3, 1)
    assert np.array_equal(back.numpy(), pixels)
    assert torch.cat([data.train_y, data.test_y]).tolist() == labels[:180].tolist()
    # Neighbours resemble each other only if rows, columns and channels are where they belong.
    x = data.train_x.float()
    assert (x[..., 1:] - x[..., :-1]).abs().mean() < (x - x.flip(0)).abs().mean() / 3
