"""Corrupted test sets as published arrays: read, written, refused."""

import numpy as np
import pytest
import torch

from landscape_fast.data import CORRUPTIONS, c_names, cifar10_1, cifar_c, corrupt, save_c


def published(folder, count=4, names=("fog", "snow"), size=32):
    """Arrays as the authors save them; returns the bytes of each [5 * count, 32, 32, 3]."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    made = {}
    for name in names:
        made[name] = generator.integers(0, 256, (5 * count, size, size, 3)).astype(np.uint8)
        np.save(folder / f"{name}.npy", made[name])
    np.save(folder / "labels.npy", np.tile(np.arange(count, dtype=np.uint8), 5))
    return made


def test_one_severity_of_the_published_arrays(tmp_path):
    made = published(tmp_path / "CIFAR-10-C")
    for severity in range(1, 6):
        x, y = cifar_c(tmp_path, "snow", severity, scale="uint8")
        truth = made["snow"][4 * severity - 4 : 4 * severity]
        assert np.array_equal(x.permute(0, 2, 3, 1).numpy(), truth) and x.is_contiguous()
        assert y.dtype == torch.int64 and y.tolist() == [0, 1, 2, 3]
    unit, _ = cifar_c(tmp_path / "CIFAR-10-C", "snow", 5)
    assert torch.equal(unit, x.float() / 255)
    x += 1  # a copy of its own, not the file
    assert np.array_equal(np.load(tmp_path / "CIFAR-10-C" / "snow.npy"), made["snow"])


def test_names_that_are_there(tmp_path):
    published(tmp_path, names=("snow", "caustic_noise", "gaussian_noise"))
    assert c_names(tmp_path) == ("gaussian_noise", "snow", "caustic_noise")
    assert len(cifar_c(tmp_path, "caustic_noise", 1)[1]) == 4


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_written_is_what_corrupt_makes(tmp_path, channels):
    x = torch.rand(6, channels, 12, 9, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([5, 0, 255, 1, 1, 7])
    names = ["gaussian_noise", "jpeg_compression", "contrast"]
    save_c(tmp_path / "new" / "place", x, labels, names, seed=3)
    array = np.load(tmp_path / "new" / "place" / "contrast.npy")
    assert array.shape == (30, 12, 9, channels) and array.dtype == np.uint8
    assert np.load(tmp_path / "new" / "place" / "labels.npy").tolist() == labels.tolist() * 5
    assert sorted(c_names(tmp_path / "new" / "place")) == sorted(names)
    assert not list((tmp_path / "new" / "place").glob(".*"))  # no parts left
    for name in names:
        for severity in (1, 5):
            back, y = cifar_c(tmp_path / "new" / "place", name, severity)
            truth = corrupt(x, name, severity, seed=3, levels=True)
            assert torch.equal(back, truth) and torch.equal(y, labels)


def test_all_19_can_be_written(tmp_path):
    save_c(tmp_path, torch.rand(2, 3, 8, 8), torch.tensor([0, 1]))
    assert c_names(tmp_path) == CORRUPTIONS


def damage(name, array):
    return lambda folder: np.save(folder / name, array)


def cut(folder):
    path = folder / "fog.npy"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    "spoil, text",
    [
        (damage("fog.npy", np.zeros((20, 32, 32, 3))), "hold bytes .*; got float64 .20, 32, 32, 3"),
        (damage("fog.npy", np.zeros((20, 3, 32, 32), "u1")), "hold bytes .* got uint8 .20, 3, 32"),
        (damage("fog.npy", np.zeros((21, 8, 8, 3), "u1")), r"labels.npy must hold \[21\] integers"),
        (damage("labels.npy", np.zeros(20)), r"hold \[20\] integers; got float64 \[20\]"),
        (damage("labels.npy", np.array([{}] * 20)), "labels.npy must be a whole .npy file"),
        (cut, "fog.npy must be a whole .npy file; got .*; unpack CIFAR-10-C.tar"),
        (lambda folder: (folder / "fog.npy").write_bytes(b""), "be a whole .npy file"),
    ],
)
def test_damaged_arrays(tmp_path, spoil, text):
    published(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=f"cifar_c: .*{text}"):
        cifar_c(tmp_path, "fog", 1)


def test_a_number_of_images_that_five_does_not_divide(tmp_path):
    published(tmp_path)
    np.save(tmp_path / "fog.npy", np.zeros((21, 8, 8, 3), np.uint8))
    np.save(tmp_path / "labels.npy", np.zeros(21, np.uint8))
    with pytest.raises(ValueError, match="fog.npy must hold 5 N images; got 21"):
        cifar_c(tmp_path, "fog", 1)


def test_refusals(tmp_path):
    published(tmp_path)
    for severity in (0, 6, True, 1.0):
        with pytest.raises(ValueError, match="cifar_c: severity must be 1, 2, 3, 4 or 5; got"):
            cifar_c(tmp_path, "fog", severity)
    with pytest.raises(FileNotFoundError, match="frost.npy must be in .*; got fog.npy, labels.npy"):
        cifar_c(tmp_path, "frost", 1)
    with pytest.raises(ValueError, match="name must be the name of an array; got '../fog'"):
        cifar_c(tmp_path, "../fog", 1)
    with pytest.raises(FileNotFoundError, match="labels.npy must be in .*; unpack .* save_c"):
        (tmp_path / "empty").mkdir()
        cifar_c(tmp_path / "empty", "fog", 1)
    x, y = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    for given, text in [
        ((x, y[:1], ["fog"]), r"labels must be \[N\] integers for N = 2 images; got .*\[1\]"),
        ((x, y.float(), ["fog"]), "labels must be .* got torch.float32"),
        ((x, y + 255, ["fog"]), "labels must be from 0 to 255; got 255 to 256"),
        ((x, y, ["fog", "rain"]), "names must be some of .*; got .'rain'"),
        ((x, y), "names must be without 'saturate' for images without colour"),
        ((x * 2, y, ["fog"]), r"images must be in \[0, 1\]"),
    ]:
        with pytest.raises(ValueError, match=f"save_c: {text}"):
            save_c(tmp_path / "none", *given)
    assert not (tmp_path / "none").exists()  # nothing was begun


def test_cifar10_1(tmp_path):
    folder = tmp_path / "datasets"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3)).astype(np.uint8)
    np.save(folder / "cifar10.1_v6_data.npy", pixels)
    np.save(folder / "cifar10.1_v6_labels.npy", np.arange(7, dtype=np.int32))
    x, y = cifar10_1(tmp_path, scale="uint8")
    assert np.array_equal(x.permute(0, 2, 3, 1).numpy(), pixels) and y.tolist() == list(range(7))
    with pytest.raises(FileNotFoundError, match="cifar10.1_v4_data.npy must be in .*; copy"):
        cifar10_1(tmp_path, version="v4")
    with pytest.raises(ValueError, match="version must be 'v4' or 'v6'; got 'v5'"):
        cifar10_1(tmp_path, version="v5")
