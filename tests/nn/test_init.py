"""Values and reproducibility of the initialisers."""

import math
from functools import partial

import pytest
import torch
from scipy import stats
from torch import nn

from landscape_fast.compat.torch_uncertainty import BatchLinear
from landscape_fast.models import TabM
from landscape_fast.models.tabm import ARCHS
from landscape_fast.nn import (
    BatchEnsembleConv2d,
    BatchEnsembleLinear,
    HyperBatchLinear,
    HyperEmbedding,
    MemberLinear,
    Normal,
    Ones,
    RandomSign,
    first_only_,
    init,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 1.0])
def test_random_sign_has_probability_p(p):
    """A binomial test that fails once in a million on a right sampler, with this seed never."""
    signs = RandomSign(p)(torch.empty(40, 500), seeded())
    assert set(signs.unique().tolist()) <= {-1.0, 1.0}
    plus = int((signs > 0).sum())
    assert stats.binomtest(plus, signs.numel(), p).pvalue > 1e-6


def test_normal_has_the_mean_and_deviation_asked_for():
    """Kolmogorov-Smirnov against the exact distribution, same level as above."""
    drawn = Normal(-1.5, 0.25)(torch.empty(40, 500, dtype=torch.float64), seeded())
    assert stats.kstest(drawn.flatten().numpy(), "norm", (-1.5, 0.25)).pvalue > 1e-6


@pytest.mark.parametrize("kind", [RandomSign, Normal])
def test_chunks_share_one_value_per_member(kind):
    drawn = kind(chunks=[1, 30, 9])(torch.empty(50, 40), seeded())
    parts = drawn.split([1, 30, 9], dim=1)
    for part in parts:
        assert torch.equal(part, part[:, :1].expand_as(part))
    values = torch.cat([part[:, :1] for part in parts], 1)
    assert len(values[:, 1].unique()) > 1 and not torch.equal(values[:, 1], values[:, 2])


def test_names_and_callables():
    def twos(tensor, generator=None):
        return tensor.fill_(2)

    layer = BatchEnsembleLinear(3, 5, 2, r_init="normal", s_init=twos)
    assert layer.r_init == Normal(1.0, 0.5) and (layer.s == 2).all()
    assert init.resolve("op", "r_init", "random_sign") == RandomSign(0.5)
    assert init.resolve("op", "r_init", "ones") == Ones()


def test_reset_factors_leaves_the_rest():
    layer = BatchEnsembleLinear(3, 5, 2, r_init="normal", generator=seeded(0))
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    layer.reset_factors(seeded(1))
    changed = [key for key, value in layer.state_dict().items() if not value.equal(before[key])]
    assert changed == ["r"]
    layer.reset_parameters(seeded(0))
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_a_generator_of_another_device_gives_the_same_numbers(device):
    """A seed means the same on every device; a stand-in for the generator's device is drawn."""
    for make in (
        partial(BatchEnsembleLinear, 3, 5, 2, r_init="normal"),
        partial(MemberLinear, 3, 5, 2),
        partial(HyperEmbedding, [6], [0.1], [1.0], trunk=(4,)),
        *(partial(TabM, n_num_features=3, d_out=1, d_block=4, k=2, arch_type=a) for a in ARCHS),
    ):
        here, there = make(generator=seeded()), make(generator=seeded(), device=device)
        for a, b in zip(here.parameters(), there.parameters(), strict=True):
            assert torch.equal(a, b.cpu())
    layers = [BatchLinear(3, 5, 2, device=where) for where in ("cpu", device)]
    for layer in layers:
        layer.reset_parameters(seeded())
    for name in ("r_group", "s_group", "bias"):
        a, b = (getattr(layer, name) for layer in layers)
        assert torch.equal(a, b.cpu())


def test_first_only_is_the_start_of_tabm():
    """Only the r of the first layer is random, and constant within each feature's chunk."""
    model = nn.Sequential(
        BatchEnsembleLinear(5, 8, 4, r=False, s_init="normal"),
        BatchEnsembleLinear(8, 8, 4, r_init="normal", s_init="normal"),
        nn.ReLU(),
        BatchEnsembleLinear(8, 3, 4, r_init="normal", s=False),
    )
    weights = [model[i].weight.clone() for i in (0, 1, 3)]
    assert first_only_(model, RandomSign(chunks=(3, 5)), seeded()) is model
    first = model[1].r
    assert first.abs().eq(1).all() and not first.eq(1).all()
    assert first[:, :3].var(1).eq(0).all() and first[:, 3:].var(1).eq(0).all()
    for factor in (model[0].s, model[1].s, model[3].r):
        assert torch.equal(factor, torch.ones_like(factor))
    for i, weight in zip((0, 1, 3), weights, strict=True):
        assert torch.equal(model[i].weight, weight)


def test_first_only_reaches_all_factors_of_hyper_batch_layers():
    options = {"r_init": "normal", "s_init": "normal", "tie_factors": False}
    layers = [HyperBatchLinear(4, 4, 3, **options) for _ in "ab"]
    first_only_(nn.Sequential(*layers))
    for layer in layers:
        for name in ("s", "u", "v") if layer is layers[0] else ("r", "s", "u", "v"):
            assert (getattr(layer, name) == 1).all()
    assert layers[0].r.abs().eq(1).all()


def test_xavier_bounds_biases_like_columns():
    """The bias bound of Fort et al.'s code is that of a matrix with fan_in 1 and fan_out O."""
    for layer in (nn.Conv2d(4, 6, 3), BatchEnsembleConv2d(4, 6, 3, members=5)):
        init.xavier_(layer.weight, layer.bias, seeded(5))
        generator = seeded(5)
        want = nn.init.xavier_uniform_(torch.empty(6, 4, 3, 3), generator=generator)
        assert torch.equal(layer.weight, want)
        bias = nn.init.xavier_uniform_(torch.empty(6, 1), generator=generator)[:, 0]
        assert torch.equal(layer.bias, bias.expand_as(layer.bias))
        assert bias.abs().max() <= math.sqrt(6 / 7)


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: RandomSign(1.5), r"RandomSign: p must be a probability in \[0, 1\]; got 1.5"),
        (lambda: Normal(std=-1), "Normal: std must be at least 0; got -1"),
        (lambda: Normal(std=math.nan), "Normal: std must be at least 0; got nan"),
        (lambda: Normal(chunks=()), r"Normal: chunks must be positive sizes.*got \(\)"),
        (lambda: RandomSign(chunks=[2, 0]), r"RandomSign: chunks must be positive sizes.*\(2, 0\)"),
        (
            lambda: BatchEnsembleLinear(4, 2, 3, r_init=Normal(chunks=[2, 1])),
            r"Normal: chunks must sum to the 4 features of the factor; got \(2, 1\).*sum to 3",
        ),
        (
            lambda: BatchEnsembleLinear(4, 2, 3, r_init="signs"),
            "BatchEnsembleLinear: r_init must be one of 'ones', 'random_sign', 'normal' or a call",
        ),
        (
            lambda: BatchEnsembleConv2d(4, 2, 3, 3, s_init=Normal),
            "BatchEnsembleConv2d: s_init must be one of .*got <class",
        ),
        (
            lambda: first_only_(nn.Sequential(BatchEnsembleLinear(4, 2, 3, r=False))),
            "first_only_: model must hold an ensemble layer with a factor r; got 1 ensemble layers",
        ),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call()
