"""convert_ on nested networks: the function stays, nothing is lost silently."""

import copy
import logging

import pytest
import torch
from torch import nn

from landscape_fast.nn import (
    BatchEnsembleConv2d,
    BatchEnsembleLinear,
    FoldedEnsemble,
    convert_,
    ensemble_layers,
)
from landscape_fast.testing import check_layer

M = 3


class Block(nn.Module):
    def __init__(self, width, shared):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, padding_mode="reflect", bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.conv2 = shared

    def forward(self, x):
        return x + self.conv2(self.norm(self.conv1(x)).relu())


class Net(nn.Module):
    """Nested, with one convolution used by both blocks and a head tied to another parameter."""

    def __init__(self):
        super().__init__()
        shared = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.stem = nn.Conv2d(3, 4, 3, stride=2)
        self.blocks = nn.ModuleList([Block(4, shared), Block(4, shared)])
        self.heads = nn.ModuleDict({"main": nn.Sequential(nn.Flatten(), nn.Linear(64, 5))})
        self.names = nn.Embedding(5, 64)
        self.names.weight = self.heads["main"][1].weight

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.heads["main"](x)


IMAGES = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def trained():
    """Statistics and affine of the norms are not at their trivial start."""
    net = Net()
    for norm in (net.blocks[0].norm, net.blocks[1].norm):
        nn.init.normal_(norm.weight)
    net(IMAGES)
    return net.eval()


def test_the_function_stays():
    net = trained()
    want = net(IMAGES)
    ensemble = FoldedEnsemble(convert_(net, M, layout="folded"), M)
    torch.testing.assert_close(ensemble(IMAGES), want.expand(M, *want.shape))
    assert list(ensemble_layers(net)) == [
        "stem",
        "blocks.0.conv1",
        "blocks.0.conv2",
        "blocks.1.conv1",
        "heads.main.1",
    ]
    assert not any(type(m) in (nn.Linear, nn.Conv2d) for m in net.modules())


def test_each_member_is_the_network_of_its_own_layers():
    """With random factors, member m equals a copy whose layers are replaced by `member(m)`."""
    net = convert_(trained(), M, layout="folded", r_init="normal", s_init="normal")
    y = FoldedEnsemble(net, M)(IMAGES)
    for m in range(M):
        single = copy.deepcopy(net)
        for name, layer in ensemble_layers(net).items():
            single.set_submodule(name, layer.member(m))
        single.blocks[1].conv2 = single.blocks[0].conv2
        torch.testing.assert_close(y[m], single(IMAGES))


def test_shared_and_tied_stay_so():
    net = trained()
    weights = {id(p) for name, p in net.named_parameters() if name.endswith("weight")}
    convert_(net, M)
    assert net.blocks[0].conv2 is net.blocks[1].conv2
    assert net.names.weight is net.heads["main"][1].weight
    new = dict(net.named_parameters())
    assert {id(p) for name, p in new.items() if name.endswith("weight")} == weights
    assert isinstance(net.blocks[0].conv1, BatchEnsembleConv2d)
    assert net.blocks[0].conv1.padding_mode == "reflect" and net.blocks[0].conv1.bias is None
    assert not net.blocks[0].conv1.training
    assert list(net._modules) == ["stem", "blocks", "heads", "names"]


def test_a_single_layer_is_returned():
    plain = nn.Linear(4, 5)
    layer = convert_(plain, M, bias="shared", r_init="random_sign")
    assert isinstance(layer, BatchEnsembleLinear) and layer.weight is plain.weight
    assert layer.bias is plain.bias
    net = nn.Sequential(nn.Linear(4, 5))
    assert convert_(net, M) is net


@pytest.mark.parametrize(
    "include, exclude, want",
    [
        ("stem", None, ["stem"]),
        ("blocks", None, ["blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1"]),
        ("blocks.*.conv1", None, ["blocks.0.conv1", "blocks.1.conv1"]),
        (nn.Linear, None, ["heads.main.1"]),
        (Block, "blocks.0.conv1", ["blocks.0.conv2", "blocks.1.conv1"]),
        (None, ["stem", nn.ModuleDict], ["blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1"]),
        ("blocks.1.conv2", None, ["blocks.0.conv2"]),  # the shared one, by its second name
        (["heads.main", "stem"], nn.Conv2d, ["heads.main.1"]),
    ],
)
def test_include_and_exclude(include, exclude, want, caplog):
    with caplog.at_level(logging.INFO, "landscape_fast"):
        net = convert_(trained(), M, include=include, exclude=exclude)
    assert list(ensemble_layers(net)) == want
    assert [record.message.split(":")[0] for record in caplog.records] == want


def test_factors_come_from_the_generator():
    nets = []
    for seed in (0, 0, 1):
        torch.manual_seed(5)
        net = Net()
        before = torch.get_rng_state()
        generator = torch.Generator().manual_seed(seed)
        nets.append(convert_(net, M, r_init="normal", generator=generator).state_dict())
        assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(nets[0][key], nets[1][key]) for key in nets[0])
    assert not torch.equal(nets[0]["stem.r"], nets[2]["stem.r"])
    assert not torch.equal(nets[0]["blocks.0.conv1.r"], nets[0]["blocks.1.conv1.r"])


def spoil(change, make_layer=lambda: nn.Linear(4, 4)):
    def make():
        net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(make_layer()))
        change(net[1][0])
        return net

    return make


class Mine(nn.Linear):
    pass


class Attention(nn.MultiheadAttention):
    pass


REFUSED = [
    (
        spoil(lambda m: m.register_forward_hook(print)),
        "'1.0' must be free of hooks; got _forward_h",
    ),
    (spoil(lambda m: m.register_forward_pre_hook(print)), "free of hooks; got _forward_pre_hooks"),
    (spoil(lambda m: m.register_full_backward_hook(print)), "free of hooks; got _backward_hooks"),
    (spoil(lambda m: m.register_state_dict_pre_hook(print)), "free of hooks; got _state_dict_pre"),
    (
        spoil(nn.utils.parametrizations.weight_norm),
        "'1.0' must be free of parametrizations; got weight; exclude='1.0' leaves it as it is",
    ),
    (spoil(nn.utils.parametrizations.spectral_norm), "free of parametrizations; got weight"),
    (
        lambda: nn.Sequential(nn.Linear(4, 4), Mine(4, 4)),
        "'1' must be an nn.Linear, not a subclass; got Mine; exclude='1'",
    ),
    (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4)),
        "not a subclass; got LazyLinear",
    ),
    (
        spoil(lambda m: None, lambda: Attention(4, 2)),
        "'1.0' must be an nn.MultiheadAttention, not a subclass; got Attention",
    ),
    (
        spoil(
            lambda m: m.out_proj.register_forward_hook(print), lambda: nn.MultiheadAttention(4, 2)
        ),
        "'1.0' must be free of hooks; got _forward_hooks",
    ),
]


@pytest.mark.parametrize("make, text", REFUSED)
def test_refuses_what_would_be_lost_and_changes_nothing(make, text):
    net = make()
    before = [(name, id(m)) for name, m in net.named_modules()]
    with pytest.raises(ValueError, match=f"convert_: layer .*{text}"):
        convert_(net, M)
    assert before == [(name, id(m)) for name, m in net.named_modules()]


def test_what_is_refused_can_be_excluded():
    net = nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 2, 8))
    convert_(net, M, exclude=nn.TransformerEncoderLayer)
    assert list(ensemble_layers(net)) == ["0"]


def test_an_error_in_the_options_changes_nothing():
    net = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, 1))
    with pytest.raises(ValueError, match="BatchEnsembleConv2d: layout must be"):
        convert_(net, M, layout="batch_major")
    assert [type(m) for m in net] == [nn.Linear, nn.Conv2d]


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: convert_(Net(), 0), "convert_: members must be an integer of at least 1; got 0"),
        (lambda: convert_([], 2), "convert_: model must be an nn.Module; got list"),
        (
            lambda: convert_(nn.Sequential(nn.ReLU()), 2),
            "model must be a network with layers to convert; got Sequential",
        ),
        (lambda: convert_(convert_(Net(), 2), 2), "got Net with none selected"),
        (lambda: convert_(Net(), 2, exclude=Net), "got Net with none selected"),
        (
            lambda: convert_(Net(), 2, include="head"),
            "include must be a name, pattern or type of layers .*; got 'head'; there are 'stem',",
        ),
        (lambda: convert_(Net(), 2, exclude=nn.ReLU), "exclude must be .*; got ReLU; there are"),
        (lambda: convert_(Net(), 2, include=3), "include must be names, patterns or module types"),
        (
            lambda: FoldedEnsemble(convert_(Net(), 2), 2),
            "FoldedEnsemble: layer 'stem' of model must be folded, with 2 members; got layout='mem",
        ),
        (
            lambda: FoldedEnsemble(convert_(Net(), 2, layout="folded"), 3),
            "must be folded, with 3 members; got layout='folded', members=2",
        ),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_folded_ensemble_keeps_the_contract():
    net = convert_(trained(), M, include=["stem", "heads"], layout="folded", r_init="normal")
    check_layer(FoldedEnsemble(convert_(net, M, layout="folded"), M), IMAGES)
