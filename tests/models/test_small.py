"""The small networks against their definition written out, with plain layers and with members."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from models.networks import B, M, count, factories
from torch import nn

from landscape_fast.data import digits
from landscape_fast.models import MLP, LeNet, MediumCNN, SmallCNN
from landscape_fast.nn import MemberLinear, ensemble_layers
from landscape_fast.testing import check_layer


def test_parameter_counts():
    """MediumCNN: the number its authors' notebook prints. LeNet: 61,706 for 32 x 32 grey pixels, as
    commonly counted. SmallCNN and MLP: added by hand.
    """
    assert count(MediumCNN()) == 971_146
    assert count(LeNet((1, 28, 28))) == count(LeNet((1, 32, 32))) == 61_706
    assert count(LeNet()) == 62_006
    body = 16 * 28 + 32 * (16 * 9 + 1) + 32 * (32 * 9 + 1)
    assert count(SmallCNN()) == body + 513 * 10
    assert count(SmallCNN(head="pool")) == body + 33 * 32 + 33 * 10
    assert count(MLP(64, (32, 16))) == 65 * 32 + 33 * 16 + 17 * 10
    assert count(MLP((1, 8, 8), hidden=(), classes=3)) == 65 * 3


def test_members_add_only_factors_and_biases():
    channels = [3, 64, 128, 256, 256]
    linear = [(channels[i], channels[i + 1]) for i in range(4)] + [(1024, 10)]
    extra = sum(M * (i + o) + (M - 1) * o for i, o in linear)
    assert count(MediumCNN(**factories())) == 971_146 + extra


def written_out(net, x, channels):
    """conv SAME -> maxpool 2 SAME -> ReLU except after the last block -> one linear layer."""
    for i in range(channels):
        x = F.conv2d(x, net.convs[i].weight, net.convs[i].bias, padding=1)
        odd = (0, x.shape[-1] % 2, 0, x.shape[-2] % 2)
        x = F.max_pool2d(F.pad(x, odd, value=-torch.inf), 2)
        x = x.clamp_min(0) if i < channels - 1 else x
    return F.linear(x.reshape(len(x), -1), net.head.weight, net.head.bias)


@pytest.mark.parametrize("image", [(3, 32, 32), (1, 8, 8), (2, 13, 9)])
def test_cnns_are_what_the_paper_describes(image):
    x = torch.randn(B, *image, dtype=torch.float64)
    for kind, blocks in ((SmallCNN, 3), (MediumCNN, 4)):
        net = kind(image, classes=7, dtype=torch.float64).eval()
        torch.testing.assert_close(net(x), written_out(net, x, blocks))


@pytest.mark.parametrize("image", [(1, 28, 28), (3, 32, 32), (2, 21, 19)])
def test_lenet_is_what_lecun_describes(image):
    """28 x 28 gets a border of 2; what is odd after a convolution is pooled with its edge."""
    net = LeNet(image, classes=7, dtype=torch.float64)
    x = y = torch.randn(B, *image, dtype=torch.float64)
    y = F.pad(y, (2, 2, 2, 2)) if image[1] == 28 else y
    for conv in net.convs:
        y = F.conv2d(y, conv.weight, conv.bias).clamp_min(0)
        y = F.max_pool2d(F.pad(y, (0, y.shape[-1] % 2, 0, y.shape[-2] % 2)), 2)
    y = y.flatten(1)
    for i, layer in enumerate(net.layers):
        y = F.linear(y.clamp_min(0) if i else y, layer.weight, layer.bias)
    torch.testing.assert_close(net(x), y)


def test_mlp_is_linear_relu_linear():
    net = MLP((2, 3), hidden=(8, 5), classes=4)
    x = torch.randn(B, 2, 3)
    y = x.reshape(B, 6)
    for i in range(3):
        y = F.linear(y.clamp_min(0) if i else y, net.layers[i].weight, net.layers[i].bias)
    torch.testing.assert_close(net(x), y)


def test_pooled_head():
    net = SmallCNN((1, 8, 8), head="pool").eval()
    x = y = torch.randn(B, 1, 8, 8)
    for i, conv in enumerate(net.convs):
        y = F.conv2d(y.clamp_min(0) if i else y, conv.weight, conv.bias, padding=1)
        y = F.max_pool2d(y, 2)
    first, last = net.head[0], net.head[2]
    y = F.linear(y.mean((2, 3)), first.weight, first.bias).clamp_min(0)
    torch.testing.assert_close(net(x), F.linear(y, last.weight, last.bias))


NETS = [
    lambda **f: MLP((1, 8, 8), hidden=(9, 7), linear=f["linear"]),
    lambda **f: SmallCNN((1, 8, 8), **f),
    lambda **f: SmallCNN((1, 8, 8), head="pool", **f),
    lambda **f: MediumCNN((1, 8, 8), **f),
    lambda **f: LeNet((1, 8, 8), channels=(6,), hidden=(9, 7), **f),
]
PLAIN = {"conv": nn.Conv2d, "linear": nn.Linear}


@pytest.mark.parametrize("make", NETS)
def test_each_member_is_a_plain_network(make):
    """For a shared batch and for one batch per member."""
    net = make(**factories(r_init="normal", s_init="normal")).eval()
    shared, own = torch.randn(B, 1, 8, 8), torch.randn(M, B, 1, 8, 8)
    y_shared, y_own = net(shared), net(own)
    assert y_shared.shape == y_own.shape == (M, B, 10)
    for m in range(M):
        plain = make(**PLAIN).eval()
        for name, layer in ensemble_layers(net).items():
            plain.set_submodule(name, layer.member(m))
        torch.testing.assert_close(y_shared[m], plain(shared))
        torch.testing.assert_close(y_own[m], plain(own[m]))


@pytest.mark.parametrize("make", NETS)
@pytest.mark.parametrize("members", [False, True])
def test_contract(make, members, device):
    net = make(**factories(r_init="normal", s_init="normal")) if members else make(**PLAIN)
    check_layer(net.to(device).eval(), torch.randn(B, 1, 8, 8, device=device))


def test_nothing_tiles_a_shared_batch_before_the_factors(monkeypatch):
    """The first linear layer hands the op the very batch it got."""
    import landscape_fast.nn.batch_ensemble as module

    seen = []
    op = module.batch_ensemble_linear

    def spy(x, *args, **options):
        seen.append(x)
        return op(x, *args, **options)

    monkeypatch.setattr(module, "batch_ensemble_linear", spy)
    x = torch.randn(B, 64)
    MLP(64, linear=factories()["linear"])(x)
    assert seen[0] is x and seen[1].shape == (M, B, 128)


@pytest.mark.parametrize("make", NETS)
def test_one_seed_one_network(make):
    """Weights, biases and factors are redrawn from the generator; xavier for the CNNs."""

    def values(seed, **f):
        net = make(**f)
        net.reset_parameters(torch.Generator().manual_seed(seed))
        return net.state_dict()

    random = factories(r_init="normal", s_init="random_sign")
    one, two, other = values(0, **random), values(0, **random), values(1, **random)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not any(torch.equal(one[key], other[key]) for key in one)


def test_cnns_start_by_xavier():
    """Layer by layer, weight then bias, from one generator; a bias counts as a matrix [O, 1]."""
    net = SmallCNN(generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    for layer in (*net.convs, net.head):
        weight, bias = torch.empty_like(layer.weight), torch.empty(len(layer.bias), 1)
        for got, want in ((layer.weight, weight), (layer.bias, bias)):
            nn.init.xavier_uniform_(want, generator=generator)
            assert torch.equal(got, want.view_as(got))


def test_members_share_the_start_of_a_plain_network():
    """With factors of one, every member starts as the plain network of the same seed."""
    for kind in (SmallCNN, MediumCNN):
        plain = kind(generator=torch.Generator().manual_seed(0)).eval()
        net = kind(generator=torch.Generator().manual_seed(0), **factories()).eval()
        x = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(net(x), plain(x).expand(M, 2, 10))
    plain = MLP(5, generator=torch.Generator().manual_seed(0))
    linear = factories()["linear"]
    net = MLP(5, linear=linear, generator=torch.Generator().manual_seed(0))
    x = torch.randn(B, 5)
    torch.testing.assert_close(net(x), plain(x).expand(M, B, 10))


def test_members_that_share_nothing_start_as_plain_layers():
    """Every member within the bound of its own fan-in, weights and biases drawn by themselves."""
    linear, generator = partial(MemberLinear, members=M), torch.Generator().manual_seed(0)
    for layer in MLP(100, hidden=(50,), linear=linear, generator=generator).layers:
        bound = layer.in_features**-0.5
        largest = layer.weight.abs().amax((1, 2))
        # of 500 numbers or more, all are below 0.98 of the bound once in 20,000 seeds
        assert (largest <= bound).all() and (largest > 0.98 * bound).all()
        assert (layer.bias.abs() <= bound).all()
        assert not torch.equal(layer.weight[0], layer.weight[1])
        assert not torch.equal(layer.bias[0], layer.bias[1])
    assert MLP(4, linear=partial(linear, bias=False), generator=generator).layers[0].bias is None


def test_dropout_differs_between_members_and_stops_in_eval():
    net = MLP(5, dropout=0.5, linear=factories()["linear"])
    x = torch.randn(50, 5)
    y = net(x)
    assert not torch.equal(y[0], y[1])
    assert torch.equal(net.eval()(x)[0], net(x)[1])
    cnn = MediumCNN((1, 8, 8))
    image = torch.randn(1, 1, 8, 8)
    assert not torch.equal(cnn(image), cnn(image))
    assert cnn.dropout.p == SmallCNN((1, 8, 8)).dropout.p == 0.1


def test_channels_last_reaches_the_head():
    """No layer between turns the images back: one copy at most, in the flattening."""
    net = MediumCNN(**factories()).to(memory_format=torch.channels_last).eval()
    seen = []
    for conv in net.convs:
        conv.register_forward_hook(lambda _, inputs, y: seen.append(y))
    net(torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last))
    for y in seen:
        assert y.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "make",
    [lambda: MLP((1, 8, 8), (64,), linear=factories(r_init="random_sign")["linear"])]
    + [lambda: SmallCNN((1, 8, 8), **factories(r_init="random_sign"))]
    + [lambda: LeNet((1, 8, 8), channels=(16,), **factories(r_init="random_sign"))],
    ids=["MLP", "SmallCNN", "LeNet"],
)
def test_members_learn_real_digits(make):
    """60 steps take every member past 80 % on unseen digits (seeds gave 85 to 96 %)."""
    pytest.importorskip("sklearn")
    data = digits()
    net = make()
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    for step in range(60):
        batch = slice(step * 128 % 1408, step * 128 % 1408 + 128)
        logits = net(data.train_x[batch])
        y = data.train_y[batch].expand(M, -1)
        optimiser.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), y.flatten()).backward()
        optimiser.step()
    with torch.no_grad():
        labels = net.eval()(data.test_x).argmax(-1)
    assert ((labels == data.test_y).float().mean(1) > 0.8).all()
    assert not torch.equal(labels[0], labels[1])


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: MLP(0), "MLP: the input shape and classes must be integers of at least 1; got"),
        (lambda: MLP(4, classes=0), "the input shape and classes must be integers of at least 1"),
        (lambda: MLP(4, dropout=1.0), r"MLP: dropout must be a probability in \[0, 1\); got 1.0"),
        (lambda: SmallCNN(head="mean"), "SmallCNN: head must be 'flatten' or 'pool'; got 'mean'"),
        (lambda: LeNet((28, 28)), r"LeNet: image must be the shape \(C, H, W\) of one image; got"),
        (lambda: LeNet((1, 8, 8)), r"LeNet: image must be large enough for 2 convolutions 5x5 wit"),
        (lambda: MediumCNN((32, 32)), r"MediumCNN: image must be the shape \(C, H, W\) of one im"),
        (
            lambda: MLP(4)(torch.zeros(2, 5)),
            r"MLP: x must be \[B, 4\] or \[M, B, 4\]; got \[2, 5\]",
        ),
        (lambda: MLP(4)(torch.zeros(4)), r"MLP: x must be \[B, 4\] or \[M, B, 4\]; got \[4\]"),
        (
            lambda: MediumCNN()(torch.zeros(3, 32, 32)),
            r"MediumCNN: x must be \[B, 3, 32, 32\] or \[M, B, 3, 32, 32\]; got \[3, 32, 32\]",
        ),
        (
            lambda: SmallCNN(**factories())(torch.zeros(2, B, 3, 32, 32)),
            r"batch_ensemble_conv2d: x must be \[M, B, I, H, W\] with M = 3",
        ),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call()
