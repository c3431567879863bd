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
    extract_member,
    to_deep_ensemble,
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


def test_an_attention_used_twice_stays_one():
    plain = nn.MultiheadAttention(4, 2)
    net = convert_(nn.ModuleList([plain, plain]), M, layout="folded")
    assert net[0] is net[1] and len(ensemble_layers(net)) == 4


def test_a_single_layer_is_returned():
    plain = nn.Linear(4, 5)
    layer = convert_(plain, M, bias="shared", r_init="random_sign")
    assert isinstance(layer, BatchEnsembleLinear) and layer.weight is plain.weight
    assert layer.bias is plain.bias
    assert isinstance(convert_(nn.MultiheadAttention(4, 2), M, layout="folded").q_proj, type(layer))
    assert convert_(nn.BatchNorm1d(4), M, norm="per_member").running_var.shape == (M, 4)
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


@pytest.mark.parametrize("exclude", ["1.self_attn", nn.MultiheadAttention])
def test_a_transformer_without_its_attention_is_refused(exclude):
    """Its fast path would read the shared weights of the other layers, without their factors."""
    net = nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 2, 8))
    text = "layer '1.linear1' must be called by what is around it; got TransformerEncoderLayer, wh"
    with pytest.raises(ValueError, match=text):
        convert_(net, M, exclude=exclude)
    with pytest.raises(ValueError, match="layer '1.norm1' must be called by what is around it"):
        convert_(net, M, include=nn.LayerNorm, norm="per_member")
    with pytest.raises(ValueError, match="'1.self_attn.out_proj' must be called by .* Multihead"):
        convert_(net, M, include="1.self_attn.out_proj")
    convert_(net, M, exclude=nn.TransformerEncoderLayer)
    assert list(ensemble_layers(net)) == ["0"]


def transformer(**options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, **options)
    net = nn.TransformerEncoder(layer, 2).double().eval()
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net


@pytest.mark.parametrize("norm", ["shared", "per_member"])
@pytest.mark.parametrize("options", [{}, {"norm_first": True, "activation": "gelu"}], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_a_transformer_is_one_transformer_per_member(options, norm, masked):
    """In evaluation mode, where its fast path would pass over the factors; with and without
    padding, which turns a batch into nested tensors on that path."""
    net = convert_(transformer(**options), M, layout="folded", norm=norm,
                   r_init="normal", s_init="normal")  # fmt: skip
    x = torch.randn(M, 2, 5, 8, dtype=torch.float64)
    padding = torch.zeros(M, 2, 5, dtype=torch.bool)
    padding[:, 1, 3:] = True
    with torch.no_grad():
        mask = padding.flatten(0, 1) if masked else None
        y = net(x.flatten(0, 1), src_key_padding_mask=mask).unflatten(0, (M, 2))
        for m in range(M):
            single = extract_member(net, m)
            assert type(single.layers[0].self_attn) is nn.MultiheadAttention
            want = single(x[m], src_key_padding_mask=padding[m] if masked else None)
            seen = ~padding[m] if masked else slice(None)
            torch.testing.assert_close(y[m][seen], want[seen])
    assert not torch.allclose(y[0, 0], net(x[:1].expand_as(x).flatten(0, 1))[2])


def test_the_function_of_a_transformer_stays():
    net = transformer()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    with torch.no_grad():
        want, masked = net(x), net(x, mask=causal, is_causal=True)
        ensemble = FoldedEnsemble(convert_(net, M, layout="folded"), M)
        torch.testing.assert_close(ensemble(x), want.expand(M, *want.shape))
        y = net(x.repeat(M, 1, 1), mask=causal, is_causal=True)
    torch.testing.assert_close(y.unflatten(0, (M, 2)), masked.expand(M, *masked.shape))


def test_a_decoder_and_a_member_major_encoder():
    layer = nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=True).double()
    x, memory = torch.randn(M, 2, 5, 8).double(), torch.randn(M, 2, 4, 8).double()
    net = convert_(layer, M, layout="folded", r_init="normal")
    y = net(x.flatten(0, 1), memory.flatten(0, 1)).unflatten(0, (M, 2))
    for m in range(M):
        torch.testing.assert_close(y[m], extract_member(net, m)(x[m], memory[m]))
    net = convert_(transformer(), M, layout="member_major", r_init="normal")
    y = net(x)
    for m in range(M):
        torch.testing.assert_close(y[m], extract_member(net, m)(x[m]))


class Every(nn.Module):
    """One layer of each kind that can be converted."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ConvTranspose1d(4, 2, 3)
        )
        self.conv2 = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 2, 3)
        )
        self.conv3 = nn.Sequential(
            nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), nn.ConvTranspose3d(4, 2, 3)
        )
        self.last = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3))

    def forward(self, x):
        y = self.conv1(x.flatten(2)).view_as(x)
        y = self.conv2(y.flatten(3)).view_as(x)
        return self.last(self.conv3(y))


@pytest.mark.parametrize("norm", ["shared", "per_member"])
@pytest.mark.parametrize("rank", [1, 2])
def test_every_kind_is_converted(norm, rank):
    net = Every().double()
    x = torch.randn(2, 2, 4, 4, 4, dtype=torch.float64)
    for _ in range(3):
        net(x)
    net.eval()
    want = net(x)
    convert_(net, M, layout="folded", norm=norm, rank=rank, s_init="ones")
    ensemble = FoldedEnsemble(net, M)
    torch.testing.assert_close(ensemble(x), want.expand(M, *want.shape))
    kinds = [nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.modules.conv._ConvTransposeNd]
    assert not any(type(m) in kinds for m in net.modules())
    assert len(ensemble_layers(net)) == 7
    assert all(layer.rank == rank for layer in ensemble_layers(net).values())
    norms = [m for m in net.modules() if "Norm" in type(m).__name__]
    assert len(norms) == 4
    assert all(hasattr(m, "members") == (norm == "per_member") for m in norms)
    for layer in ensemble_layers(net).values():
        nn.init.normal_(layer.r)
    y = ensemble(x)
    torch.testing.assert_close(to_deep_ensemble(ensemble)(x), y)


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
        (
            lambda: convert_(Net(), 2, norm="own"),
            "convert_: norm must be 'shared' or 'per_member'; got 'own'",
        ),
        (lambda: convert_(Net(), 2, include=nn.BatchNorm2d), "include must be .*; got BatchNorm2d"),
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
