"""Greedy selection against brute force and against the definition, written out."""

import itertools

import pytest
import torch

from landscape_fast.methods import selection as module
from landscape_fast.methods.selection import OBJECTIVES, select_members
from landscape_fast.ops import ensemble_summary

CLASSES = ("nll", "accuracy", "brier", "nll-accuracy")


def pool(members=7, rows=60, classes=4, seed=0, skill=1.0):
    """Members that lean towards the truth, each with its own noise, and the truth."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (rows,), generator=generator)
    noise = torch.randn(members, rows, classes, generator=generator, dtype=torch.float64)
    strength = torch.linspace(0.5, 1.5, members, dtype=torch.float64)
    return 2 * noise + skill * strength[:, None, None] * torch.eye(classes)[y], y


def loss(probabilities, y, objective):
    """The objective of one mean prediction [N, C], as a loss; the textbook's formulas."""
    right = (probabilities.argmax(-1) == y).double().mean()
    nll = -probabilities[torch.arange(len(y)), y].log().mean()
    onehot = torch.eye(probabilities.shape[-1], dtype=torch.float64)[y]
    return float(
        {
            "nll": nll,
            "accuracy": -right,
            "brier": (probabilities - onehot).square().sum(-1).mean(),
            "nll-accuracy": nll - right,
        }[objective]
    )


def literal(probabilities, y, size, objective):
    """hyper_ens word for word: every mean is made anew."""
    picks, best = [], float("inf")
    while len(set(picks)) < size:
        chosen = None
        for j in range(len(probabilities)):
            value = loss(probabilities[[*picks, j]].mean(0), y, objective)
            if value < best - 1e-12:  # the mean over repeated members is rounded
                best, chosen = value, j
        if chosen is None:
            break
        picks.append(chosen)
    return picks


@pytest.mark.parametrize("objective", CLASSES)
@pytest.mark.parametrize("seed", range(4))
def test_is_the_definition(objective, seed):
    logits, y = pool(seed=seed)
    for size in (1, 3, 7):
        found = select_members(logits, y, size, objective)
        expected = literal(logits.softmax(-1), y, size, objective)
        assert found.picks == expected
        assert found.members == list(dict.fromkeys(expected))
        assert dict(zip(found.members, found.weights, strict=True)) == {
            j: expected.count(j) for j in expected
        }
        for count, value in enumerate(found.trajectory, 1):
            mean = logits.softmax(-1)[expected[:count]].mean(0)
            sign = -1 if objective == "accuracy" else 1
            assert value == pytest.approx(sign * loss(mean, y, objective), abs=1e-12)


def test_some_member_is_picked_twice_and_counts_twice():
    """Otherwise the cases above would say nothing about weights."""
    logits, y = pool(seed=1)
    found = select_members(logits, y, 7)
    assert max(found.weights) > 1 and sum(found.weights) == len(found.picks)
    expected = logits.softmax(-1)[found.picks].mean(0)
    torch.testing.assert_close(found.predict(logits), expected)
    assert loss(found.predict(logits), y, "nll") == pytest.approx(found.trajectory[-1])


@pytest.mark.parametrize("objective", CLASSES)
def test_each_step_is_the_best_of_all_by_brute_force(objective):
    """Over all multisets of two picks that contain the first, and all single members."""
    logits, y = pool(members=5, seed=3)
    p = logits.softmax(-1)
    found = select_members(logits, y, 2, objective)
    alone = [loss(p[j], y, objective) for j in range(5)]
    assert found.picks[0] == alone.index(min(alone))
    pairs = {
        pair: loss(p[list(pair)].mean(0), y, objective)
        for pair in itertools.combinations_with_replacement(range(5), 2)
        if found.picks[0] in pair
    }
    best = min(pairs.values())
    if len(found.picks) > 1:
        assert pairs[tuple(sorted(found.picks[:2]))] == best < min(alone)
    else:
        assert not best < min(alone)


def test_accuracy_picks_the_best_and_never_the_worst():
    """The public code of the paper minimises accuracy, which picks the single worst model."""
    y = torch.arange(40) % 4
    right = torch.eye(4)[y]
    wrong = torch.eye(4)[(y + 1) % 4]
    half = torch.where((torch.arange(40) < 20)[:, None], right, wrong)
    logits = 5 * torch.stack([wrong, half, right])
    found = select_members(logits, y, 3, "accuracy")
    assert (found.members, found.weights, found.trajectory) == ([2], [1], [1.0])


def test_mse_is_the_definition_for_one_and_for_several_outputs():
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    values = y + torch.randn(6, 50, 3, generator=generator, dtype=torch.float64)
    for predictions, targets in ((values, y), (values[..., 0], y[:, 0])):
        found = select_members(predictions, targets, 4, "mse")
        picks, best = [], float("inf")
        while len(set(picks)) < 4:
            losses = [
                float((predictions[[*picks, j]].mean(0) - targets).square().mean())
                for j in range(6)
            ]
            if min(losses) >= best - 1e-12:
                break
            best = min(losses)
            picks.append(losses.index(best))
        assert found.picks == picks and found.trajectory[-1] == pytest.approx(best)
        mean = found.predict(predictions)
        assert float((mean - targets).square().mean()) == pytest.approx(best)


@pytest.mark.parametrize("objective", CLASSES)
def test_of_equal_members_the_first_joins(objective):
    logits, y = pool(seed=2)
    twice = torch.cat([logits, logits])
    once = select_members(logits, y, 4, objective)
    found = select_members(twice, y, 4, objective)
    assert found.picks == once.picks and max(found.picks) < 7
    shuffled = torch.tensor([3, 0, 6, 5, 1, 2, 4])
    other = select_members(logits[shuffled], y, 4, objective)
    if objective != "accuracy":  # where different members tie
        assert [int(shuffled[j]) for j in other.picks] == once.picks


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_pieces_of_any_size_give_the_same(objective, monkeypatch):
    logits, y = pool()
    if objective == "mse":
        y = torch.zeros(60, 4, dtype=torch.float64)
    whole = select_members(logits, y, 5, objective)
    for elements in (1, 7 * 4 * 13):
        monkeypatch.setattr(module, "_CHUNK", elements)
        parts = select_members(logits, y, 5, objective)
        assert parts.picks == whole.picks
        assert parts.trajectory == pytest.approx(whole.trajectory, abs=1e-12)


def test_without_replacement_the_size_is_exact():
    logits, y = pool()
    found = select_members(logits, y, 5, replacement=False)
    assert len(found.members) == 5 and found.weights == [1] * 5 and found.picks == found.members
    rest, picked = set(range(7)), []
    for j in found.picks:
        p = logits.softmax(-1)
        losses = {i: loss(p[[*picked, i]].mean(0), y, "nll") for i in rest}
        assert losses[j] == min(losses.values())
        picked.append(j)
        rest.remove(j)
    assert select_members(logits, y, 7, "accuracy", replacement=False).weights == [1] * 7


def test_a_limit_on_picks():
    logits, y = pool(seed=1)
    whole = select_members(logits, y, 7)
    for picks in (1, 2, 3):
        assert select_members(logits, y, 7, max_picks=picks).picks == whole.picks[:picks]


def test_prunes_an_ensemble_and_agrees_with_the_summary():
    """Scores on the same rows are those of ops.ensemble_summary on the repeated members."""
    logits, y = pool(members=32, rows=200, seed=5)
    logits = logits.float()
    summary_of_all = ensemble_summary(logits, y)
    for objective in ("nll", "brier", "accuracy"):
        found = select_members(logits, y, 8, objective)
        assert len(found.members) <= 8
        summary = ensemble_summary(logits[found.picks], y)
        assert float(getattr(summary, objective)) == pytest.approx(found.trajectory[-1], rel=1e-5)
        members = getattr(summary_of_all, f"member_{objective}")
        if objective == "accuracy":
            assert found.trajectory[0] == pytest.approx(float(members.max()))
        else:  # accuracy moves in steps, and may stop at the best member
            assert found.trajectory[0] == pytest.approx(float(members.min()))
            assert found.trajectory[-1] < float(getattr(summary_of_all, objective))


def test_probabilities_and_layouts():
    logits, y = pool()
    p = logits.softmax(-1)
    assert (
        select_members(p, y, 4, inputs="probabilities").picks == select_members(logits, y, 4).picks
    )
    minor = logits.transpose(0, 1).contiguous()  # [N, P, C], as a TabM returns
    assert select_members(minor.transpose(0, 1), y, 4).picks == select_members(logits, y, 4).picks
    found = select_members(p, y, 4, inputs="probabilities")
    torch.testing.assert_close(found.predict(p), select_members(logits, y, 4).predict(logits))
    assert logits.requires_grad_().grad is None
    assert select_members(logits, y, 4).picks == found.picks


def test_members_that_are_sure_and_wrong_are_no_trouble():
    """ln 0 is -inf: one such member must not hide the others, all such must not end in nothing."""
    logits, y = pool()
    wrong = torch.full_like(logits[:1], -2000.0)
    wrong[0, torch.arange(60), (y + 1) % 4] = 0.0
    mixed = torch.cat([wrong, logits])
    found = select_members(mixed, y, 4)
    assert 0 not in found.members
    assert [j - 1 for j in found.picks] == select_members(logits, y, 4).picks
    found = select_members(wrong.expand(3, -1, -1), y, 2)
    assert (found.members, found.trajectory) == ([0], [float("inf")])


def test_one_member_one_row_one_class():
    found = select_members(torch.zeros(1, 1, 1), torch.zeros(1).long(), 1)
    assert (found.members, found.weights, found.trajectory) == ([0], [1], [0.0])


L, Y = torch.zeros(3, 4, 2), torch.tensor([0, 1, 1, 0])
WRONG = [
    ((L, Y, 0), {}, r"size must be an integer from 1 to P = 3; got 0"),
    ((L, Y, 4), {}, r"size must be an integer from 1 to P = 3; got 4"),
    ((L, Y, True), {}, r"size must be an integer from 1 to P = 3; got True"),
    ((L, Y, 2, "acc"), {}, r"objective must be one of \('nll', .*; got 'acc'"),
    ((L, Y, 2), {"inputs": "odds"}, r"inputs must be one of .*; got 'odds'"),
    ((L, Y, 2), {"max_picks": True}, r"max_picks must be None or an integer .*; got True"),
    ((L, Y, 2), {"max_picks": 0}, r"max_picks must be None or an integer of at least 1; got 0"),
    ((L[0], Y, 2), {}, r"predictions must be \[P, N, C\]; got \[4, 2\]"),
    ((L[:0], Y, 2), {}, r"predictions must be without an empty dimension; got \[0, 4, 2\]"),
    ((L.long(), Y, 2), {}, r"predictions must be one of float32, .*; got torch.int64"),
    ((L, Y[:3], 2), {}, r"targets must be \[N\] with N = 4; got \[3\]"),
    ((L, Y + 1, 2), {}, r"targets must be classes from 0 to 1; got 1 to 2"),
    ((L + torch.nan, Y, 2), {}, r"predictions must be free of NaN; got at least one"),
    ((L.softmax(-1), Y, 2), {}, r"predictions must be logits; got only rows that sum to 1"),
    ((L, Y, 2), {"inputs": "probabilities"}, r"predictions must be probabilities, .*; got sums"),
    ((L, Y, 2, "mse"), {}, r"targets must be \[N, D\] with N = 4, D = 2; got \[4\]"),
    ((L[0, 0], Y, 2, "mse"), {}, r"predictions must be \[P, N, D\]; got \[2\]"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "options", "text"), WRONG)
def test_errors(arguments, options, text):
    with pytest.raises(ValueError, match=rf"select_members: {text}"):
        select_members(*arguments, **options)


@pytest.mark.parametrize("objective", ["nll", "mse"])
def test_what_is_no_tensor_is_refused(objective):
    with pytest.raises(TypeError, match="select_members: predictions must be a Tensor"):
        select_members([[[0.0]]], Y, 1, objective)


@pytest.mark.gpu
@pytest.mark.parametrize("objective", CLASSES)
def test_on_a_gpu_the_same_members(objective):
    logits, y = pool()
    expected = select_members(logits, y, 5, objective)
    found = select_members(logits.cuda(), y.cuda(), 5, objective)
    assert found.picks == expected.picks
    assert found.predict(logits.cuda()).is_cuda
