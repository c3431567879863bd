"""Scores under shift and on unknown data against numpy and scikit-learn."""

import numpy as np
import pytest
import torch

from landscape_fast.landscape import out_of_distribution, under_shift
from landscape_fast.ops import ensemble_summary

N, C = 41, 3


def problem():
    """Images, classes, and five linear members, the first two alike."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(N, 6, generator=generator).double()
    members = torch.randn(5, 6, C, generator=generator).double()
    members[1] = members[0] + 0.01 * members[1]
    y = (x @ members[0]).argmax(1)
    noise = torch.randn(N, 6, generator=generator).double()
    shifts = {
        ("blur", 2): 0.3 * x,
        ("none", 0): x,
        ("noise", 1): x + 0.5 * noise,
        ("noise", 2): x + 2 * noise,
        ("blur", 1): 0.8 * x,
    }
    return x, y, members, shifts


def probabilities(x, members):
    """[M, N, C], as one writes it."""
    z = np.einsum("ni,mic->mnc", x.numpy(), members.numpy())
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def entropy(p):
    return -(p * np.log(p)).sum(-1)


def brute_force(x, y, members):
    """Every score, from the definitions."""
    p = probabilities(x, members)
    mean, M = p.mean(0), len(p)
    rows, y = np.arange(N), y.numpy()
    confidence, right, ece = mean.max(1), mean.argmax(1) == y, 0.0
    for low in np.arange(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        ece += abs((right[inside] - confidence[inside]).sum()) / N
    pairs = [(i, j) for i in range(M) for j in range(M) if i != j]
    js = [(entropy((p[i] + p[j]) / 2) - (entropy(p[i]) + entropy(p[j])) / 2) for i, j in pairs]
    labels = p.argmax(-1)
    return {
        "accuracy": right.mean(),
        "nll": -np.log(mean[rows, y]).mean(),
        "brier": ((mean - np.eye(C)[y]) ** 2).sum(1).mean(),
        "ece": ece,
        "entropy": entropy(mean).mean(),
        "js": (entropy(mean) - entropy(p).mean(0)).mean(),
        "pairwise_js": np.mean(js),
        "disagreement": np.mean([labels[i] != labels[j] for i, j in pairs]),
    }


GROUPS = {"near": [0, 1], "far": [0, 2], "others": [4, 3]}


@pytest.mark.parametrize("batch_size", [None, 7])
def test_equals_the_definitions(batch_size):
    x, y, members, shifts = problem()
    found = under_shift(lambda x: x @ members, shifts, y, GROUPS, batch_size=batch_size)
    assert found.shifts == tuple(shifts) and found.members == 2
    assert found.severity.tolist() == [0, 1, 2]
    for method, places in GROUPS.items():
        truth = [brute_force(images, y, members[places]) for images in shifts.values()]
        for score, each in found.each[method]._asdict().items():
            values = np.array([t[score] for t in truth])
            assert each.tolist() == pytest.approx(values, rel=1e-9, abs=1e-12), score
            # blur and noise of severity 1 are shifts 2 and 4, of severity 2 shifts 0 and 3
            means = [values[1], values[[2, 4]].mean(), values[[0, 3]].mean()]
            curve = getattr(found.curves[method], score)
            assert curve.tolist() == pytest.approx(means, rel=1e-9, abs=1e-12), score
    assert bool((found.curves["near"].js < found.curves["far"].js).all())


def test_float32_is_scored_by_the_kernels():
    x, y, members, shifts = problem()
    members = members.float()
    found = under_shift(lambda x: x.float() @ members, {("none", 0): x}, y, {"all": range(5)})
    truth = ensemble_summary(x.float() @ members, y)
    for score, other in (("accuracy",) * 2, ("nll",) * 2, ("js", "mutual_information")):
        value = float(getattr(found.each["all"], score))
        assert value == pytest.approx(float(getattr(truth, other)), rel=1e-6)


def test_methods_may_have_predictors_of_their_own():
    x, y, members, shifts = problem()
    own = {name: lambda x, places=places: x @ members[places] for name, places in GROUPS.items()}
    one = under_shift(lambda x: x @ members, shifts, y, GROUPS)
    found = under_shift(own, shifts, y)
    for name in GROUPS:
        torch.testing.assert_close(torch.stack(found.each[name]), torch.stack(one.each[name]))


def test_unequal_members_are_an_error_that_names_the_way_out():
    """The divergence of M members grows with M: independent members, more of them, more of it."""
    x, y, members, shifts = problem()
    groups = {"two": [2, 3], "four": [2, 3, 4, 0]}
    rule = (
        r"under_shift: groups must be of equal size, since JS grows with the members; "
        r"got members {'two': 2, 'four': 4}; equal_members=2 takes the first ones of each"
    )
    with pytest.raises(ValueError, match=rule):
        under_shift(lambda x: x @ members, shifts, y, groups)
    found = under_shift(lambda x: x @ members, shifts, y, groups, equal_members=2)
    assert found.members == 2
    torch.testing.assert_close(torch.stack(found.each["two"]), torch.stack(found.each["four"]))
    four = under_shift(lambda x: x @ members, shifts, y, {"four": groups["four"]})
    assert bool((four.curves["four"].js > found.curves["four"].js).all())
    for wrong in (0, 3, True):
        with pytest.raises(ValueError, match="equal_members must be None or an integer from 1"):
            under_shift(lambda x: x @ members, shifts, y, groups, equal_members=wrong)


def test_images_are_made_when_it_is_their_turn():
    x, y, members, shifts = problem()
    order = []

    def maker(key, images):
        return lambda: order.append(("made", key)) or images

    def predict(images):
        order.append("predicted")
        return images @ members

    lazy = {key: maker(key, images) for key, images in shifts.items()}
    found = under_shift(predict, lazy, y, GROUPS)
    expected = [step for key in shifts for step in (("made", key), "predicted")]
    assert order == expected
    now = under_shift(lambda x: x @ members, shifts, y, GROUPS)
    assert torch.equal(torch.stack(found.each["far"]), torch.stack(now.each["far"]))


def test_one_member_differs_from_nobody():
    x, y, members, shifts = problem()
    found = under_shift(lambda x: x @ members, shifts, y, {"single": [0]}).curves["single"]
    assert found.pairwise_js.isnan().all() and found.disagreement.isnan().all()
    torch.testing.assert_close(found.js, torch.zeros(3).double())
    assert float(found.accuracy[0]) == 1


@pytest.mark.parametrize("batch_size", [None, 7])
def test_unknown_inputs_equal_the_definitions(batch_size):
    metrics = pytest.importorskip("sklearn.metrics")
    x, y, members, shifts = problem()
    unknown = {"small": 0.1 * x, "noise": lambda: shifts["noise", 2]}
    groups = {"near": [0, 1], "far": [3, 2, 4]}
    report = out_of_distribution(
        lambda x: x @ members, x, unknown, groups, equal_members=2, batch_size=batch_size
    )
    assert report.members == 2 and list(report.unknown["far"]) == ["small", "noise"]
    sets = {"small": 0.1 * x, "noise": shifts["noise", 2]}
    for method, places in groups.items():
        known = probabilities(x, members[places[:2]])
        assert report.known[method].detection == {}
        for name, images in sets.items():
            p = probabilities(images, members[places[:2]])
            truth, found = brute_force(images, y, members[places[:2]]), report.unknown[method][name]
            for score in ("entropy", "js", "pairwise_js", "disagreement"):
                assert float(getattr(found, score)) == pytest.approx(truth[score], rel=1e-9)
            assert float(found.confidence) == pytest.approx(p.mean(0).max(-1).mean())
            out = np.repeat([0, 1], N)
            for kind, score in (
                ("entropy", lambda p: entropy(p.mean(0))),
                ("max_probability", lambda p: -p.mean(0).max(-1)),
                ("mutual_information", lambda p: entropy(p.mean(0)) - entropy(p).mean(0)),
            ):
                expected = metrics.roc_auc_score(out, np.concatenate([score(known), score(p)]))
                assert float(found.detection[kind].auroc) == pytest.approx(expected, abs=1e-12)


def test_only_the_scores_asked_for():
    x, _, members, _ = problem()
    report = out_of_distribution(
        lambda x: x @ members, x, {"small": 0.1 * x}, {"all": range(5)}, scores=("energy",)
    )
    assert list(report.unknown["all"]["small"].detection) == ["energy"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shifts": {}}, "shifts must be a mapping with at least one shift; got none"),
        ({"shifts": {"noise": 0}}, r"shifts must be by \(name, severity\), severity of at least 0"),
        ({"shifts": {("noise", -1): 0}}, r"shifts must be by \(name, severity\), severity of at"),
        ({"groups": None}, "groups must be method to places of members; got None"),
        ({"groups": {}}, "groups must be at least one method; got none"),
        ({"groups": {"a": [5]}}, r"groups\['a'\] must be places from 0 to 4, at least one; got"),
        ({"groups": {"a": []}}, r"groups\['a'\] must be places from 0 to 4, at least one; got"),
        ({"predict": {}}, "groups must be None where predict has the methods; got groups"),
        ({"predict": lambda x: x}, r"predictions must be logits \[M, N, C\] with N = 41, one row"),
        ({"predict": lambda x: x[None, 1:]}, r"predictions must be logits \[M, N, C\] with N = 41"),
        ({"targets": torch.zeros(3).long()}, r"shifts\[.*\] must be of N = 3 images, as targets"),
        ({"batch_size": 0}, "batch_size must be None or an integer of at least 1; got 0"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    x, y, members, shifts = problem()
    given = {"predict": lambda x: x @ members, "shifts": shifts, "targets": y, "groups": GROUPS}
    with pytest.raises(ValueError, match=f"^under_shift: {message}"):
        under_shift(**(given | change))


def test_predictions_must_be_tensors():
    x, y, _, shifts = problem()
    with pytest.raises(TypeError, match=r"under_shift: predictions must be logits .* got list"):
        under_shift(lambda x: [1.0], shifts, y, GROUPS)
    with pytest.raises(ValueError, match="unknown must be a mapping with at least one set"):
        out_of_distribution(lambda x: x, x, {}, GROUPS)
