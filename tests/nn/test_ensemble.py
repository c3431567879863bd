"""Single members of whole networks, and wrappers around networks."""

import copy

import pytest
import torch
from torch import nn

from landscape_fast.models import MLP, SmallCNN
from landscape_fast.nn import (
    BatchEnsembleConv2d,
    BatchEnsembleLinear,
    DeepEnsemble,
    FoldedEnsemble,
    HyperBatchLinear,
    convert_,
    ensemble_layers,
    extract_member,
    to_deep_ensemble,
)

M, B = 3, 4
RANDOM = {"r_init": "normal", "s_init": "normal"}


def linear(inputs, outputs, **options):
    return BatchEnsembleLinear(inputs, outputs, M, **RANDOM, **options)


def conv(*args, **options):
    return BatchEnsembleConv2d(*args, members=M, **RANDOM, **options)


class Block(nn.Module):
    """A branch with a layer used twice, a norm and a plain layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return x + self.conv(self.norm(self.conv(x)).relu())


def folded(norm, **options):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), Block(), nn.Flatten(), nn.Linear(144, 5))
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    net(torch.randn(9, 1, 8, 8))  # running statistics
    return FoldedEnsemble(convert_(net, M, layout="folded", norm=norm, **RANDOM, **options), M)


def encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    net = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(8, 3))
    return FoldedEnsemble(convert_(net, M, layout="folded", **RANDOM), M)


SEEDED = {"generator": torch.Generator().manual_seed(0)}
IMAGES, ROWS = torch.randn(B, 1, 8, 8, **SEEDED), torch.randn(B, 6, **SEEDED)
NETWORKS = {
    "layer": (lambda: linear(6, 3), ROWS),
    "mlp": (lambda: MLP(6, (7,), 3, linear=linear), ROWS),
    "cnn": (lambda: SmallCNN((1, 8, 8), 3, conv=conv, linear=linear), IMAGES),
    "shared norm": (lambda: folded("shared"), IMAGES),
    "norms": (lambda: folded("per_member"), IMAGES),
    "rank 2": (lambda: folded("shared", rank=2), IMAGES),
    "attention": (encoder, torch.randn(B, 5, 8, **SEEDED)),
    "deep": (lambda: DeepEnsemble(nn.Linear(6, 3) for _ in range(M)), ROWS),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_members_are_plain_networks_with_the_outputs_of_the_ensemble(name):
    make, x = NETWORKS[name]
    model = make().double().eval()
    x = x.double()
    y = model(x)
    assert y.shape[:2] == (M, B) and not torch.allclose(y[0], y[1])
    before = copy.deepcopy(model.state_dict())
    for i in range(M):
        member = extract_member(model, i)
        torch.testing.assert_close(member(x), y[i])
        ours = [m for m in member.modules() if "nsemble" in type(m).__name__]
        assert not ours and not any(m.training for m in member.modules())
        with torch.no_grad():
            for p in member.parameters():
                p.zero_()
    deep = to_deep_ensemble(model)
    assert isinstance(deep, DeepEnsemble) and not deep.training
    torch.testing.assert_close(deep(x), y)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("layout", ["batch_major", "folded"])
def test_other_layouts(layout):
    """The deep ensemble has its members in front, whatever the layout was."""
    model = nn.Sequential(linear(6, 8, layout=layout), nn.ReLU(), linear(8, 3, layout=layout))
    deep = to_deep_ensemble(model)
    if layout == "batch_major":
        torch.testing.assert_close(deep(ROWS), model(ROWS).transpose(0, 1))
    else:
        y = FoldedEnsemble(model, M)(ROWS)
        torch.testing.assert_close(deep(ROWS), y)
        torch.testing.assert_close(extract_member(model, 1)(ROWS), y[1])


def test_folding_keeps_channels_last():
    seen = []
    probe = nn.Conv2d(2, 3, 1)
    probe.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.randn(B, 5, 6, 2).movedim(-1, 1)
    y = FoldedEnsemble(probe, M)(x)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(seen[0], x.repeat(M, 1, 1, 1))
    assert y.shape == (M, B, 3, 5, 6)


def test_what_is_used_twice_stays_one():
    shared = nn.Sequential(*[linear(6, 6)] * 2)
    one = extract_member(shared, 0)
    assert one[0] is one[1] and type(one[0]) is nn.Linear


def test_a_member_learns_on_its_own():
    """Its parameters are leaves that train, with the requires_grad of the ensemble's."""
    model = MLP(6, (7,), 3, linear=linear)
    model.layers[0].weight.requires_grad_(False)
    member = extract_member(model, 2)
    assert [p.requires_grad for p in member.parameters()] == [False, True, True, True]
    member(ROWS).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in member.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.parameters())


def test_a_module_of_yours_that_gives_members_is_taken_whole():
    class Chosen(nn.Module):
        members = M

        def __init__(self):
            super().__init__()
            self.inner = linear(6, 3)

        def member(self, i):
            return nn.Sequential(self.inner.member(i), nn.Tanh())

        def forward(self, x):
            return self.inner(x).tanh()

    model = nn.Sequential(Chosen(), nn.Softmax(-1))
    torch.testing.assert_close(to_deep_ensemble(model)(ROWS), model(ROWS))


@pytest.mark.parametrize(
    "call, text",
    [
        (
            lambda: extract_member(nn.Linear(2, 2), 0),
            "extract_member: model must be a network whose layers agree on the number of members; "
            "got none",
        ),
        (
            lambda: to_deep_ensemble(
                nn.Sequential(linear(6, 6), BatchEnsembleLinear(6, 6, members=5))
            ),
            r"to_deep_ensemble: model must be a network whose layers agree .* got \[3, 5\]",
        ),
        (
            lambda: extract_member(linear(6, 3), 3),
            "extract_member: i must be an integer from 0 to 2",
        ),
        (lambda: extract_member(linear(6, 3), True), "i must be an integer from 0 to 2; got True"),
        (lambda: DeepEnsemble([]), "DeepEnsemble: members must be at least one network; got 0"),
        (
            lambda: FoldedEnsemble(
                nn.Sequential(linear(6, 6, layout="folded"), convert_norm("member_major")), M
            ),
            "FoldedEnsemble: layer '1' of model must be folded, with 3 members; got layout='member",
        ),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def convert_norm(layout):
    return convert_(nn.LayerNorm(6), M, layout=layout, norm="per_member")


@pytest.mark.parametrize(
    "function, arguments",
    [(extract_member, (0,)), (to_deep_ensemble, ()), (FoldedEnsemble, (2,)), (ensemble_layers, ())],
)
def test_the_model_must_be_a_module(function, arguments):
    text = f"{function.__name__}: model must be an nn.Module; got list"
    with pytest.raises(TypeError, match=text):
        function([], *arguments)


def test_members_of_hyper_batch_layers_need_more_than_a_number():
    model = nn.Sequential(HyperBatchLinear(6, 3, M))
    text = "free of layers whose members depend on more than i; got HyperBatchLinear as '0'; call"
    with pytest.raises(ValueError, match=f"extract_member: model must be {text}"):
        extract_member(model, 0)
