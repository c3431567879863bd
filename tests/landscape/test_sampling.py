"""Accepted samples against drawing and measuring one at a time."""

import copy

import pytest
import torch
from torch import nn

from landscape_fast.landscape import (
    DiagonalGaussian,
    RandomDirections,
    WeightDropout,
    sample_accepted,
    scale_for_accuracy,
)
from landscape_fast.landscape.sampling import DRAWS_PER_TRY
from landscape_fast.models import ResNet
from landscape_fast.nn import FlatLayout, recalibrate_

TRIES = 4


def problem(build=lambda: nn.Linear(6, 3)):
    """A model that is right on its rows, its layout, its weights, rows, classes."""
    model = build().double().eval()
    layout = FlatLayout(model)
    x = torch.randn(80, 6).double()
    with torch.no_grad():
        y = model(x).argmax(1)
    return model, layout, layout.flatten(model), x, y


def accuracy_of(model, layout, weights, x, y, calibration=None):
    """And logits, as one writes it."""
    network = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, value in layout.views(weights).items():
            network.get_parameter(name).copy_(value)
        if calibration is not None:
            recalibrate_(network, calibration, batch_size=1000)
        logits = network(x)
    return float((logits.argmax(1) == y).double().mean()), logits


def one_by_one(model, layout, sampler, x, y, count, threshold, scale, seed):
    """(sample, tries, weights, accuracy, logits) of the first draw of each that is accepted."""
    found = []
    for i in range(count):
        for attempt in range(TRIES):
            w = sampler.draw(1, scale, seed, first=attempt * DRAWS_PER_TRY + i)[0]
            accuracy, logits = accuracy_of(model, layout, w, x, y)
            if accuracy >= threshold:
                found.append((i, attempt + 1, w, accuracy, logits))
                break
    return found


@pytest.mark.parametrize("per_pass", [1, 3])
def test_equals_drawing_and_measuring_one_at_a_time(per_pass):
    model, layout, centre, x, y = problem()
    sampler = RandomDirections(centre, layout)
    truth = one_by_one(model, layout, sampler, x, y, 12, 0.8, 0.55, seed=3)
    tries = [took for _, took, *_ in truth]
    assert {1, 2} <= set(tries) and len(truth) < 12  # all that can happen does
    found = sample_accepted(
        model, sampler, 12, x, y, threshold=0.8, scales=0.55, tries=TRIES, seed=3,
        per_pass=per_pass, keep_logits=True, progress=False,
    )  # fmt: skip
    assert found.sample.tolist() == [i for i, *_ in truth]
    assert torch.equal(found.weights, torch.stack([w for _, _, w, _, _ in truth]))
    assert found.accuracy.tolist() == [a for *_, a, _ in truth]
    torch.testing.assert_close(found.logits, torch.stack([logits for *_, logits in truth]))
    expected = dict.fromkeys(range(12), TRIES) | {i: took for i, took, *_ in truth}
    assert found.tries.tolist() == list(expected.values())
    assert bool(found) and found.best >= max(found.accuracy)


def test_a_sample_does_not_depend_on_how_many_there_are():
    model, layout, centre, x, y = problem()
    sampler = WeightDropout(centre)
    options = {"threshold": 0.75, "scales": (0.0, 0.6), "seed": 1, "progress": False}
    few = sample_accepted(model, sampler, 4, x, y, **options)
    many = sample_accepted(model, sampler, 11, x, y, per_pass=4, **options)
    S = len(few.scale)
    assert 1 <= S and many.sample[:S].tolist() == few.sample.tolist()
    assert torch.equal(many.weights[:S], few.weights) and torch.equal(many.scale[:S], few.scale)
    assert len(many.scale.unique()) == len(many.scale)


def test_scales_are_uniform_in_their_range():
    stats = pytest.importorskip("scipy.stats")
    model, layout, centre, x, y = problem()
    options = {"threshold": 0.0, "scales": (2.0, 5.0), "per_pass": 50, "progress": False}
    found = sample_accepted(model, RandomDirections(centre, layout), 200, x, y, **options)
    assert len(found.scale) == 200 and found.tries.tolist() == [1] * 200
    assert stats.kstest(found.scale.numpy(), "uniform", (2, 3)).pvalue > 1e-3
    torch.testing.assert_close((found.weights - centre).norm(dim=1), found.scale)


def test_every_sample_may_have_its_own_scale():
    model, layout, centre, x, y = problem()
    scales = torch.tensor([0.0, 0.5, 900.0, 0.25]).double()
    sampler = RandomDirections(centre, layout)
    options = {"threshold": 0.9, "scales": scales, "tries": 2, "progress": False}
    found = sample_accepted(model, sampler, 4, x, y, **options)
    assert torch.equal(found.scale, scales[found.sample]) and 2 not in found.sample.tolist()
    assert torch.equal(found.weights[0], centre) and float(found.accuracy[0]) == 1


@pytest.mark.parametrize("right", [7, 8, 9])  # 0.7 and 0.9 are above what float32 has
def test_a_threshold_that_is_just_reached_is_reached(right):
    model, _, centre, x, y = problem()
    model, centre, x = model.float(), centre.float(), x.float()  # so are the scores of a sweep
    x, y = x[:10], torch.cat([y[:right], (y[right:10] + 1) % 3])
    sampler, options = WeightDropout(centre), {"threshold": right / 10, "progress": False}
    found = sample_accepted(model, sampler, 1, x, y, scales=0.0, tries=1, **options)
    assert found.accuracy.tolist() == [right / 10] == [found.best]
    at = scale_for_accuracy(model, sampler, x, y, scales=(0.0, 0.9), samples=2, steps=1, **options)
    assert at.reached


def test_nothing_accepted_is_a_result_unless_asked():
    model, layout, centre, x, y = problem()
    sampler = RandomDirections(-centre, layout)  # the opposite of what is right
    options = {"threshold": 0.99, "scales": (0.0, 0.1), "tries": 2, "progress": False}
    found = sample_accepted(model, sampler, 3, x, y, keep_logits=True, **options)
    assert not found and found.weights.shape == (0, layout.P) and found.logits.shape == (0, 80, 3)
    assert found.tries.tolist() == [2, 2, 2] and len(found.accuracy) == len(found.sample) == 0
    assert 0 <= found.best < 0.99
    rule = r"threshold must be reached by all 3 samples within 2 tries; got 0 at 0\.99; the best"
    with pytest.raises(ValueError, match=rule):
        sample_accepted(model, sampler, 3, x, y, all_needed=True, **options)


def test_batch_norms_get_the_statistics_of_each_sample():
    model = ResNet((1, 6, 6), classes=4, blocks=1).double().eval()
    layout = FlatLayout(model)
    x, y = torch.randn(40, 1, 6, 6).double(), torch.arange(40) % 4
    calibration = torch.randn(30, 1, 6, 6).double()
    sampler = DiagonalGaussian(layout.flatten(model), layout.mask / 10)
    found = sample_accepted(
        model, sampler, 3, x, y, threshold=0.0, scales=1.0, calibration=calibration,
        keep_logits=True, progress=False,
    )  # fmt: skip
    for w, logits in zip(found.weights, found.logits, strict=True):
        truth = accuracy_of(model, layout, w, x, y, calibration)[1]
        torch.testing.assert_close(logits, truth)
        assert not torch.allclose(logits, accuracy_of(model, layout, w, x, y)[1])


def test_scale_for_an_accuracy_is_the_largest_that_keeps_it():
    model, layout, centre, x, y = problem()
    sampler = RandomDirections(centre, layout)
    found = scale_for_accuracy(
        model, sampler, x, y, threshold=0.9, scales=(0.0, 50.0), samples=5, steps=12, progress=False
    )

    def mean(scale):
        rows = sampler.draw(5, scale, seed=0)
        return sum(accuracy_of(model, layout, w, x, y)[0] for w in rows) / 5

    assert found.reached and 0 < found.scale < 50
    assert mean(found.scale) == pytest.approx(found.accuracy, abs=1e-15)
    assert found.accuracy >= 0.9
    assert mean(found.scale + 50 / 2**12) < 0.9  # one step of the search further


def test_scale_for_an_accuracy_that_all_or_none_reach():
    model, layout, centre, x, y = problem()
    options = {"scales": (0.0, 1e-6), "samples": 2, "progress": False}
    good = scale_for_accuracy(
        model, RandomDirections(centre, layout), x, y, threshold=0.9, **options
    )
    assert good.reached and good.scale == 1e-6 and good.accuracy == 1
    bad = scale_for_accuracy(
        model, RandomDirections(-centre, layout), x, y, threshold=0.9, **options
    )
    assert not bad.reached and bad.scale == 0 and bad.accuracy < 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, r"count must be an integer in \[1, 1048576\]; got 0"),
        ({"tries": 0}, r"tries must be an integer in \[1, 4095\]; got 0"),
        ({"threshold": 70}, r"threshold must be a fraction in \[0, 1\]; got 70"),
        ({"scales": (2.0, 1.0)}, r"scales must be .* \(low, high\) with 0 <= low <= high; got"),
        ({"scales": [0.0, 1.0]}, r"scales must be a number, \[count\] or \(low, high\)"),
        ({"scales": torch.ones(4)}, r"scales must be \[3\]; got \[4\]"),
        ({"seed": -1}, r"seed must be an integer of at least 0; got -1"),
    ],
)
def test_arguments_that_break_their_rule_are_refused(change, message):
    model, layout, centre, x, y = problem()
    options = {"count": 3, "threshold": 0.5, "scales": 1.0, "progress": False} | change
    with pytest.raises(ValueError, match=f"^sample_accepted: {message}"):
        sample_accepted(model, WeightDropout(centre), x=x, y=y, **options)


def test_an_accuracy_is_looked_for_in_a_range():
    model, layout, centre, x, y = problem()
    rule = r"scale_for_accuracy: scales must be \(low, high\) with 0 <= low < high; got \(1, 1\)"
    with pytest.raises(ValueError, match=rule):
        scale_for_accuracy(model, WeightDropout(centre), x, y, threshold=0.5, scales=(1, 1))
