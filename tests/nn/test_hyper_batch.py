"""Hyper-batch layers and networks against plain layers with the weights that examples see."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from landscape_fast.methods import param_groups
from landscape_fast.models import MLP, LeNet
from landscape_fast.nn import (
    HyperBatchConv2d,
    HyperBatchLinear,
    HyperBatchNetwork,
    Normal,
)
from landscape_fast.ops import hyper_batch_l2_reference

M, B = 3, 4
SPREAD = {"r_init": Normal(1, 0.5), "s_init": Normal(1, 0.5)}


def linear(layout="member_major", **options):
    layer = HyperBatchLinear(5, 6, M, layout=layout, **SPREAD, **options)
    return randomised(layer), torch.randn(M, B, 5), 0.5 * torch.randn(M, B, layer.response_size)


def conv(layout="member_major", **options):
    layer = HyperBatchConv2d(4, 6, 3, M, padding=1, layout=layout, **SPREAD, **options)
    return randomised(layer), torch.randn(M, B, 4, 5, 5), torch.randn(M, B, layer.response_size)


def randomised(layer):
    if layer.delta_bias is not None:
        nn.init.normal_(layer.delta_bias)
    return layer


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("bias", [True, "shared", False])
@pytest.mark.parametrize("make", [linear, conv])
def test_every_example_of_a_member_sees_a_plain_layer(make, bias, tie):
    layer, x, e = make(bias=bias, tie_factors=tie)
    y = layer(x, e)
    for m in range(M):
        for b in range(B):
            plain = layer.member(m, e[m, b])
            assert type(plain) in (nn.Linear, nn.Conv2d)
            torch.testing.assert_close(plain(x[m, b : b + 1])[0], y[m, b], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [linear, conv])
def test_layouts_hold_the_same_numbers(make):
    layer, x, e = make()
    y = layer(x, e)
    folded, *_ = make("folded")
    folded.load_state_dict(layer.state_dict())
    found = folded(x.flatten(0, 1), e.flatten(0, 1))
    torch.testing.assert_close(found, y.flatten(0, 1))
    if make is linear:
        rows, *_ = make("batch_major")
        rows.load_state_dict(layer.state_dict())
        torch.testing.assert_close(rows(x.transpose(0, 1), e.transpose(0, 1)), y.transpose(0, 1))


@pytest.mark.parametrize("make", [linear, conv])
def test_two_halves_are_one_response(make):
    layer, x, e = make()
    assert torch.equal(layer(x, (e[..., :6], e[..., 6:])), layer(x, e))


def test_parameters_without_a_bias_hold_nothing_empty():
    layer, _, e = conv(bias=False, tie_factors=False)
    assert {n: tuple(p.shape) for n, p in layer.named_parameters()} == {
        "weight": (6, 4, 3, 3),
        "delta": (6, 4, 3, 3),
        "r": (M, 4),
        "s": (M, 6),
        "u": (M, 4),
        "v": (M, 6),
    }
    assert layer.response_size == 6 and e.shape[-1] == 6


def test_a_self_tuning_network_has_one_member_and_no_factors():
    layer = HyperBatchLinear(5, 6, 1, bias="shared", layout="folded", r=False, s=False)
    assert {n for n, _ in layer.named_parameters()} == {"weight", "delta", "bias", "delta_bias"}
    randomised(layer)
    x, e = torch.randn(B, 5), torch.randn(B, 12)
    expected = x @ layer.weight.T + layer.bias
    expected += e[:, :6] * (x @ layer.delta.T) + e[:, 6:] * layer.delta_bias
    torch.testing.assert_close(layer(x, e), expected)


@pytest.mark.parametrize("layout", ["member_major", "folded"])
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("make", [linear, conv])
def test_penalty_is_the_mean_over_weights_that_examples_see(make, fast, layout):
    layer, _, e = make(layout)
    h, h_bias = torch.rand(M, B), torch.rand(M, B)
    given = e if layout == "member_major" else e.flatten(0, 1)
    found = layer.l2(given, h, h_bias, fast_weights=fast)
    factors = (layer.r, layer.s) if fast else (None, None)
    tail = (layer.bias, layer.delta_bias, e[..., 6:], h_bias)
    expected = hyper_batch_l2_reference(
        layer.weight, layer.delta, e[..., :6], h, *factors, None, None, *tail
    )
    torch.testing.assert_close(found, expected)
    alone = hyper_batch_l2_reference(layer.weight, layer.delta, e[..., :6], h, *factors)
    torch.testing.assert_close(layer.l2(given, h, fast_weights=fast, bias=False), alone)


def test_initial_values_come_from_the_generator():
    def made(seed):
        generator = torch.Generator().manual_seed(seed)
        return HyperBatchLinear(5, 6, M, tie_factors=False, **SPREAD, generator=generator)

    first, again, other = made(1), made(1), made(2)
    for (name, a), b, c in zip(
        first.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        assert name == "delta_bias" or not torch.equal(a, c), name
    assert not torch.equal(first.weight, first.delta) and not torch.equal(first.r, first.u)
    assert torch.equal(first.bias, first.bias[:1].expand_as(first.bias))
    assert not first.delta_bias.any()


def network(tie=True, **options):
    factory = partial(HyperBatchLinear, members=M, tie_factors=tie, **SPREAD)
    return HyperBatchNetwork(MLP(5, (7,), 3, linear=factory), 0.1, 100.0, std=0.3, **options)


def lenet():
    options = {"members": M, **SPREAD}
    made = LeNet(
        (1, 28, 28),
        conv=partial(HyperBatchConv2d, **options),
        linear=partial(HyperBatchLinear, **options),
    )
    return HyperBatchNetwork(made, 0.1, 100.0, std=0.3)


@pytest.mark.parametrize("tie", [True, False])
def test_network_of_one_example_is_a_network_of_plain_layers(tie):
    model, x = network(tie), torch.randn(B, 5)
    lambdas = model.distribution(width=5.0).sample(B)
    y = model(x, lambdas)
    for m in range(M):
        for b in range(B):
            plain = model.member(m, lambdas[m, b])
            assert not any("HyperBatch" in type(module).__name__ for module in plain.modules())
            torch.testing.assert_close(plain(x[b : b + 1])[0], y[m, b], rtol=1e-4, atol=1e-5)


def test_convolutional_network_of_one_example():
    model, x = lenet(), torch.randn(2, 1, 28, 28)
    lambdas = model.distribution().sample(2)
    plain = model.member(1, lambdas[1, 0])
    y = model(x, lambdas)
    torch.testing.assert_close(plain(x[:1])[0], y[1, 0], rtol=1e-3, atol=1e-4)


def test_network_penalty_takes_the_hyperparameter_of_each_layer():
    def group(layer, kind):
        return None if kind == "bias" and layer == "layers.0" else kind

    model = network(group=group)
    assert model.hyperparameters == ("weight", "bias")
    lambdas = model.distribution().sample(B)
    es, layers = model.embedding(lambdas), list(model.layers().values())
    weight, bias = lambdas.unbind(-1)
    expected = layers[0].l2(es[0], weight, bias=False) + layers[1].l2(es[1], weight, bias)
    torch.testing.assert_close(model.l2(lambdas), expected)


def test_tuning_reaches_the_bounds_only_through_the_sample():
    """The validation loss has gradients for the bounds; the penalty and the weights have theirs."""
    model, x = network(), torch.randn(B, 5)
    distribution = model.distribution()
    y = model(x, distribution.sample(B, torch.Generator().manual_seed(0)))
    bounds = list(distribution.parameters())
    tuned = torch.autograd.grad(y.square().mean(), bounds, retain_graph=True)
    assert all(g.isfinite().all() and g.abs().min() > 0 for g in tuned)
    loss = y.square().mean() + model.l2(distribution.sample(B)) / 100
    for name, g in zip(
        dict(model.named_parameters()),
        torch.autograd.grad(loss, list(model.parameters())),
        strict=True,
    ):
        assert g.isfinite().all() and g.abs().max() > 0, name


def test_network_forgets_its_responses():
    model, x = network(), torch.randn(B, 5)
    lambdas = model.distribution().sample(B)
    model(x, lambdas)
    assert all(layer.response is None for layer in model.layers().values())
    with pytest.raises(ValueError, match="x must be"):
        model(torch.randn(B, 4), lambdas)
    assert all(layer.response is None for layer in model.layers().values())


def test_network_copies_compiles_and_takes_other_batch_sizes():
    model = network()
    lambdas, x = model.distribution().sample(B), torch.randn(B, 5)
    y = model(x, lambdas)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x, lambdas), y)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, lambdas), y)
    torch.testing.assert_close(model(x[:1], lambdas[:, :1]), y[:, :1])
    mean = model.distribution().mean().unsqueeze(1).expand(M, 2 * B, -1)
    assert model(torch.randn(2 * B, 5), mean).shape == (M, 2 * B, 3)


def test_factors_are_fast_parameters():
    model = network(tie=False)
    shared, fast = param_groups(model, 0.1, fast_lr_mult=0.5)
    assert fast["lr"] == 0.05
    names = {id(p): n.rsplit(".", 1)[-1] for n, p in model.named_parameters()}
    assert {names[id(p)] for p in fast["params"]} == {"r", "s", "u", "v"}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: HyperBatchLinear(0, 6, M), "HyperBatchLinear: in_features must be an integer"),
        (lambda: HyperBatchLinear(5, 6, 0), "HyperBatchLinear: members must be an integer"),
        (lambda: HyperBatchLinear(5, 6, M, bias="all"), "bias must be True .one per member"),
        (lambda: HyperBatchLinear(5, 6, M, layout="x"), "layout must be 'member_major' or"),
        (lambda: HyperBatchLinear(5, 6, M, tie_factors=1), "tie_factors must be True or False"),
        (lambda: HyperBatchConv2d(4, 6, 3, M, groups=3), "groups must be a divisor of in_chan"),
        (lambda: linear()[0](torch.zeros(B, 5)), "HyperBatchLinear: e must be given; got None; "),
        (
            lambda: linear()[0](torch.zeros(B, 5), torch.zeros(M, B, 6)),
            r"e must be \[..., 2 \* O\], of 12 last; got \[3, 4, 6\]",
        ),
        (
            lambda: linear(bias=False)[0](torch.zeros(B, 5), (torch.zeros(M, B, 6),) * 2),
            "e must be a pair where there is a bias; got 2",
        ),
        (lambda: linear()[0].member(M, torch.zeros(12)), "i must be an integer from 0 to 2"),
        (lambda: linear()[0].member(True, torch.zeros(12)), "i must be an integer from 0 to 2"),
        (lambda: linear()[0].member(0, torch.zeros(6)), r"e must be \[12\]; got \[6\]"),
        (lambda: HyperBatchNetwork(nn.ReLU(), 1.0, 2.0), "network must be one with hyper-batch"),
        (
            lambda: HyperBatchNetwork(nn.Sequential(linear()[0], HyperBatchLinear(6, 2, 2)), 1, 2),
            r"network must be of one number of members; got \[2, 3\]",
        ),
        (
            lambda: HyperBatchNetwork(linear()[0], [1.0], 2.0),
            r"lower must be one number, or one for each of \('weight', 'bias'\); got \[1.0\]",
        ),
        (
            lambda: network()(torch.zeros(B, 5), torch.zeros(M, B, 3)),
            r"lambdas must be \[M, B, H\] with M = 3, H = 4; got \[3, 4, 3\]",
        ),
    ],
    ids=range(16),
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
