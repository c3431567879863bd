"""TabM: the numbers of the package, one member at a time, and what the package does not have."""

import copy

import pytest
import torch
from compat.peers import assert_equal_runs
from torch import nn

from landscape_fast.methods import param_groups, select_members
from landscape_fast.metrics.diversity import pair_diversity
from landscape_fast.models import TabM
from landscape_fast.models.tabm import ARCHS
from landscape_fast.nn import MemberScale, extract_member, saved_bytes, to_deep_ensemble
from landscape_fast.testing import check_layer

B, K = 5, 4
SIZES = {"n_num_features": 6, "cat_cardinalities": [2, 3], "d_out": 3, "d_block": 16, "k": K}
COUNTS = {"tabm": 676_128, "tabm-mini": 546_592, "tabm-packed": 16_973_856}


def make(arch="tabm", **options):
    torch.manual_seed(5)
    return TabM(arch_type=arch, dtype=torch.float64, **{**SIZES, **options})


def rows(members=()):
    x_cat = torch.stack([torch.randint(0, c, (B, *members)) for c in (2, 3)], -1)
    return torch.randn(B, *members, 6, dtype=torch.float64), x_cat


@pytest.mark.parametrize("arch", ARCHS)
class TestEveryArch:
    def test_parameters_of_the_paper(self, arch):
        model = TabM(n_num_features=8, d_out=1, arch_type=arch, device="meta")
        assert sum(p.numel() for p in model.parameters()) == COUNTS[arch]
        assert model.k == 32 and len(model.backbone.blocks) == 3

    @pytest.mark.parametrize("members", [(), (K,)])
    def test_the_package_loads_and_is_loaded(self, arch, members):
        """State dicts fit both ways; same first values, same outputs, gradients, dropout masks."""
        tabm = pytest.importorskip("tabm")
        torch.manual_seed(5)
        ours = TabM(arch_type=arch, **SIZES)
        torch.manual_seed(5)
        peer = tabm.TabM.make(arch_type=arch, **SIZES)
        for a, b in zip(peer.parameters(), ours.parameters(), strict=True):
            assert torch.equal(a, b)
        peer, ours = peer.double(), ours.double()
        ours.load_state_dict(peer.state_dict())
        peer.load_state_dict(ours.state_dict())
        assert_equal_runs(peer, ours, *rows(members), rtol=1e-11, atol=1e-12)

    def test_members_are_plain_networks(self, arch):
        model = make(arch).eval()
        inputs = rows()
        together = model(*inputs)
        for i in range(K):
            member = extract_member(model, i)
            torch.testing.assert_close(member(*inputs), together[:, i])
            kinds = {type(m) for m in member.modules()}
            assert nn.Linear in kinds and not any(hasattr(m, "members") for m in member.modules())
        numbers = make(arch, cat_cardinalities=None).eval()
        x = inputs[0]
        torch.testing.assert_close(to_deep_ensemble(numbers)(x), numbers(x).transpose(0, 1))

    def test_members_read_their_own_rows(self, arch):
        """A batch per member gives what each member gives on its batch."""
        model = make(arch).eval()
        x_num, x_cat = rows((K,))
        y = model(x_num, x_cat)
        for i in range(K):
            torch.testing.assert_close(y[:, i], model.member(i)(x_num[:, i], x_cat[:, i]))

    def test_pruning_keeps_the_chosen_members(self, arch):
        model = make(arch).eval()
        inputs, state = rows(), copy.deepcopy(model.state_dict())
        pruned = model.prune([2, 0, 2])
        assert pruned.k == pruned.members == 3
        torch.testing.assert_close(pruned(*inputs), model(*inputs)[:, [2, 0, 2]])
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        assert not own & {p.untyped_storage().data_ptr() for p in pruned.parameters()}

    def test_contract(self, arch):
        model = TabM(n_num_features=6, d_out=3, d_block=16, k=K, arch_type=arch).eval()
        check_layer(model, torch.randn(B, 6))

    def test_a_generator_decides_everything(self, arch):
        before = torch.get_rng_state()
        one, two = (make_with(arch, 3).state_dict() for _ in range(2))
        other = make_with(arch, 4).state_dict()
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert not torch.equal(one["output.weight"], other["output.weight"])
        assert torch.equal(before, torch.get_rng_state())


def make_with(arch, seed):
    return TabM(arch_type=arch, generator=torch.Generator().manual_seed(seed), **SIZES)


def test_start_of_the_factors():
    """One random sign per member and column of the table; all other factors are one."""
    model = make()
    r, s = model.backbone.blocks[0][0].r, model.backbone.blocks[0][0].s
    assert set(r.unique().tolist()) == {-1.0, 1.0} and torch.equal(s, torch.ones_like(s))
    assert torch.equal(r[:, 6], r[:, 7]) and torch.equal(r[:, 8], r[:, 10])
    assert (r[:, :6] != r[:1, :6]).any()
    for block in model.backbone.blocks[1:]:
        assert torch.equal(block[0].r, torch.ones_like(block[0].r))
    for block in model.backbone.blocks:
        assert torch.equal(block[0].bias, block[0].bias[:1].expand(K, -1))
    assert (model.output.bias != model.output.bias[:1]).any()


class Embedding(nn.Module):
    """[N, 6] -> [N, 6, 2]."""

    def get_output_shape(self):
        return torch.Size((6, 2))

    def forward(self, x):
        return torch.stack([x, x.square()], -1)


def test_embeddings_change_the_defaults():
    model = make(num_embeddings=Embedding())
    assert len(model.backbone.blocks) == 2 and model.start_scaling_init == "normal"
    assert model.backbone.blocks[0][0].in_features == 6 * 2 + 5
    r = model.backbone.blocks[0][0].r
    assert torch.equal(r[:, 0], r[:, 1]) and r.unique().numel() == K * 8
    assert model(*rows()).shape == model(*rows((K,))).shape == (B, K, 3)


@pytest.mark.parametrize("arch", ARCHS)
def test_categories_alone(arch):
    """Integer columns without numerical ones: tabm-packed of the package fails on them."""
    model = make(arch, n_num_features=0).eval()
    x_cat = rows()[1]
    torch.testing.assert_close(model(None, x_cat)[:, 1], model.member(1)(None, x_cat))


@pytest.mark.parametrize("arch", ARCHS)
def test_a_training_step_keeps_one_activation_per_block(arch):
    """relu and dropout keep their result, which the next layer keeps as its input."""
    model = TabM(n_num_features=6, d_out=1, d_block=64, n_blocks=4, k=32, arch_type=arch)
    activations = saved_bytes(model, torch.randn(64, 6)) // (64 * 32 * 64 * 4)
    assert activations <= (8 if arch == "tabm" else 4)  # where the op keeps x alone, 4 for all


@pytest.mark.parametrize("activation", ["ReLU", "SiLU"])
def test_activations_and_eval_mode(activation):
    model = make(activation=activation, dropout=0.5)
    inputs = rows()
    assert not torch.equal(model(*inputs), model(*inputs))
    assert torch.equal(model.eval()(*inputs), model(*inputs))


@pytest.mark.parametrize("hooked", [False, True])
def test_the_scale_can_be_replaced(hooked):
    """What stands in for it is called, and sees a row per member."""

    class Shifted(MemberScale):
        def forward(self, x):
            return super().forward(x) + 1

    model, x = make("tabm-mini", cat_cardinalities=None).eval(), rows()[0]
    for affine in (model.backbone.affine, Shifted((K, 6), dtype=torch.float64), nn.Identity()):
        model.backbone.affine = affine
        y = affine(x.unsqueeze(1).expand(-1, K, -1))
        for block in model.backbone.blocks:
            y = block(y)
        seen = []
        if hooked:
            affine.register_forward_hook(lambda m, x, y, seen=seen: seen.append(x[0].shape))
        torch.testing.assert_close(model(x), model.output(y))
        assert seen == [(B, K, 6)] * hooked


def test_our_tools_know_the_model():
    model = make("tabm-mini")
    (fast,) = param_groups(model, lr=0.1, fast_lr_mult=0.5)[1]["params"]
    assert fast is model.backbone.affine.weight
    logits = model.eval()(*rows()).transpose(0, 1)
    assert pair_diversity(logits).disagreement.shape == (K, K)
    picked = select_members(logits, torch.zeros(B, dtype=torch.long), 2, replacement=False)
    assert model.prune(picked.members).k == 2


def test_errors():
    for options, match in (
        ({"n_num_features": 0, "cat_cardinalities": []}, "must be not both empty"),
        ({"n_num_features": -1}, "n_num_features must be an integer of at least 0"),
        ({"cat_cardinalities": [2, 0]}, "cardinalities must be an integer of at least 1"),
        ({"arch_type": "mini"}, "arch_type must be one of"),
        ({"start_scaling_init": None}, "start_scaling_init must be one of"),
        ({"start_scaling_init": "normal", "arch_type": "tabm-packed"}, r"one of \(None,\)"),
        ({"activation": "Foo"}, "activation must be a class of torch.nn"),
        ({"k": 0}, "k must be an integer of at least 1"),
        ({"n_blocks": 0}, "n_blocks must be an integer of at least 1; got 0"),
        ({"num_embeddings": nn.Identity()}, "a module with get_output_shape"),
        ({"num_embeddings": Embedding(), "n_num_features": 5}, r"of output shape \(5, d\)"),
    ):
        with pytest.raises(ValueError, match=match):
            TabM(**{**SIZES, **options})
    model, (x_num, x_cat) = make(), rows()
    for inputs, match in (
        ((x_num,), "x_cat must be"),
        ((x_num[:, :5], x_cat), r"x_num must be \[B, 6\] or \[B, k, 6\] with k = 4"),
        ((x_num, x_cat[:3]), "x_cat must be of as many rows as x_num"),
        ((rows((3,))[0], x_cat), "x_num must be"),
    ):
        with pytest.raises(ValueError, match=match):
            model(*inputs)
    with pytest.raises(ValueError, match="x_num must be None where there are no such columns"):
        make(n_num_features=0)(x_num, x_cat)
    with pytest.raises(ValueError, match="members must be indices from 0 to 3"):
        model.prune([4])
    with pytest.raises(ValueError, match="i must be an integer from 0 to 3"):
        model.member(4)
