import math

import pytest
import torch

from landscape_fast.metrics import ambiguity, brier, ensemble_nll, gibbs_nll, member_nll

ALL = [member_nll, gibbs_nll, ensemble_nll, brier, ambiguity]


def problem():
    generator = torch.Generator().manual_seed(4)
    logits = 2 * torch.randn(4, 60, 5, generator=generator, dtype=torch.float64)
    return logits, torch.randint(5, (60,), generator=generator)


def test_they_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    logits, y = problem()
    p, classes = logits.softmax(-1), list(range(5))
    each = [metrics.log_loss(y, one, labels=classes) for one in p.numpy()]
    assert member_nll(logits, y).tolist() == pytest.approx(each)
    assert float(gibbs_nll(logits, y)) == pytest.approx(sum(each) / 4)
    mixed = p.mean(0).numpy()
    assert float(ensemble_nll(logits, y)) == pytest.approx(
        metrics.log_loss(y, mixed, labels=classes)
    )
    truth = torch.nn.functional.one_hot(y, 5).numpy()
    expected = 5 * metrics.mean_squared_error(truth, mixed)
    assert float(brier(logits, y)) == pytest.approx(expected)


def test_the_gap_is_its_definition():
    logits, y = problem()
    p = logits.softmax(-1)
    mixed, rows = p.mean(0), torch.arange(60)
    jensen = mixed[rows, y].log() - p[:, rows, y].log().mean(0)
    torch.testing.assert_close(ambiguity(logits, y), jensen.mean())
    torch.testing.assert_close(ambiguity(logits, y), gibbs_nll(logits, y) - ensemble_nll(logits, y))
    spread = (p - mixed).square().sum(-1).mean()
    torch.testing.assert_close(ambiguity(logits, y, "brier"), spread)
    torch.testing.assert_close(ambiguity(logits, (y + 1) % 5, "brier"), spread)  # no targets in it
    alike = logits[:1].expand(4, -1, -1)
    none = torch.zeros((), dtype=torch.float64)
    for score in ("nll", "brier"):
        torch.testing.assert_close(ambiguity(alike, y, score), none)


def test_examples_can_be_left_out():
    logits, y = problem()
    y[10:] = -100
    for function in ALL:
        torch.testing.assert_close(function(logits, y), function(logits[:, :10], y[:10]))
        assert function(logits[:, :0], y[:0]).isnan().all()


def test_a_class_that_is_ruled_out():
    logits = torch.tensor([[[0.0, -math.inf]], [[0.0, 0.0]]])
    y = torch.tensor([1])
    assert member_nll(logits, y).tolist() == [math.inf, pytest.approx(math.log(2))]
    assert gibbs_nll(logits, y) == math.inf and ambiguity(logits, y) == math.inf
    assert float(ensemble_nll(logits, y)) == pytest.approx(math.log(4))


@pytest.mark.parametrize("function", ALL)
def test_gradients(function):
    logits, y = problem()
    assert torch.autograd.gradcheck(lambda x: function(x, y[:6]), logits[:, :6].requires_grad_())


def test_what_does_not_fit_is_refused():
    logits, y = problem()
    with pytest.raises(ValueError, match="^ambiguity: score must be 'nll' or 'brier'; got 'ece'"):
        ambiguity(logits, y, "ece")
    with pytest.raises(ValueError, match=r"^ensemble_summary: logits must be \[M, N, C\]"):
        brier(logits[0], y)
