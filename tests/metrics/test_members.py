import numpy as np
import pytest
import torch

from landscape_fast.metrics import (
    average_pairwise_diversity,
    prediction_cosines,
    variation_ratio,
    weight_cosines,
)
from landscape_fast.metrics import members as page
from landscape_fast.testing import assert_as_exact


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def true_cosines(rows):
    rows = rows.double()
    return torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights(dtype):
    weights = normal(5, 1001, dtype=dtype) + 0.5
    found = weight_cosines(weights)
    torch.testing.assert_close(found, true_cosines(weights))
    assert torch.equal(found, found.T) and (found.diagonal() == 1).all()
    pairs = pytest.importorskip("sklearn.metrics.pairwise")
    expected = torch.from_numpy(pairs.cosine_similarity(weights.double().numpy()))
    torch.testing.assert_close(found, expected)


def test_weights_that_are_close_keep_their_digits():
    """1 - cos of 3e-7 would be lost in float32."""
    weights = normal(1, 4000) + 1e-3 * normal(2, 4000, seed=1) * torch.tensor([[0.0], [1.0]])
    gap, truth = 1 - weight_cosines(weights)[0, 1], weights.double()
    sine = truth[1] - truth[0] * (truth[0] @ truth[1]) / (truth[0] @ truth[0])
    expected = 0.5 * sine.square().sum() / truth[1].square().sum()
    torch.testing.assert_close(gap, expected, rtol=1e-5, atol=0)  # the next term is 1e-7 of it


def test_weights_part_by_part():
    weights = normal(3, 12)
    parts = weight_cosines(weights, sizes=(5, 7))
    torch.testing.assert_close(parts[0], true_cosines(weights[:, :5]))
    torch.testing.assert_close(parts[1], true_cosines(weights[:, 5:]))
    listed = weight_cosines([weights[:, :5].contiguous(), weights[:, 5:].contiguous()])
    torch.testing.assert_close(listed, parts)


def test_a_model_of_zeros_has_no_direction():
    weights = normal(3, 8)
    weights[1] = 0
    found = weight_cosines(weights)
    assert found[1].isnan().all() and found[:, 1].isnan().all()
    assert not found[::2, ::2].isnan().any()


def test_gradients():
    assert torch.autograd.gradcheck(weight_cosines, normal(3, 6).double().requires_grad_())
    x = normal(3, 4, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(prediction_cosines, x)


@pytest.mark.parametrize("entries", [2**22, 70, 1])  # all at once, two examples, one example
def test_predictions(monkeypatch, entries):
    monkeypatch.setattr(page, "ENTRIES", entries)
    logits = 3 * normal(5, 33, 7)
    truth = logits.double().softmax(-1).flatten(1)
    plain = logits.softmax(-1).flatten(1).double()
    found = prediction_cosines(logits)
    assert_as_exact("cosines", found, true_cosines(plain), true_cosines(truth))
    assert torch.equal(found, found.T) and (found.diagonal() == 1).all()


def test_predictions_with_nan_and_in_low_dtypes():
    logits = normal(3, 6, 4)
    low = logits.bfloat16()
    assert torch.equal(prediction_cosines(low), prediction_cosines(low.float()))
    strided = logits.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # models innermost
    assert torch.equal(prediction_cosines(strided), prediction_cosines(logits))
    logits[1, 2, 3] = float("nan")
    found = prediction_cosines(logits).isnan()
    assert found.tolist() == [[i == 1 or j == 1 for j in range(3)] for i in range(3)]


def test_votes_are_counted_over_members():
    """Axis 0: members that agree on each of the examples, which differ, have a ratio of 0."""
    agree = torch.arange(6).expand(3, 6)
    assert variation_ratio(agree).tolist() == [0.0] * 6
    assert variation_ratio(agree.T.contiguous()).tolist() == pytest.approx([5 / 6] * 3)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.int8])
def test_votes_are_those_of_a_loop(dtype):
    labels = torch.randint(4, (7, 50), generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = [1 - np.bincount(votes).max() / 7 for votes in labels.T.numpy()]
    assert variation_ratio(labels).tolist() == pytest.approx(expected)
    assert variation_ratio(labels[:1]).tolist() == [0.0] * 50
    assert variation_ratio(labels[:, :0]).shape == (0,)


def test_votes_of_two_classes():
    labels = torch.tensor([[True, False], [True, True], [True, False], [True, True]])
    assert variation_ratio(labels).tolist() == [0, 0.5]


def test_pairs():
    distance = pytest.importorskip("scipy.spatial.distance")
    special = pytest.importorskip("scipy.special")
    logits = 2 * normal(4, 30, 5, dtype=torch.float64)
    p, labels = logits.softmax(-1).numpy(), logits.argmax(-1).numpy()
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]

    def over(value):
        return np.mean([value(i, j) for i, j in pairs])

    expected = {
        "disagreement": over(lambda i, j: (labels[i] != labels[j]).mean()),
        "js": over(lambda i, j: (distance.jensenshannon(p[i], p[j], axis=1) ** 2).mean()),
        "kl": over(lambda i, j: special.rel_entr(p[i], p[j]).sum(1).mean()),
    }
    for kind, value in expected.items():
        assert float(average_pairwise_diversity(logits, kind)) == pytest.approx(value)
    assert average_pairwise_diversity(logits[:1]).isnan()
    assert average_pairwise_diversity(logits[:, :0]).isnan()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: prediction_cosines(torch.zeros(2, 0, 3)),
            r"prediction_cosines: logits must be \[S, N, C\] with N and C at least 1; got",
        ),
        (
            lambda: variation_ratio(torch.zeros(0, 3).long()),
            r"variation_ratio: labels must be \[M, N\] with M at least 1; got \[0, 3\]",
        ),
        (
            lambda: variation_ratio(torch.zeros(2, 3)),
            r"variation_ratio: labels must be one of int64, .*; got torch.float32",
        ),
        (
            lambda: average_pairwise_diversity(torch.zeros(2, 3, 4), "cosine"),
            "pairwise_divergence: kind must be 'js', 'kl' or 'disagreement'",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
