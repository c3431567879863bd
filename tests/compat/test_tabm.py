"""`compat.tabm` against the package itself, in float64: values, gradients, names, first values."""

import copy
import doctest
import io
import warnings

import pytest
import torch
from compat.peers import assert_equal_runs
from compat.peers import tabm as imported
from torch import nn

from landscape_fast.compat import accelerate_
from landscape_fast.compat import tabm as ours
from landscape_fast.nn import extract_member, saved_bytes
from landscape_fast.testing import check_layer

B, K, I, O = 5, 3, 4, 6
F64 = {"dtype": torch.float64}


@pytest.fixture
def peer():
    return imported()


def both(peer, name: str, *arguments, seed: int = 7, **options):
    """The same layer of both packages, made from the same random state."""
    made = []
    for module in (peer, ours):
        torch.manual_seed(seed)
        made.append(getattr(module, name)(*arguments, **options))
    return made


LAYERS = [
    ("LinearBatchEnsemble", (I, O), {"k": K, "scaling_init": "normal"}),
    ("LinearBatchEnsemble", (I, O, False), {"k": K, "scaling_init": ("random-signs", "normal")}),
    (
        "LinearBatchEnsemble",
        (I, O),
        {"k": K, "scaling_init": ("normal", "ones"), "first_scaling_init_chunks": [1, 3]},
    ),
    ("LinearEnsemble", (I, O), {"k": K}),
    ("LinearEnsemble", (I, 1, False), {"k": K}),
    ("LinearEnsemble", (I, 70), {"k": K}),  # beyond the few outputs with a path of their own
    ("ElementwiseAffine", ((K, I),), {"bias": True, "scaling_init": "normal"}),
    (
        "ElementwiseAffine",
        ((K, I),),
        {"bias": False, "scaling_init": "random-signs", "scaling_init_chunks": [2, 2]},
    ),
    ("BatchNorm1dEnsemble", (I,), {"k": K}),
    ("BatchNorm1dEnsemble", (I,), {"k": K, "affine": False, "momentum": 0.3}),
    ("LayerNormEnsemble", (I,), {"k": K}),
    ("LayerNormEnsemble", (I,), {"k": K, "elementwise_affine": False, "eps": 1e-3}),
]


@pytest.mark.parametrize("name, arguments, options", LAYERS)
def test_layers_are_those_of_the_package(peer, name, arguments, options):
    """Same names, same values from the same random state, same function and gradients."""
    one, two = both(peer, name, *arguments, **options, **F64)
    states = one.state_dict(), two.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    x = torch.randn(B, K, I, **F64)
    for mode in (True, False):
        assert_equal_runs(one.train(mode), two.train(mode), x)
    assert_equal_runs(one, two, x.transpose(0, 1).contiguous().transpose(0, 1))
    for attribute in ("k", "in_features", "out_features", "weight", "bias"):
        if hasattr(one, attribute):
            a, b = getattr(one, attribute), getattr(two, attribute)
            assert a is None and b is None or torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_members_may_share_the_memory_of_their_input(peer):
    """An expanded batch; its gradient is that of the batch, and of the expanded tensor itself."""
    one, two = both(peer, "LinearBatchEnsemble", I, O, k=K, scaling_init="normal", **F64)
    x = torch.randn(B, I, **F64)
    for view in (lambda t: t.unsqueeze(1).expand(-1, K, -1), lambda t: t.unsqueeze(1)):
        assert torch.allclose(one(view(x)), two(view(x)), rtol=1e-12)
        found = []
        for layer in (one, two):
            leaf = x.clone().requires_grad_()
            found += torch.autograd.grad(layer(view(leaf)).sin().sum(), leaf)
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)
    expanded = x.unsqueeze(1).expand(-1, K, -1)
    assert_equal_runs(one, two, expanded)
    leaves = [expanded.detach().requires_grad_() for _ in range(2)]
    grads = [
        torch.autograd.grad(layer(leaf).sin().sum(), leaf)[0]
        for layer, leaf in zip((one, two), leaves, strict=True)
    ]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-13)


def test_the_backward_of_a_shared_batch_keeps_no_copy_per_member():
    layer = ours.LinearBatchEnsemble(64, 8, k=32, scaling_init="ones")
    x = ours.EnsembleView(k=32)(torch.randn(16, 64))
    assert saved_bytes(layer, x) < x.numel() * x.element_size() / 4


BACKBONE = {"d_in": I, "n_blocks": 2, "d_block": O, "dropout": 0.3, "k": K}
SIZES = {"d_in": I, "n_blocks": 2, "d_block": O, "dropout": 0.3}
BACKBONES = [
    ("MLPBackbone", SIZES),
    ("MLPBackboneEnsemble", BACKBONE),
    ("MLPBackboneMiniEnsemble", BACKBONE | {"affine_bias": True, "affine_scaling_init": "normal"}),
    ("MLPBackboneMiniEnsemble", BACKBONE | {"affine_bias": False, "affine_scaling_init": "normal"}),
    (
        "MLPBackboneBatchEnsemble",
        BACKBONE
        | {"tabm_init": False, "scaling_init": "normal", "start_scaling_init_chunks": [1, 3]},
    ),
    (
        "make_tabm_backbone",
        BACKBONE
        | {"start_scaling_init": "random-signs", "start_scaling_init_chunks": [2, 2]}
        | {"activation": "SiLU"},
    ),
]


@pytest.mark.parametrize("name, options", BACKBONES)
def test_backbones_are_those_of_the_package(peer, name, options):
    one, two = (model.double() for model in both(peer, name, **options))
    assert list(one.state_dict()) == list(two.state_dict())
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    x = torch.randn(B, I, **F64) if name == "MLPBackbone" else torch.randn(B, K, I, **F64)
    assert_equal_runs(one, two, x)
    if name != "MLPBackbone":
        assert one.get_original_output_shape() == two.get_original_output_shape()
        assert one.k == two.k


def test_a_shift_reads_rows_of_all_members():
    backbone = ours.MLPBackboneMiniEnsemble(
        **BACKBONE, affine_bias=True, affine_scaling_init="normal"
    ).eval()
    x = torch.randn(B, I)
    torch.testing.assert_close(backbone(x), backbone(ours.ensemble_view(x, K, True)))


def replaced(function: str, **options):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.LayerNorm(3), nn.Linear(3, 2))
    getattr(ours, function)(model, **options)
    return [type(layer).__name__ for layer in model], model


class TestConversion:
    def test_each_function_replaces_its_layers(self):
        start = {"k": K, "scaling_init": "ones"}
        for function, options, kind, plain in (
            ("ensemble_linear_layers_", {"k": K}, "LinearEnsemble", "Linear"),
            ("batchensemble_linear_layers_", start, "LinearBatchEnsemble", "Linear"),
            ("ensemble_batchnorm1d_layers_", {"k": K}, "BatchNorm1dEnsemble", "BatchNorm1d"),
            ("ensemble_layernorm_layers_", {"k": K}, "LayerNormEnsemble", "LayerNorm"),
        ):
            before = ["Linear", "BatchNorm1d", "LayerNorm", "Linear"]
            assert replaced(function, **options)[0] == [kind if n == plain else n for n in before]

    def test_a_trained_network_keeps_its_function(self):
        """The package draws new weights and forgets statistics, scale and shift."""
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.LayerNorm(6), nn.Linear(6, 2))
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        model(torch.randn(50, 4))
        x = torch.randn(B, 4)
        expected = model.eval()(x)
        ours.batchensemble_linear_layers_(model, k=K, scaling_init="ones")
        ours.ensemble_batchnorm1d_layers_(model, k=K)
        ours.ensemble_layernorm_layers_(model, k=K)
        y = model.eval()(ours.ensemble_view(x, K, True))
        torch.testing.assert_close(y, expected.unsqueeze(1).expand(-1, K, -1))

    def test_normalisations_without_scale_and_shift(self, peer):
        """tabm's from_layernorm looks for running statistics that a LayerNorm never has."""
        plain = nn.LayerNorm(I, elementwise_affine=False)
        with pytest.raises(AttributeError):
            peer.LayerNormEnsemble.from_layernorm(plain, k=K)
        x = torch.randn(B, K, I)
        torch.testing.assert_close(ours.LayerNormEnsemble.from_layernorm(plain, k=K)(x), plain(x))
        without_shift = nn.LayerNorm(I, bias=False)
        layer = ours.LayerNormEnsemble.from_layernorm(without_shift, k=K)
        torch.testing.assert_close(layer(x), without_shift(x))
        norm = nn.BatchNorm1d(I, affine=False, track_running_stats=False)
        layer = ours.BatchNorm1dEnsemble.from_batchnorm1d(norm, k=K)
        torch.testing.assert_close(layer(x)[:, 1], norm(x[:, 1]))

    def test_a_layer_used_twice_stays_one_layer(self):
        shared = nn.Linear(3, 3)
        model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
        ours.ensemble_linear_layers_(model, k=K)
        assert model["a"][0] is model["b"][0] and isinstance(model["a"][0], ours.LinearEnsemble)

    def test_selections(self):
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
        first = model[0]
        with pytest.raises(ValueError, match="include must be None where exclude is given"):
            ours.ensemble_linear_layers_(model, k=K, include=[first], exclude=[first])
        with pytest.raises(ValueError, match="include must be a list of nn.Linear inside module"):
            ours.ensemble_linear_layers_(model, k=K, include=[nn.Linear(2, 3)])
        with pytest.raises(ValueError, match=r"around an nn.Linear, not one.*from_linear"):
            ours.ensemble_linear_layers_(first, k=K)
        ours.ensemble_linear_layers_(model, k=K, include=[first])
        assert [type(m).__name__ for m in model] == ["LinearEnsemble", "Linear"]


def test_doctests_of_the_package_run_on_our_classes(peer):
    """The examples of tabm's docstrings, with its names bound to ours."""
    names = {name: getattr(ours, name) for name in (*ours.__all__, "_OneHotEncoding")}
    globals_ = {**vars(peer), **names}
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    ran = 0
    for test in doctest.DocTestFinder().find(peer, "tabm", globs=globals_):
        ran += runner.run(test).attempted
    assert ran > 50 and runner.failures == 0


@pytest.mark.parametrize("name, arguments, options", [row for row in LAYERS if "Linear" in row[0]])
def test_contract_of_layers(name, arguments, options):
    check_layer(getattr(ours, name)(*arguments, **options).eval(), torch.randn(B, K, I))


def test_errors():
    layer = ours.LinearBatchEnsemble(I, O, k=K, scaling_init="ones")
    with pytest.raises(ValueError, match=r"x must be \[B, k, I\] with k = 3, I = 4"):
        layer(torch.zeros(B, K, I + 1))
    with pytest.raises(ValueError, match=r"x must be \[B, k, I\] with k = 3.*; got \[5, 2, 4\]"):
        layer(torch.zeros(B, 2, I))
    with pytest.raises(ValueError, match=r"x must be \[B, k, I\] with k = 3, I = 4; got \[5, 4\]"):
        ours.LinearEnsemble(I, O, k=K)(torch.zeros(B, I))
    with pytest.raises(ValueError, match=r"x must be \[..., 3, 4\]"):
        ours.ElementwiseAffine((K, I), bias=True, scaling_init="ones")(torch.zeros(B, I))
    with pytest.raises(ValueError, match=r"x must be \[B, k, F\] with k = 3"):
        ours.BatchNorm1dEnsemble(I, k=K)(torch.zeros(B, I))
    with pytest.raises(ValueError, match=r"x must be \[..., 3, 4\]"):
        ours.LayerNormEnsemble(I, k=K)(torch.zeros(B, I))
    with pytest.raises(ValueError, match="distribution must be one of"):
        ours.LinearBatchEnsemble(I, O, k=K, scaling_init="zeros")
    with pytest.raises(ValueError, match="chunks must be sizes that sum"):
        ours.ElementwiseAffine(
            (K, I), bias=False, scaling_init="normal", scaling_init_chunks=[1, 1]
        )
    with pytest.raises(ValueError, match="chunks must be None with distribution 'ones'"):
        ours.init_scaling_(torch.zeros(2, 2), "ones", [1, 1])
    with pytest.raises(ValueError, match=r"x must be \[B, k, D\] with k = 2"):
        ours.ensemble_view(torch.zeros(3, 4, 5), 2, True)
    with pytest.raises(ValueError, match=r"start_scaling_init must be one of \(None,\)"):
        ours.make_tabm_backbone(
            **BACKBONE,
            arch_type="tabm-packed",
            start_scaling_init="normal",
            start_scaling_init_chunks=None,
        )


def test_a_batch_per_member_in_evaluation_mode_warns():
    view = ours.EnsembleView(k=2)
    with pytest.warns(UserWarning, match="in evaluation mode"):
        view.eval()(torch.zeros(3, 2, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        view.train()(torch.zeros(3, 2, 4))


def test_our_tools_know_the_layers():
    """Members come out as plain layers; models travel through pickle and deepcopy."""
    model = ours.TabM(n_num_features=I, d_out=2, k=K, d_block=8, dropout=0.0).eval()
    assert isinstance(model.backbone.blocks[0][0], ours.LinearBatchEnsemble)
    assert isinstance(model.output, ours.LinearEnsemble)
    x = torch.randn(B, I)
    one = extract_member(model, 1)
    torch.testing.assert_close(one(x), model(x)[:, 1])
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (torch.load(buffer, weights_only=False), copy.deepcopy(model)):
        assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize("training", [True, False])
def test_what_is_fused_can_be_overridden(training):
    """Subclasses and patched instances are called; without them ReLU is part of the product."""

    class Doubled(ours.LinearBatchEnsemble):
        def forward(self, x):
            return 2 * super().forward(x)

    model = ours.TabM(n_num_features=I, d_out=None, k=K, d_block=8, n_blocks=1, dropout=0.5)
    layer, x = model.backbone.blocks[0][0], torch.randn(B, I)
    model.train(training)

    def run():
        torch.manual_seed(3)
        return model(x)

    before = run()
    layer.__class__ = Doubled
    torch.testing.assert_close(run(), 2 * before)
    layer.__class__ = ours.LinearBatchEnsemble
    layer.forward = lambda x: 3 * ours.LinearBatchEnsemble.forward(layer, x)
    torch.testing.assert_close(run(), 3 * before)
    del layer.forward
    torch.testing.assert_close(run(), before)


def by_hand(t, start, between=()):
    """Blocks of linear, ReLU and dropout without a backbone class."""
    rest = [nn.ReLU(), nn.Dropout(0.1)]
    layers = [layer for one in start for layer in (one, *rest)]
    return nn.Sequential(t.EnsembleView(k=K), *layers, *between, t.LinearEnsemble(O, 2, k=K))


def converted(t):
    backbone = t.MLPBackbone(d_in=I, n_blocks=3, d_block=O, dropout=0.1)
    t.ensemble_linear_layers_(backbone, k=K)
    return nn.Sequential(t.EnsembleView(k=K), backbone, t.LinearEnsemble(O, 2, k=K))


# What the README of the package builds with its parts, each a function of the module.
COMPOSED = {
    "packed": lambda t: by_hand(t, [t.LinearEnsemble(I, O, k=K), t.LinearEnsemble(O, O, k=K)]),
    "batch": lambda t: by_hand(
        t,
        [
            t.LinearBatchEnsemble(I, O, k=K, scaling_init=("normal", "ones")),
            t.LinearBatchEnsemble(O, O, k=K, scaling_init="ones"),
        ],
    ),
    "mini": lambda t: nn.Sequential(
        t.EnsembleView(k=K),
        t.ElementwiseAffine((K, I), bias=False, scaling_init="normal"),
        t.MLPBackbone(d_in=I, n_blocks=2, d_block=O, dropout=0.1),
        t.LinearEnsemble(O, 2, k=K),
    ),
    "all parts": lambda t: by_hand(
        t,
        [t.LinearBatchEnsemble(I, O, k=K, scaling_init=("random-signs", "ones"))],
        [
            t.BatchNorm1dEnsemble(O, k=K),
            t.LinearEnsemble(O, O, k=K),
            t.LayerNormEnsemble(O, k=K),
            nn.Linear(O, O),
            t.ElementwiseAffine((K, O), bias=True, scaling_init="normal"),
            t.MLPBackbone(d_in=O, n_blocks=2, d_block=O, dropout=0.1),
            t.MLPBackboneMiniEnsemble(
                d_in=O, n_blocks=2, d_block=O, dropout=0.1, k=K,
                affine_bias=False, affine_scaling_init="normal",
            ),
        ],
    ),
    "converted": converted,
}  # fmt: skip


@pytest.mark.parametrize("name", COMPOSED)
def test_networks_built_from_the_parts(peer, name):
    models = []
    for module in (peer, ours):
        torch.manual_seed(7)
        models.append(COMPOSED[name](module).double())
    one, two = models
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    assert list(one.state_dict()) == list(two.state_dict())
    assert_equal_runs(one, two, torch.randn(B, I, **F64))
    accelerated = accelerate_(copy.deepcopy(one))
    assert_equal_runs(one, accelerated, torch.randn(B, I, **F64))
