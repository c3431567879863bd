"""Monte Carlo dropout against the moments that a linear layer gives it."""

import pytest
import torch
from torch import nn

from landscape_fast.landscape import mc_dropout
from landscape_fast.nn import ReLUDropout

P, S = 0.3, 4000


@pytest.mark.parametrize("rectified", [False, True])
def test_moments_are_those_of_dropped_activations(rectified):
    """Mean: that without dropout; variance: p / (1 - p) times the sum of squared products."""
    model = nn.Sequential(ReLUDropout(P) if rectified else nn.Dropout(P), nn.Linear(6, 2)).double()
    x = torch.randn(3, 6).double()
    found = mc_dropout(model, x, S)
    inputs = x.relu() if rectified else x
    truth = model[1](inputs)
    products = inputs[:, None] * model[1].weight
    spread = (P / (1 - P) * products.square().sum(-1)).sqrt()
    # four standard errors of a mean; those of a standard deviation are smaller, 1 / (2 S) ** 0.5
    assert bool(((found.mean(0) - truth).abs() < 4 * spread / S**0.5).all())
    assert bool(((found.std(0) / spread - 1).abs() < 4 / S**0.5).all())
    between = torch.corrcoef(found[:, :, 0].T).fill_diagonal_(0)
    assert float(between.abs().max()) < 4 / S**0.5  # rows have masks of their own


def network():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout2d(0.4), nn.Flatten(),
        nn.Linear(64, 3),
    )  # fmt: skip


def test_passes_are_told_by_seed_and_number_and_change_nothing_else():
    model, x = network().train(), torch.randn(9, 1, 6, 6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    many = mc_dropout(model, x, 4, seed=3)
    assert torch.equal(mc_dropout(model, x, 2, seed=3), many[:2])
    assert len(many.flatten(1).unique(dim=0)) == 4
    assert not torch.equal(mc_dropout(model, x, 2, seed=4), many[:2])
    assert torch.equal(torch.get_rng_state(), state) and model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name  # batch norms stay in evaluation mode
    assert mc_dropout(model, x, 2, batch_size=4).shape == (2, 9, 3)


def test_what_does_not_fit_is_refused():
    x = torch.randn(9, 6)
    rule = "mc_dropout: model must be a network with dropout modules of probability above 0; got"
    for model in (nn.Linear(6, 3), nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.0))):
        with pytest.raises(ValueError, match=rule):
            mc_dropout(model, x, 2)
    with pytest.raises(ValueError, match="count must be an integer of at least 1; got 0"):
        mc_dropout(network(), x, 0)
    with pytest.raises(ValueError, match=r"x must be \[N, ...\] with N at least 1; got \[0, 6\]"):
        mc_dropout(network(), x[:0], 1)
