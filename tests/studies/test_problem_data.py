"""The data sets of `train`, read from small files in their official formats."""

import pytest
import torch

from landscape_fast.studies.compare import Problem
from landscape_fast.studies.presets import IMAGENET_PIXELS


def test_imagenet_is_read_at_few_pixels(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    for part in ("train", "val"):
        for place, label in enumerate(("n01", "n02")):
            folder = tmp_path / part / label
            folder.mkdir(parents=True)
            Image.new("RGB", (80, 70), (40 * place, 10, 0)).save(folder / "a.png")
    problem = Problem(data="imagenet", root=str(tmp_path), model="resnet50_v2", pixels="unit")
    loaded = problem.load()
    assert loaded.image == (3, IMAGENET_PIXELS, IMAGENET_PIXELS) and loaded.name == "imagenet"
    assert loaded.classes == ("n01", "n02") and loaded.train_y.tolist() == [0, 1]
    torch.testing.assert_close(loaded.test_x[1, :, 0, 0], torch.tensor([40, 10, 0]) / 255)


def test_a_training_set_larger_than_the_memory_is_refused(tmp_path, monkeypatch):
    Image = pytest.importorskip("PIL.Image")
    for part in ("train", "val"):
        (tmp_path / part / "n01").mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(tmp_path / part / "n01" / "a.png")
    monkeypatch.setattr("os.sysconf", lambda name: 256)  # bytes of a page, pages
    problem = Problem(data="imagenet", root=str(tmp_path), model="resnet50_v2", pixels="unit")
    with pytest.raises(ValueError, match=r"images must be within most_gb = .*; got 2 images"):
        problem.load()
