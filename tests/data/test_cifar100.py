"""CIFAR-100 files: small ones written here. What it shares with CIFAR-10 is tested there."""

import numpy as np
import pytest
import torch

from landscape_fast.data import cifar100

FINE = [f"fine{i:02d}" for i in range(100)]
COARSE = [f"coarse_{i:02d}" for i in range(20)]
SIZES = {"train.bin": 6, "test.bin": 3}


@pytest.fixture
def written(tmp_path):
    """The folder and the bytes of its files [records, 3074]."""
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    generator, content = np.random.default_rng(0), {}
    for name, records in SIZES.items():
        batch = generator.integers(0, 256, (records, 3074), dtype=np.uint8)
        batch[:, 0] %= 20
        batch[:, 1] %= 100
        (folder / name).write_bytes(batch.tobytes())
        content[name] = batch
    (folder / "fine_label_names.txt").write_text("\n".join(FINE) + "\n")
    (folder / "coarse_label_names.txt").write_text("\n".join(COARSE) + "\n")
    return folder, content


@pytest.mark.parametrize(
    "labels, names, column", [("fine", FINE, 1), ("coarse", COARSE, 0)], ids=["fine", "coarse"]
)
def test_pixels_labels_and_order(written, labels, names, column):
    folder, content = written
    data = cifar100(folder.parent, labels, scale="uint8", records=(6, 3))
    assert data.classes == tuple(names)
    assert data.name == ("CIFAR-100" if labels == "fine" else "CIFAR-100-coarse")
    for x, y, name in ((data.train_x, data.train_y, "train.bin"),
                       (data.test_x, data.test_y, "test.bin")):  # fmt: skip
        batch = content[name]
        assert y.tolist() == batch[:, column].tolist()
        assert torch.equal(x, torch.from_numpy(batch[:, 2:].reshape(-1, 3, 32, 32)))
    unit = cifar100(folder, labels, records=None)
    assert torch.equal(unit.test_x, data.test_x.float() / 255)


def test_refusals(written):
    folder, content = written
    with pytest.raises(ValueError, match="cifar100: labels must be 'fine' or 'coarse'; got 'raw'"):
        cifar100(folder, "raw")
    with pytest.raises(ValueError, match="train.bin must hold 50,000 records of 3,074 bytes"):
        cifar100(folder)
    batch = content["test.bin"].copy()
    batch[1, 0] = 20
    (folder / "test.bin").write_bytes(batch.tobytes())
    with pytest.raises(ValueError, match="hold labels from 0 to 19; got label 20 in record 1"):
        cifar100(folder, records=None)
    (folder / "fine_label_names.txt").write_text("apple")
    with pytest.raises(
        ValueError, match="cifar100: .*name 100 classes; got 1 names; unpack cifar-100-binary"
    ):
        cifar100(folder, records=None)
    with pytest.raises(FileNotFoundError, match="cifar100: root must be a folder"):
        cifar100(folder / "nowhere")
    (folder.parent / "other" / "cifar-100-python").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="that is the pickled version, which is not read"):
        cifar100(folder.parent / "other")
