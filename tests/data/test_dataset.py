"""The Dataset record, and the embedded digits."""

import dataclasses
import sys

import pytest
import torch

from landscape_fast.data import Dataset, digits


def tiny(n=6, classes=("a", "b")):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (2, n, 3, 4, 5), generator=generator).to(torch.uint8)
    y = torch.arange(n) % len(classes)
    return Dataset(x[0], y, x[1], y.flip(0), classes, "tiny")


def test_it_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny().name = "other"


def test_take_is_a_view_of_the_first():
    data = tiny()
    few = data.take(train=2)
    assert torch.equal(few.train_x, data.train_x[:2]) and torch.equal(few.train_y, data.train_y[:2])
    assert few.train_x.data_ptr() == data.train_x.data_ptr()
    assert few.test_x is not None and len(few.test_x) == 6 and few.image == (3, 4, 5)


def test_statistics_and_standardisation_of_bytes_and_floats():
    data = tiny()
    floats = dataclasses.replace(data, train_x=data.train_x.float(), test_x=data.test_x.float())
    flat = data.train_x.double().movedim(1, 0).flatten(1)
    for version in (data, floats):
        mean, std = version.channel_statistics()
        torch.testing.assert_close(mean, flat.mean(1).float())
        torch.testing.assert_close(std, flat.std(1, correction=0).float())
        kept = version.train_x.clone()
        done = version.standardized()
        assert torch.equal(kept, version.train_x)
        scaled = done.train_x.double().movedim(1, 0).flatten(1)
        torch.testing.assert_close(scaled.mean(1), torch.zeros(3).double(), atol=1e-6, rtol=0)
        torch.testing.assert_close(scaled.std(1, correction=0), torch.ones(3).double())
        want = (data.test_x.float() - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        torch.testing.assert_close(done.test_x, want)
    other = data.standardized(torch.zeros(3), torch.full((3,), 2.0))
    torch.testing.assert_close(other.train_x, data.train_x.float() / 2)


def test_statistics_span_the_blocks_they_are_summed_in():
    """1,500 images are read in two blocks."""
    data = tiny(1500)
    mean, _ = data.channel_statistics()
    torch.testing.assert_close(mean, data.train_x.double().mean((0, 2, 3)).float())


def test_to_moves_all(device):
    moved = tiny().to(device)
    parts = (moved.train_x, moved.train_y, moved.test_x, moved.test_y)
    assert {t.device.type for t in parts} == {device}


X, Y = torch.zeros(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    "call, text",
    [
        (
            lambda: Dataset(X[0], Y, X, Y, ("a",), "n"),
            r"train_x and train_y must be \[N, C, H, W\]",
        ),
        (lambda: Dataset(X, Y, X, Y[:3], ("a",), "n"), r"test_x and test_y must be .*\[3\]"),
        (lambda: Dataset(X, Y.int(), X, Y, ("a",), "n"), "train_y must be int64; got torch.int32"),
        (
            lambda: Dataset(X, Y, X, Y + 1, ("a",), "n"),
            "test_y must be labels from 0 to 0; got 1 to",
        ),
        (
            lambda: Dataset(X, Y - 1, X, Y, ("a",), "n"),
            "train_y must be labels from 0 to 0; got -1",
        ),
        (
            lambda: Dataset(X, Y, X[:, :, 1:], Y, ("a",), "n"),
            r"test_x must have images of the shape of train_x, \[1, 2, 2\]; got \[1, 1, 2\]",
        ),
        (
            lambda: tiny().take(train=0),
            "take: train must be from 1 to the 6 examples there are; got",
        ),
        (
            lambda: tiny().take(test=7),
            "take: test must be from 1 to the 6 examples there are; got 7",
        ),
        (
            lambda: Dataset(X, Y, X, Y, ("a",), "n").standardized(),
            r"standardized: std must be positive; got \[0.0\]",
        ),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_digits_are_all_there_once_and_stratified():
    source = pytest.importorskip("sklearn.datasets").load_digits()
    data = digits(scale="uint8")
    assert data.train_x.dtype == torch.uint8 and data.image == (1, 8, 8)
    both = torch.cat([data.train_x, data.test_x]).flatten(1).tolist()
    want = source.data.astype(int).tolist()
    assert sorted(both) == sorted(want)
    pairs = {tuple(image): label for image, label in zip(want, source.target.tolist(), strict=True)}
    for x, y in ((data.train_x, data.train_y), (data.test_x, data.test_y)):
        assert [pairs[tuple(image)] for image in x.flatten(1).tolist()] == y.tolist()
    whole = torch.bincount(torch.as_tensor(source.target))
    assert torch.equal(torch.bincount(data.test_y), whole // 5)


def test_digits_are_the_same_every_time_and_scaled():
    pytest.importorskip("sklearn")
    one, two = digits(), digits()
    assert torch.equal(one.train_x, two.train_x) and torch.equal(one.test_y, two.test_y)
    assert one.train_x.dtype == torch.float32 and one.train_y.dtype == torch.int64
    raw = digits(scale="raw").train_x
    assert raw.max() == 16 and torch.equal(one.train_x, raw / 16)
    with pytest.raises(
        ValueError, match="digits: scale must be one of 'unit', 'raw', 'uint8'; got"
    ):
        digits(scale="standard")


def test_digits_say_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(
        ImportError, match="digits: scikit-learn must be installed.*pip install sci"
    ):
        digits()
