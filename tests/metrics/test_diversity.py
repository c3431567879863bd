import math

import pytest
import torch

from landscape_fast.metrics.diversity import diagnose, off_diagonal_mean, pair_diversity


def labels_logits(labels, classes, scale=8.0):
    """[M, N] classes to logits [M, N, C] that predict them with confidence."""
    return scale * torch.nn.functional.one_hot(labels, classes).float()


def test_pairs_leave_the_diagonal_out():
    labels = torch.tensor([[0, 1, 2, 0], [0, 1, 2, 1], [1, 1, 0, 1]])
    pairs = pair_diversity(labels_logits(labels, 3))
    expected = torch.tensor([[0, 0.25, 0.75], [0.25, 0, 0.5], [0.75, 0.5, 0]])
    torch.testing.assert_close(pairs.disagreement, expected)
    assert float(pairs.mean_disagreement) == pytest.approx(0.5)
    assert float(pairs.mean_js) == pytest.approx(float(pairs.js.sum()) / 6)
    # where labels differ, confident predictions are almost log 2 apart
    torch.testing.assert_close(pairs.js, expected * math.log(2), rtol=0.02, atol=1e-6)
    assert math.isnan(off_diagonal_mean(torch.zeros(1, 1)))
    for shape in ((2, 1), (1, 3), (2, 3)):
        with pytest.raises(ValueError, match=r"^off_diagonal_mean: matrix must be \[M, M\]; got"):
            off_diagonal_mean(torch.zeros(shape))


def make_members(errors, classes=5, rows=1000):
    """Targets, and logits of one member per set of rows it gets wrong."""
    targets = torch.arange(rows) % classes
    labels = targets.repeat(len(errors), 1)
    for m, wrong in enumerate(errors):
        labels[m, list(wrong)] = (targets[list(wrong)] + 1) % classes
    return labels_logits(labels, classes), targets


def test_identical_members_are_called_so():
    found = diagnose(*make_members([range(100)] * 3))
    assert found.lines[0] == (
        "two members disagree on 0.00% of the rows, 0.00 times the mean error of a member (10.00%)"
    )
    assert "WARNING: the members are nearly identical" in found.lines[-1]
    assert found.nearly_identical and found.kl == found.js == 0 and "e" in found.lines[1]


def test_different_members_are_not_warned_about():
    found = diagnose(*make_members([range(0, 100), range(100, 200), range(200, 300)]))
    assert not any("WARNING" in line for line in found.lines) and not found.nearly_identical
    assert "disagree on 20.00% of the rows, 2.00 times" in found.lines[0]
    assert "accuracy 100.00% (+10.00%)" in found.lines[2]
    assert str(found) == "\n".join(found.lines)


def test_the_diagnosis_is_in_the_numbers_too():
    """Against the definitions, in float64; the share is what decides about the warning."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(3, 50, 4, generator=generator, dtype=torch.float64)
    targets = torch.arange(50) % 4
    found = diagnose(logits, targets)
    p = logits.softmax(-1)
    labels, mean = p.argmax(-1), p.mean(0)
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]

    def over_pairs(value):
        return float(torch.stack([value(i, j).double().mean() for i, j in pairs]).mean())

    def kl(a, b):
        return (a * (a.log() - b.log())).sum(-1)

    middle = [[(p[i] + p[j]) / 2 for j in range(3)] for i in range(3)]
    expected = {
        "members": 3,
        "rows": 50,
        "accuracy": float((mean.argmax(-1) == targets).double().mean()),
        "member_accuracy": float((labels == targets).double().mean()),
        "nll": float(-mean[torch.arange(50), targets].log().mean()),
        "member_nll": float(-p[:, torch.arange(50), targets].log().mean()),
        "disagreement": over_pairs(lambda i, j: labels[i] != labels[j]),
        "js": over_pairs(lambda i, j: (kl(p[i], middle[i][j]) + kl(p[j], middle[i][j])) / 2),
        "kl": over_pairs(lambda i, j: kl(p[i], p[j])),
        "mutual_information": float(kl(p, mean).mean()),
    }
    expected["disagreement_per_error"] = expected["disagreement"] / (
        1 - expected["member_accuracy"]
    )
    assert found.numbers() == pytest.approx(expected | {"nearly_identical": False})


def test_an_ensemble_that_gains_nothing_is_warned_about():
    # two of three members share their errors and outvote the third
    found = diagnose(*make_members([range(100), range(100), range(50, 150)]))
    assert "WARNING: on these rows the mean prediction is no more accurate" in found.lines[-1]


def test_members_without_any_error():
    assert "nearly identical" in diagnose(*make_members([[], []])).lines[-1]


def test_one_member_has_no_diversity():
    with pytest.raises(ValueError, match=r"diagnose: logits must be \[M, N, C\] with M at least 2"):
        diagnose(torch.zeros(1, 4, 3), torch.zeros(4, dtype=torch.int64))


def test_without_rows_there_is_nothing_to_say():
    with pytest.raises(ValueError, match=r"and N at least 1; got \[2, 0, 3\]"):
        diagnose(torch.zeros(2, 0, 3), torch.zeros(0, dtype=torch.int64))
