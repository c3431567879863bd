import pytest
import torch

from landscape_fast.metrics import aupr, auroc, fpr_at_recall, ood_detection, ood_scores
from landscape_fast.ops import ensemble_summary

FIGURES = [auroc, aupr, fpr_at_recall]


def rows(count, seed, steps=None, dtype=torch.float64):
    """Scores, high for positives on average; with `steps`, rounded to that many values per unit."""
    generator = torch.Generator().manual_seed(seed)
    positive = torch.rand(count, generator=generator) < 0.4
    scores = torch.randn(count, generator=generator, dtype=torch.float64) + positive
    scores = scores if steps is None else (scores * steps).round() / steps
    return scores.to(dtype), positive


def first_enough(metrics, scores, positive, recall):
    fpr, tpr, _ = metrics.roc_curve(positive, scores, drop_intermediate=False)
    return fpr[tpr >= recall][0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [None, 4, 0.5], ids=["few ties", "ties", "three values"])
@pytest.mark.parametrize("count", [2, 17, 1000])
def test_they_are_those_of_scikit_learn(count, steps, dtype):
    metrics = pytest.importorskip("sklearn.metrics")
    scores, positive = rows(count, count, steps, dtype)
    positive[0], positive[1] = True, False
    s, y = scores.double().numpy(), positive.numpy()
    assert float(auroc(scores, positive)) == pytest.approx(metrics.roc_auc_score(y, s))
    assert float(aupr(scores, positive)) == pytest.approx(metrics.average_precision_score(y, s))
    for recall in (0.05, 0.5, 0.95, 1.0):
        found = fpr_at_recall(scores, positive, recall)
        assert float(found) == pytest.approx(first_enough(metrics, s, y, recall))


def test_they_are_those_of_torchmetrics():
    oracle = pytest.importorskip("torchmetrics.classification")
    scores, positive = rows(500, 5, 8)
    scores = scores.sigmoid()
    y = positive.long()
    torch.testing.assert_close(
        auroc(scores, positive), oracle.BinaryAUROC()(scores, y), check_dtype=False
    )
    torch.testing.assert_close(
        aupr(scores, positive), oracle.BinaryAveragePrecision()(scores, y), check_dtype=False
    )


def test_pairs_are_counted_exactly():
    scores, positive = rows(97, 3, 2)
    over, under = scores[positive][:, None], scores[~positive]
    twice = 2 * int((over > under).sum()) + int((over == under).sum())
    pairs = int(positive.sum()) * int((~positive).sum())
    assert float(auroc(scores, positive)) == twice / 2 / pairs  # one rounding on both sides
    assert float(auroc(-scores, ~positive)) == float(auroc(scores, positive))


@pytest.mark.parametrize("figure", FIGURES)
def test_the_order_of_the_rows_never_matters(figure):
    scores, positive = rows(200, 1, 2)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        figure(scores[order], positive[order]), figure(scores, positive), rtol=1e-15, atol=0
    )


def test_thresholds_are_whole_ties():
    """19 of 20 positives are exactly 95 %; the 20th stands among all negatives."""
    scores = torch.cat([torch.ones(19), torch.zeros(1), torch.zeros(7)])
    positive = torch.arange(27) < 20
    assert fpr_at_recall(scores, positive) == 0
    assert fpr_at_recall(scores, positive, 0.951) == 1


def test_constants_infinities_and_missing_classes():
    yes, no = torch.tensor([True] * 3), torch.tensor([False] * 5)
    both, same = torch.cat([yes, no]), torch.full((8,), 0.3)
    assert auroc(same, both) == 0.5 and fpr_at_recall(same, both) == 1
    assert float(aupr(same, both)) == 3 / 8
    ends = torch.where(both, float("inf"), -float("inf"))
    assert [float(f(ends, both)) for f in FIGURES] == [1, 1, 0]
    assert [float(f(-ends, both)) for f in FIGURES] == [0, 3 / 8, 1]
    signed = torch.tensor([0.0, -0.0])  # equal
    assert auroc(signed, torch.tensor([True, False])) == 0.5
    assert aupr(torch.ones(3), yes) == 1
    for found in (auroc(torch.ones(3), yes), fpr_at_recall(torch.ones(3), yes)):
        assert found.isnan()
    assert all(f(torch.ones(5), no).isnan() for f in FIGURES)
    same[4] = float("nan")
    assert all(f(same, both).isnan() for f in FIGURES)


def test_detection_names_both_sides():
    metrics = pytest.importorskip("sklearn.metrics")
    scores, out = rows(400, 7, 4, torch.float32)
    found = ood_detection(scores[~out], scores[out])
    s, y = scores.numpy(), out.numpy()
    expected = {
        "auroc": metrics.roc_auc_score(y, s),
        "aupr_in": metrics.average_precision_score(~y, -s),
        "aupr_out": metrics.average_precision_score(y, s),
        "fpr95": first_enough(metrics, -s, ~y, 0.95),
        "fpr95_out": first_enough(metrics, s, y, 0.95),
    }
    assert {name: float(v) for name, v in found._asdict().items()} == pytest.approx(expected)
    assert all(v.dtype == torch.float64 and v.ndim == 0 for v in found)


def logits(dtype=torch.float64):
    return 2 * torch.randn(3, 40, 5, generator=torch.Generator().manual_seed(2), dtype=dtype)


def test_scores_are_their_definitions():
    stats = pytest.importorskip("scipy.stats")
    x = logits()
    p = x.softmax(-1)
    mixed = p.mean(0)
    entropy = torch.from_numpy(stats.entropy(mixed.numpy(), axis=-1))
    own = torch.from_numpy(stats.entropy(p.numpy(), axis=-1)).mean(0)
    torch.testing.assert_close(ood_scores(x), entropy)
    torch.testing.assert_close(ood_scores(x, "mutual_information"), entropy - own)
    torch.testing.assert_close(ood_scores(x, "max_probability"), 1 - mixed.max(-1).values)
    torch.testing.assert_close(ood_scores(x, "energy"), -x.exp().sum(-1).log().mean(0))
    summary = ensemble_summary(x, torch.zeros(40, dtype=torch.int64))
    torch.testing.assert_close(ood_scores(x).mean(), summary.entropy)
    torch.testing.assert_close(
        ood_scores(x, "mutual_information").mean(), summary.mutual_information
    )


@pytest.mark.parametrize("kind", ["entropy", "max_probability", "mutual_information", "energy"])
def test_scores_widen_and_keep_rows_apart(kind):
    x = logits(torch.float32)
    assert torch.equal(ood_scores(x, kind), ood_scores(x.double(), kind))
    assert torch.equal(ood_scores(x[:, 7:8], kind)[0], ood_scores(x, kind)[7])
    x[1, 5, 2] = float("nan")
    assert ood_scores(x, kind).isnan().tolist() == [n == 5 for n in range(40)]
    assert ood_scores(x[:, :0], kind).shape == (0,)
    y = logits()[:, :4].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ood_scores(x, kind), y)


def test_sure_predictions_keep_their_order():
    x = torch.tensor([[[30.0, 0.0], [60.0, 0.0], [90.0, 0.0]]])
    found = ood_scores(x, "max_probability")
    torch.testing.assert_close(found, torch.tensor([-30.0, -60.0, -90.0]).double().exp())


def test_one_class_and_one_member():
    x = torch.randn(4, 3, 1, generator=torch.Generator().manual_seed(0))
    for kind in ("entropy", "max_probability", "mutual_information"):
        assert ood_scores(x, kind).tolist() == [0, 0, 0]
    x[:, 1] = float("nan")
    assert ood_scores(x, "max_probability").isnan().tolist() == [False, True, False]
    assert ood_scores(logits()[:1], "mutual_information").tolist() == [0] * 40
    same = logits()[:1].expand(3, -1, -1)
    assert (ood_scores(same, "mutual_information") >= 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: auroc(torch.ones(0), torch.ones(0).bool()), r"auroc: scores must be \[N\] with"),
        (lambda: aupr(torch.ones(2, 1), torch.ones(2)), r"aupr: scores must be \[N\]; got \[2, 1"),
        (lambda: auroc(torch.ones(2), torch.ones(2)), "auroc: positive must be one of bool; got"),
        (lambda: auroc(torch.ones(2), torch.ones(3).bool()), r"auroc: positive must be \[N\] with"),
        (
            lambda: fpr_at_recall(torch.ones(2), torch.ones(2).bool(), 95),
            r"fpr_at_recall: recall must be a fraction in \(0, 1\]; got 95",
        ),
        (
            lambda: ood_detection(torch.ones(2), torch.ones(0)),
            r"ood_detection: out_scores must be \[N\] with N at least 1; got \[0\]",
        ),
        (
            lambda: ood_detection(torch.ones(2), torch.ones(2).double()),
            "ood_detection: out_scores must be of the dtype of in_scores",
        ),
        (lambda: ood_scores(torch.ones(2, 3)), r"ood_scores: logits must be \[M, N, C\]"),
        (lambda: ood_scores(torch.ones(0, 3, 2)), r"ood_scores: logits must be \[M, N, C\] with M"),
        (lambda: ood_scores(torch.ones(1, 1, 1), "odin"), "ood_scores: kind must be one of"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
