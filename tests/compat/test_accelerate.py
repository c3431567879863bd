"""`accelerate_`: a live model of another package goes on as it was, with our arithmetic."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from compat import peers
from torch import nn

from landscape_fast.compat import accelerate_, restore_
from landscape_fast.compat._swap import Swapped
from landscape_fast.nn import saved_bytes

F64 = {"dtype": torch.float64}
ARCHS = ["tabm", "tabm-mini", "tabm-packed"]


@pytest.fixture
def tabm():
    return peers.tabm()


def make(tabm, arch="tabm", **options):
    torch.manual_seed(5)
    sizes = {"n_num_features": 6, "cat_cardinalities": [2, 3], "d_out": 4, "d_block": 16, "k": 5}
    return tabm.TabM.make(arch_type=arch, **{**sizes, **options}).double()


def rows(n=7, members=()):
    torch.manual_seed(6)
    x_cat = torch.stack([torch.randint(0, c, (n, *members)) for c in (2, 3)], -1)
    return torch.randn(n, *members, 6, **F64), x_cat


assert_same = partial(peers.assert_equal_runs, rtol=1e-11, atol=1e-12)


class TestTabM:
    @pytest.mark.parametrize("arch", ARCHS)
    @pytest.mark.parametrize("members", [(), (5,)])
    def test_outputs_and_gradients_are_equal(self, tabm, arch, members):
        plain = make(tabm, arch)
        fast = accelerate_(copy.deepcopy(plain))
        swapped = [m for m in fast.modules() if isinstance(m, Swapped)]
        assert len(swapped) == {"tabm": 5, "tabm-mini": 2, "tabm-packed": 5}[arch]
        for mode in (True, False):
            inputs = rows(members=members if mode else ())
            assert_same(plain.train(mode), fast.train(mode), *inputs)

    def test_nothing_of_the_model_is_exchanged(self, tabm):
        model = make(tabm)
        before = {name: id(p) for name, p in model.named_parameters()}
        modules, names, text = list(model.modules()), list(model.state_dict()), repr(model)
        optimizer = torch.optim.AdamW(model.parameters())
        model.eval()
        assert accelerate_(model) is model
        assert {name: id(p) for name, p in model.named_parameters()} == before
        assert list(model.modules()) == modules and list(model.state_dict()) == names
        assert repr(model) == text and not model.training
        assert isinstance(model.backbone, tabm.MLPBackboneBatchEnsemble)
        assert all(
            isinstance(block[0], tabm.LinearBatchEnsemble) for block in model.backbone.blocks
        )
        model(*rows()).square().mean().backward()
        old = model.output.weight.detach().clone()
        optimizer.step()
        assert not torch.equal(old, model.output.weight)

    def test_a_training_run_is_the_same_run(self, tabm):
        """Ten steps with momentum, from a checkpoint in the middle: parameters agree throughout."""
        plain = make(tabm)
        fast = accelerate_(copy.deepcopy(plain))
        optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (plain, fast)]
        inputs, target = rows(32), torch.randint(0, 4, (32,))
        for step in range(10):
            if step == 5:  # the checkpoint of one is read by the other
                fast.load_state_dict(plain.state_dict())
                optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
            for model, optimizer in zip((plain, fast), optimizers, strict=True):
                torch.manual_seed(step)
                logits = model(*inputs)
                loss = nn.functional.cross_entropy(
                    logits.flatten(0, 1), target.repeat_interleave(5)
                )
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            for a, b in zip(plain.parameters(), fast.parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)

    @pytest.mark.parametrize("arch", ARCHS)
    def test_copies_travel(self, tabm, arch):
        model = accelerate_(make(tabm, arch))
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twins = [copy.deepcopy(model), torch.load(buffer, weights_only=False)]
        twins += [pickle.loads(pickle.dumps(model, protocol)) for protocol in (2, 4)]
        for twin in twins:
            assert type(twin.output) is type(model.output)
            pairs = zip(peers.run(twin, *rows()), peers.run(model, *rows()), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)

    def test_it_can_be_undone(self, tabm):
        model = make(tabm)
        kinds = [type(m) for m in model.modules()]
        twice = accelerate_(accelerate_(model))
        assert sum(isinstance(m, Swapped) for m in twice.modules()) == 5
        assert [type(m) for m in restore_(model).modules()] == kinds

    @pytest.mark.parametrize("where", ["block", "layer", "relu", "dropout", "affine", "inner"])
    def test_hooks_see_what_they_saw(self, tabm, where):
        plain = make(tabm, "tabm-mini" if where in ("affine", "inner") else "tabm")
        fast = accelerate_(copy.deepcopy(plain))
        seen = []
        for model in (plain, fast):
            block, own = model.backbone.blocks[0], []
            layer, relu, dropout = block
            parts = {"block": block, "layer": layer, "relu": relu, "dropout": dropout}
            module = {**parts, "inner": layer, "affine": getattr(model.backbone, "affine", None)}[
                where
            ]
            module.register_forward_hook(lambda m, x, y, own=own: own.append((x[0], y)))
            module.register_full_backward_hook(lambda m, gx, gy, own=own: own.append((gy[0],)))
            peers.run(model, *rows())
            assert len(own) == 2
            seen.append([t.expand_as(u) for a in own for t, u in zip(a, a, strict=True)])
        for a, b in zip(*seen, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)

    def test_it_keeps_less_for_the_backward(self, tabm):
        """At most two activations per block, where tabm keeps five (three of the layer's)."""
        model = make(tabm, d_block=256, n_blocks=4, k=8).float()
        x_num, x_cat = rows(64)
        before = saved_bytes(model, x_num.float(), x_cat)
        assert saved_bytes(accelerate_(model), x_num.float(), x_cat) <= before / 2.5

    def test_what_must_not_change_does_not(self, tabm):
        """A subclass with its own forward, an instance with one, parametrised weights, meta."""

        class Mine(tabm.LinearEnsemble):
            def forward(self, x):
                return super().forward(x) + 1

        class Named(tabm.LinearEnsemble):
            pass

        mine, named = Mine(2, 3, k=4), Named(2, 3, k=4)
        patched = tabm.LinearEnsemble(2, 3, k=4)
        patched.forward = lambda x: x
        accelerate_(nn.ModuleList([mine, named, patched]))
        assert type(mine) is Mine and type(patched) is tabm.LinearEnsemble
        assert isinstance(named, Swapped) and isinstance(named, Named)

        layer = tabm.LinearBatchEnsemble(4, 4, k=2, scaling_init="normal").double()
        nn.utils.parametrizations.orthogonal(layer)
        twin = accelerate_(copy.deepcopy(layer))
        assert isinstance(twin, Swapped)
        x = torch.randn(3, 2, 4, **F64)
        torch.testing.assert_close(layer(x), twin(x))
        meta = accelerate_(make(tabm)).to("meta")
        assert meta(rows()[0].to("meta"), rows()[1].to("meta")).shape == (7, 5, 4)

    def test_compile_without_a_graph_break(self, tabm):
        plain = make(tabm, dropout=0.0)
        fast = torch.compile(accelerate_(copy.deepcopy(plain)), backend="aot_eager", fullgraph=True)
        assert_same(plain, fast, *rows())

    def test_our_own_layers_and_others_are_refused(self):
        with pytest.raises(ValueError, match="accelerate_: model must be a network with layers of"):
            accelerate_(nn.Linear(2, 3))
        with pytest.raises(TypeError, match="model must be an nn.Module; got int"):
            accelerate_(3)


TU = [
    ("BatchLinear", (5, 7, 3), {}, (6, 5)),
    ("BatchLinear", (5, 7, 3), {"bias": False}, (6, 5)),
    ("BatchConv1d", (4, 6, 3, 2), {"stride": 2, "padding": "valid", "groups": 2}, (4, 4, 9)),
    ("BatchConv2d", (4, 6, 3, 2), {"stride": 2, "padding": 1, "dilation": 2}, (4, 4, 9, 8)),
    ("BatchConv2d", (4, 4, 3, 2), {"groups": 4, "bias": False}, (4, 4, 9, 8)),
    (
        "BatchConvTranspose2d",
        (4, 6, 3, 2),
        {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2},
        (4, 4, 5, 6),
    ),
]


@pytest.mark.parametrize("name, arguments, options, shape", TU)
class TestTorchUncertainty:
    def test_outputs_and_gradients_are_equal(self, name, arguments, options, shape):
        """Also for rows that the members do not divide, by the rule of the package."""
        peer = peers.torch_uncertainty_layers()
        plain = getattr(peer, name)(*arguments, **options, **F64)
        fast = accelerate_(copy.deepcopy(plain))
        assert isinstance(fast, getattr(peer, name)) and isinstance(fast, Swapped)
        assert list(fast.state_dict()) == list(plain.state_dict())
        for n in (shape[0], shape[0] + 1, 2 * shape[0] - 1):
            assert_same(plain, fast, torch.randn(n, *shape[1:], **F64))

    def test_the_inner_layer_may_be_watched(self, name, arguments, options, shape):
        peer, calls = peers.torch_uncertainty_layers(), []
        layer = accelerate_(getattr(peer, name)(*arguments, **options, **F64))
        inner = next(layer.children())
        handle = inner.register_forward_hook(lambda *_: calls.append(1))
        layer(torch.randn(*shape, **F64))
        assert calls == [1]
        handle.remove()
        usual = inner.forward
        inner.forward = lambda x: calls.append(2) or usual(x)
        layer(torch.randn(*shape, **F64))
        assert calls == [1, 2]

    def test_copies_travel(self, name, arguments, options, shape):
        peer, x = peers.torch_uncertainty_layers(), torch.randn(*shape, **F64)
        layer = accelerate_(getattr(peer, name)(*arguments, **options, **F64))
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
