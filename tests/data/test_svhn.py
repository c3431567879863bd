"""SVHN files: small ones in the official format, written by scipy."""

import numpy as np
import pytest
import torch

from landscape_fast.data import svhn

io = pytest.importorskip("scipy.io")
TRAIN, TEST = "train_32x32.mat", "test_32x32.mat"


def images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3, count), dtype=np.uint8)


def save(path, x, y):
    io.savemat(path, {"X": x, "y": np.array(y, np.uint8).reshape(-1, 1)}, do_compression=True)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "SVHN"
    folder.mkdir()
    save(folder / TRAIN, images(5), [10, 1, 9, 3, 10])
    save(folder / TEST, images(3, 1), [2, 10, 7])
    return folder


def test_pixels_labels_and_order(folder):
    data = svhn(folder.parent, scale="uint8")
    assert data.name == "SVHN" and data.classes == tuple("0123456789")
    assert data.train_y.tolist() == [0, 1, 9, 3, 0] and data.test_y.tolist() == [2, 0, 7]
    for x, truth in ((data.train_x, images(5)), (data.test_x, images(3, 1))):
        assert x.dtype == torch.uint8 and x.is_contiguous()
        for n, c, h, w in [(0, 0, 0, 0), (2, 1, 31, 4), (1, 2, 7, 30)]:
            assert x[n, c, h, w] == truth[h, w, c, n]
    assert torch.equal(svhn(folder).train_x, data.train_x.float() / 255)


def test_the_test_file_alone(folder):
    (folder / TRAIN).unlink()
    data = svhn(folder, train=False)
    assert data.train_x.shape == (0, 3, 32, 32) and len(data.train_y) == 0
    assert data.image == (3, 32, 32) and len(data.test_y) == 3
    with pytest.raises(FileNotFoundError, match="svhn: train_32x32.mat must be in .*; copy train"):
        svhn(folder)


@pytest.mark.parametrize(
    "spoil, text",
    [
        (lambda p: p.write_bytes(p.read_bytes()[:200]), "be a MATLAB 5 file; got"),
        (lambda p: p.write_text("not found"), "be a MATLAB 5 file; got"),
        (lambda p: io.savemat(p, {"X": images(2)}), "hold X and y; got X;"),
        (
            lambda p: save(p, images(2)[:31], [1, 2]),
            r"hold X of \[32, 32, 3, N\] bytes; got .*\[31, 32",
        ),
        (lambda p: save(p, images(2).astype(float), [1, 2]), "hold X of .*; got float64"),
        (lambda p: save(p, images(2), [1, 2, 3]), "hold 2 labels, one each; got 3"),
        (lambda p: save(p, images(2), [1, 11]), "hold labels from 1 to 10; got label 11 at 1"),
        (lambda p: save(p, images(2), [0, 1]), "hold labels from 1 to 10; got label 0 at 0"),
    ],
)
def test_damaged_files(folder, spoil, text):
    spoil(folder / TEST)
    with pytest.raises(ValueError, match=f"svhn: .*test_32x32.mat must {text}.*copy train_32x32"):
        svhn(folder)


def test_wrong_arguments(folder):
    with pytest.raises(ValueError, match="svhn: scale must be one of"):
        svhn(folder, scale="byte")
    with pytest.raises(FileNotFoundError, match="svhn: root must be a folder; .*; copy train"):
        svhn(folder / "nowhere")
