"""Size curves against a loop over all subsets in numpy."""

import itertools
import sys

import numpy as np
import pytest
import torch

from landscape_fast.landscape import size_curves

MODULE = sys.modules["landscape_fast.landscape.size_curves"]
SCORES = ("accuracy", "nll", "brier", "ece")


def softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def scores(p, y):
    """Of probabilities [N, C], as one writes them."""
    rows = np.arange(len(y))
    truth = np.eye(p.shape[1])[y]
    confidence, right = p.max(1), p.argmax(1) == y
    ece, edges = 0.0, np.linspace(0, 1, 16)
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        inside = (confidence > low) & (confidence <= high)
        ece += abs((right[inside] - confidence[inside]).sum()) / len(y)
    return right.mean(), -np.log(p[rows, y]).mean(), ((p - truth) ** 2).sum(1).mean(), ece


def brute_force(logits, y, size):
    """[subsets, 4], averaging the probabilities of all samples of all members from the start."""
    p = softmax(logits.double().numpy())
    found = []
    for subset in itertools.combinations(range(len(p)), size):
        members = p[list(subset)].reshape(-1, *p.shape[2:])
        found.append(scores(members.mean(0), y.numpy()))
    return np.array(found)


def problem():
    generator = torch.Generator().manual_seed(5)
    y = torch.randint(4, (37,), generator=generator)
    logits = {"deep": (5, 1), "deep and sampled": (4, 3), "sampled": (1, 6)}
    draw = {k: 2 * torch.randn(*s, 37, 4, generator=generator).double() for k, s in logits.items()}
    for values in draw.values():
        values[..., torch.arange(37), y] += 1.5
    return draw, y


@pytest.mark.parametrize("waiting", [1 << 26, 1])
def test_equal_all_subsets_one_at_a_time(waiting, monkeypatch):
    monkeypatch.setattr(MODULE, "WAITING_BYTES", waiting)
    logits, y = problem()
    found = size_curves(logits, y)
    assert list(found) == list(logits)
    for name, curve in found.items():
        R = len(logits[name])
        assert curve.sizes.tolist() == list(range(1, R + 1))
        for place, size in enumerate(curve.sizes.tolist()):
            truth = brute_force(logits[name], y, size)
            assert int(curve.subsets[place]) == len(truth)
            for score, values in zip(SCORES, truth.T, strict=True):
                mean, std = (float(getattr(curve, score + s)[place]) for s in ("", "_std"))
                assert mean == pytest.approx(values.mean(), rel=1e-12), (name, size, score)
                # of equal numbers in another order numpy may find 1e-17
                assert std == pytest.approx(values.std(), rel=1e-9, abs=1e-12)


def test_only_the_sizes_asked_for():
    logits, y = problem()
    every, some = size_curves(logits, y), size_curves(logits, y, sizes=(1, 3))
    assert some["deep"].sizes.tolist() == some["deep and sampled"].sizes.tolist() == [1, 3]
    assert some["sampled"].sizes.tolist() == [1]
    torch.testing.assert_close(some["deep"].nll, every["deep"].nll[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_short_logits_are_those_of_their_values(dtype):
    logits, y = problem()
    short = {name: values.to(dtype) for name, values in logits.items()}
    found = size_curves(short, y)
    truth = size_curves({name: values.double() for name, values in short.items()}, y)
    for name in logits:
        assert torch.equal(found[name].accuracy, truth[name].accuracy)
        # all that follows the logits is float32
        torch.testing.assert_close(found[name].nll, truth[name].nll, rtol=1e-6, atol=0)
        torch.testing.assert_close(found[name].brier, truth[name].brier, rtol=1e-6, atol=1e-6)


def test_sure_members_that_are_wrong_have_a_finite_loss():
    """exp(-200) is 0 in float32, in which these logits are."""
    logits = torch.tensor([[200.0, 0.0], [200.0, 0.0], [240.0, 0.0]])[:, None, None]
    curve = size_curves({"sure": logits}, torch.tensor([1]), sizes=(1, 3))["sure"]
    truth = [(200 + 200 + 240) / 3, 200 + np.log(3 / 2)]  # the third has exp(-40) of the others
    assert curve.nll.tolist() == pytest.approx(truth, rel=1e-6)


def test_each_subset_is_made_of_a_smaller_one(monkeypatch):
    """One addition for each subset of two or more, and none for sizes above those asked for."""
    calls = []
    add = torch.logaddexp
    monkeypatch.setattr(torch, "logaddexp", lambda a, b: calls.append(1) or add(a, b))
    logits, y = problem()
    size_curves({"deep": logits["deep"]}, y)
    assert len(calls) == 2**5 - 1 - 5
    calls.clear()
    size_curves({"deep": logits["deep"]}, y, sizes=(1, 2))
    assert len(calls) == 10
    calls.clear()
    many = torch.randn(40, 1, 3, 2)
    curve = size_curves({"many": many}, torch.zeros(3, dtype=torch.int64), sizes=(1, 40))["many"]
    assert len(calls) == 39 and curve.subsets.tolist() == [40, 1]


@pytest.mark.parametrize(
    ("logits", "sizes", "message"),
    [
        ({}, None, r"logits must be a mapping with at least one variant; got none"),
        ({"a": (2, 1, 4, 3)}, None, r"logits\['a'\] must be \[R, S, N, C\] with N = 5; got \[2"),
        ({"a": (0, 1, 5, 3)}, None, r"logits\['a'\] must be \[R, S, N, C\], none of them 0; got"),
        ({"a": (2, 5, 3)}, None, r"logits\['a'\] must be \[R, S, N, C\] with N = 5; got \[2, 5"),
        ({"a": (2, 1, 5, 3)}, (2, 1), r"sizes must be None or ascending integers of at least 1"),
        ({"a": (2, 1, 5, 3)}, (0,), r"sizes must be None or ascending integers of at least 1"),
        ({"a": (2, 1, 5, 3)}, (), r"sizes must be None or ascending integers of at least 1"),
        ({"a": (2, 1, 5, 3)}, (3,), r"sizes must be at most R = 2 somewhere, as 'a' has it; got"),
        ({"a": (20, 1, 5, 3)}, None, r"sizes must be sizes with at most 20000 subsets of R = 20;"),
    ],
)
def test_what_does_not_fit_is_refused(logits, sizes, message):
    given = {name: torch.zeros(shape) for name, shape in logits.items()}
    with pytest.raises(ValueError, match=f"^size_curves: {message}"):
        size_curves(given, torch.zeros(5, dtype=torch.int64), sizes)
