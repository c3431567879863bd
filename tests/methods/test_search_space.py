import math

import pytest
import torch

from landscape_fast.methods import TrainConfig
from landscape_fast.methods.search_space import Choice, LogUniform, Uniform, apply, draw

SPACE = {
    "lr": LogUniform(1e-4, 1e-1),
    "label_smoothing": Uniform(0.1, 0.3),
    "dropout": Choice((0.0, 0.1, 0.5)),
    "epochs": Uniform(1, 5),
}


def test_values_have_their_distributions():
    """Against the quantiles of 2000 draws; the deviation of a share is at most 0.5 / sqrt(2000)."""
    found = [draw(SPACE, 7, trial) for trial in range(1, 2001)]
    error = 4 * 0.5 / math.sqrt(2000)
    for share in (0.1, 0.5, 0.9):
        lr = sum(f["lr"] < 10 ** (-4 + 3 * share) for f in found) / 2000
        smooth = sum(f["label_smoothing"] < 0.1 + 0.2 * share for f in found) / 2000
        assert lr == pytest.approx(share, abs=error)
        assert smooth == pytest.approx(share, abs=error)
    for option in (0.0, 0.1, 0.5):
        assert sum(f["dropout"] == option for f in found) / 2000 == pytest.approx(1 / 3, abs=error)
    assert all(isinstance(f["epochs"], int) and 1 <= f["epochs"] <= 5 for f in found)
    ranks = [torch.tensor([f[name] for f in found]) for name in ("lr", "label_smoothing")]
    assert abs(float(torch.corrcoef(torch.stack(ranks))[0, 1])) < error


def test_a_value_depends_on_its_own_name_only():
    smaller = {name: SPACE[name] for name in ("dropout", "lr")}
    for trial in range(5):
        whole, part = draw(SPACE, 0, trial), draw(smaller, 0, trial)
        assert part == {name: whole[name] for name in ("dropout", "lr")}
    assert draw(SPACE, 0, 1)["lr"] != draw(SPACE, 1, 1)["lr"] != draw(SPACE, 1, 2)["lr"]


def test_ends_are_reached_and_not_passed():
    assert Uniform(1.0, 1.0).at(0.7) == 1.0
    for low, high in ((1e-3, 0.7), (3e-5, 0.1), (0.3, 0.3)):
        assert LogUniform(low, high).at(0.0) == low
        assert LogUniform(low, high).at(0.5) == pytest.approx(math.sqrt(low * high))
        assert LogUniform(low, high).at(1.0) == pytest.approx(high)
        assert LogUniform(low, high).at(1.0) <= high
    assert Choice([1, 2]).at(1 - 2**-53) == 2 and Choice([1, 2]).at(0.0) == 1


def test_settings_go_to_the_training_or_to_the_network():
    config, arguments = apply(TrainConfig(seed=4), {"lr": 0.5, "hidden": (3,), "epochs": 2})
    assert config == TrainConfig(seed=4, lr=0.5, epochs=2) and arguments == {"hidden": (3,)}
    with pytest.raises(ValueError, match="TrainConfig: lr must be"):
        apply(TrainConfig(), {"lr": -1.0})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Uniform(2, 1), "Uniform: low and high must be finite and in order; got 2, 1"),
        (lambda: LogUniform(0, 1), "LogUniform: low and high must be positive, .*; got 0, 1"),
        (lambda: LogUniform(1, math.inf), "LogUniform: low and high must be positive, finite"),
        (lambda: Choice(()), "Choice: options must be at least one"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
