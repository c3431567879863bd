"""What other BatchEnsemble libraries get wrong, one test each: a drop-in must not inherit it."""

import pytest
import torch
from torch import nn

from landscape_fast.nn import (
    BatchEnsembleConv2d,
    BatchEnsembleLinear,
    EnsembleLayerNorm,
    FoldedEnsemble,
    convert_,
    ensemble_layers,
)

M, B = 3, 4


class Residual(nn.Module):
    """A block whose shortcut is a convolution, as where the width changes."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU())
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x):
        return self.body(x) + self.shortcut(x)


def nested():
    blocks = nn.ModuleDict({"one": Residual(2, 4), "two": Residual(4, 6)})
    head = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(6 * 25, 3)))
    return nn.Sequential(*blocks.values(), head)


def test_a_nested_network_is_converted_and_computes_what_it_did():
    """torch-uncertainty: a RuntimeError while the dictionary of modules changes; weights lost."""
    net, x = nested(), torch.randn(B, 2, 5, 5)
    want = net(x)
    y = FoldedEnsemble(convert_(net, M, layout="folded"), M)(x)
    torch.testing.assert_close(y, want.expand(M, *want.shape))


def test_a_single_layer_is_converted():
    """tabm, torch-uncertainty: the root is left as it is."""
    assert isinstance(convert_(nn.Linear(2, 3), M), BatchEnsembleLinear)
    assert isinstance(convert_(nn.Conv2d(2, 3, 1), M), BatchEnsembleConv2d)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_weights_and_padding_mode_are_kept(mode):
    """torch-uncertainty, probly: the mode becomes zeros; tabm, torch-uncertainty: new weights."""
    conv = nn.Conv2d(2, 4, 3, padding=1, padding_mode=mode)
    layer = BatchEnsembleConv2d.from_conv2d(conv, M)
    x = torch.randn(B, 2, 5, 5)
    assert layer.padding_mode == mode
    torch.testing.assert_close(layer(x), conv(x).expand(M, B, 4, 5, 5))


def test_a_layer_without_bias_gets_none():
    """probly: a bias of zeros appears, and is trained."""
    for plain in (nn.Linear(2, 3, bias=False), nn.Conv2d(2, 3, 1, bias=False)):
        assert convert_(plain, M).bias is None


@pytest.mark.parametrize("rows", [5, 2])
def test_rows_that_members_do_not_divide_are_refused_or_named(rows):
    """torch-uncertainty: what is left over goes to member 0, and fewer rows than M fail."""
    layer = BatchEnsembleLinear(4, 2, M, layout="folded", s_init="normal")
    x = torch.randn(rows, 4)
    with pytest.raises(ValueError, match=r"x must be \[M\*B, I\] with rows divisible by M = 3"):
        layer(x)
    index = torch.arange(rows).remainder(M)
    want = torch.stack([layer.member(m)(row) for m, row in zip(index.tolist(), x, strict=True)])
    torch.testing.assert_close(layer(x, index), want)
    with pytest.raises(ValueError, match="with a multiple of M = 3 rows"):
        BatchEnsembleConv2d(4, 2, 1, M, layout="folded")(torch.randn(rows, 4, 2, 2))


@pytest.mark.parametrize("layout", ["member_major", "batch_major", "folded"])
def test_sequences_are_inputs(layout):
    """torch-uncertainty: a linear layer takes two dimensions only."""
    layer = BatchEnsembleLinear(4, 2, M, layout=layout, r_init="normal", s_init="normal")
    x = torch.randn(M, B, 5, 4)
    want = torch.stack([layer.member(m)(x[m]) for m in range(M)])
    move = {
        "member_major": lambda t: t,
        "batch_major": lambda t: t.movedim(0, -2),
        "folded": lambda t: t.flatten(0, 1),
    }[layout]
    torch.testing.assert_close(layer(move(x)), move(want))


def test_shortcuts_have_members():
    """torch-uncertainty: the shortcut of its basic block is a plain convolution."""
    net = convert_(nested(), M)
    assert not any(type(m) in (nn.Conv2d, nn.Linear) for m in net.modules())
    names = ["0.body.0", "0.shortcut", "1.body.0", "1.shortcut", "2.1.0"]
    assert list(ensemble_layers(net)) == names


@pytest.mark.parametrize("groups", [1, 4])
def test_bias_and_activation_act_once(groups):
    """edward2: its depthwise layer hands both to its parent, too."""
    layer = BatchEnsembleConv2d(4, 8, 3, M, groups=groups, activation="relu", s_init="normal")
    nn.init.normal_(layer.bias)
    x = torch.randn(M, B, 4, 5, 5)
    conv = nn.functional.conv2d
    for m in range(M):
        y = conv(x[m] * layer.r[m].view(-1, 1, 1), layer.weight, groups=groups)
        y = y * layer.s[m].view(-1, 1, 1) + layer.bias[m].view(-1, 1, 1)
        torch.testing.assert_close(layer(x)[m], y.relu())
        assert (y < 0).any()


def test_the_rank_is_part_of_what_a_layer_says_of_itself():
    """edward2: `get_config` leaves it out, so that a copy made from it has rank 1."""
    layer = BatchEnsembleLinear(4, 2, M, rank=2)
    assert "rank=2" in repr(layer)
    with pytest.raises(RuntimeError, match="size mismatch for r"):
        BatchEnsembleLinear(4, 2, M).load_state_dict(layer.state_dict())


def test_a_norm_without_affine_is_converted():
    """tabm: AttributeError."""
    plain = nn.LayerNorm(4, elementwise_affine=False)
    layer = EnsembleLayerNorm.from_layernorm(plain, M)
    x = torch.randn(M, B, 4)
    torch.testing.assert_close(layer(x), plain(x))
    net = convert_(nn.Sequential(nn.Linear(4, 4), plain), M, norm="per_member")
    assert isinstance(net[1], EnsembleLayerNorm) and not list(net[1].parameters())


def test_random_signs_are_written():
    """DeepTab: r and s stay what `torch.empty` held; the fixture of these tests makes that NaN."""
    for layer in (
        BatchEnsembleLinear(40, 50, M, r_init="random_sign", s_init="random_sign"),
        BatchEnsembleConv2d(40, 50, 1, M, r_init="random_sign", s_init="random_sign"),
        BatchEnsembleLinear(40, 50, M, rank=2, r_init="random_sign", s_init="random_sign"),
    ):
        assert set(layer.r.unique().tolist()) == {-1.0, 1.0}
        assert set(layer.s.unique().tolist()) - {0.0} == {-1.0, 1.0}


def test_a_row_has_one_member_in_all_layers():
    """LP_BNN: in training every layer picks members at random, each for itself."""
    net = nn.Sequential(*[BatchEnsembleLinear(4, 4, M, layout="folded") for _ in range(2)]).train()
    x = torch.randn(M * B, 4)
    before = net(x).unflatten(0, (M, B))
    for layer in net:
        nn.init.normal_(layer.bias[1])
        nn.init.normal_(layer.s[1])
    after = net(x).unflatten(0, (M, B))
    changed = [not torch.equal(before[m], after[m]) for m in range(M)]
    assert changed == [False, True, False]


@pytest.mark.parametrize("make", [
    lambda: (BatchEnsembleLinear(4, 4, M, r_init="normal"), (B, 4)),
    lambda: (BatchEnsembleConv2d(4, 4, 3, M, r_init="normal"), (B, 4, 5, 5)),
])  # fmt: skip
def test_activations_stay_low_under_autocast(make):
    """tabm, torch-uncertainty: float32 factors bring every activation back to float32."""
    layer, shape = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(torch.randn(shape))
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}
