"""State dicts of other packages: into ours by name and orientation, and back bit for bit."""

import numpy as np
import pytest
import torch
from torch import nn

from landscape_fast import nn as lf
from landscape_fast.compat import tabm as compat_tabm
from landscape_fast.compat import torch_uncertainty as compat_tu
from landscape_fast.compat.edward2 import PEERS, from_peer, to_peer

M = 3
RANDOM = {"r_init": "normal", "s_init": "normal"}


def network() -> nn.Module:
    """Every kind of layer that all four packages can name."""
    return nn.ModuleDict(
        {
            "conv": lf.BatchEnsembleConv2d(4, 6, (3, 2), M, **RANDOM),
            "sequence": lf.BatchEnsembleConv1d(4, 5, 3, M, **RANDOM),
            "head": nn.Sequential(lf.BatchEnsembleLinear(6, 2, M, **RANDOM), nn.Linear(2, 3)),
        }
    )


@pytest.mark.parametrize("peer", PEERS)
def test_round_trips_are_exact(peer):
    state = network().state_dict()
    back = from_peer(to_peer(state, peer), peer)
    assert sorted(back) == sorted(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


class TestTensorFlow:
    def test_a_dense_layer_computes_the_same(self):
        """Kernel [I, O], alpha, gamma and ensemble_bias, computed with by their definition."""
        rng = np.random.default_rng(0)
        kernel, alpha = rng.normal(size=(4, 5)), rng.normal(size=(M, 4))
        gamma, bias = rng.normal(size=(M, 5)), rng.normal(size=(M, 5))
        names = ["d/kernel:0", "d/alpha:0", "d/gamma:0", "d/ensemble_bias:0"]
        state = dict(zip(names, (kernel, alpha, gamma, bias), strict=True))
        layer = lf.BatchEnsembleLinear(4, 5, M, dtype=torch.float64)
        layer.load_state_dict({k[2:]: v for k, v in from_peer(state, "edward2_tf").items()})
        x = rng.normal(size=(M, 6, 4))
        expected = ((x * alpha[:, None]) @ kernel) * gamma[:, None] + bias[:, None]
        np.testing.assert_allclose(layer(torch.tensor(x)).detach().numpy(), expected, rtol=1e-12)

    def test_a_convolution_computes_the_same(self):
        """Kernel [kh, kw, I, O] over images [N, H, W, I], one position at a time."""
        rng = np.random.default_rng(1)
        kernel = rng.normal(size=(2, 3, 4, 5))
        state = {"kernel": kernel, "alpha": np.ones((M, 4)), "gamma": np.ones((M, 5))}
        layer = lf.BatchEnsembleConv2d(4, 5, (2, 3), M, bias=False, dtype=torch.float64)
        layer.load_state_dict(from_peer(state, "edward2_tf"))
        image = rng.normal(size=(2, 3, 4))  # [H, W, I], as large as the kernel
        y = layer(torch.tensor(image).permute(2, 0, 1)[None])
        expected = np.einsum("hwi,hwio->o", image, kernel)
        np.testing.assert_allclose(y[0, 0, :, 0, 0].detach().numpy(), expected, rtol=1e-12)

    def test_rank_k(self):
        layer = lf.BatchEnsembleLinear(4, 5, M, rank=2, **RANDOM)
        there = to_peer(layer.state_dict(), "edward2_tf")
        assert there["alpha"].shape == (2, M, 4) and there["kernel"].shape == (4, 5)
        back = from_peer(there, "edward2_tf")
        assert all(torch.equal(back[k], v) for k, v in layer.state_dict().items())

    def test_a_depthwise_convolution(self):
        kernel = np.arange(3 * 3 * 4 * 2.0).reshape(3, 3, 4, 2)  # two outputs per channel
        state = {"depthwise_kernel": kernel, "alpha": np.ones((M, 4)), "gamma": np.ones((M, 8))}
        layer = lf.BatchEnsembleConv2d(4, 8, 3, M, groups=4, bias=False, dtype=torch.float64)
        layer.load_state_dict(from_peer(state, "edward2_tf"))
        x = torch.zeros(1, 4, 3, 3, dtype=torch.float64)
        x[0, 2, 1, 0] = 1  # one pixel of channel 2
        y = layer(x)[0, 0, :, 0, 0]
        assert y[4:6].tolist() == kernel[1, 0, 2].tolist() and not y[:4].any() and not y[6:].any()
        back = to_peer(layer.state_dict(), "edward2_tf")
        assert all(np.array_equal(back[name], value) for name, value in state.items())

    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize(
        "layer, inner",
        [
            (lambda **o: lf.HyperBatchLinear(4, 5, M, **o), "dense"),
            (lambda **o: lf.HyperBatchConv2d(4, 5, 3, M, **o), "conv2d"),
        ],
    )
    def test_hyper_batch_layers(self, layer, inner, tied):
        layer = layer(tie_factors=tied, **RANDOM)
        nn.init.normal_(layer.delta_bias)
        state = {f"top.{k}": v for k, v in layer.state_dict().items()}
        there = to_peer(state, "edward2_tf")
        names = {"alpha", "gamma", "bias", f"{inner}/kernel", f"{inner}/ensemble_bias"}
        names |= {f"delta_{inner}/kernel"} | (set() if tied else {"alpha_1", "gamma_1"})
        assert set(there) == {f"top/{name}" for name in names}
        assert np.array_equal(there["top/bias"], layer.delta_bias.detach().numpy())
        back = from_peer(there, "edward2_tf")
        assert all(torch.equal(back[name], state[name]) for name in state)

    def test_batch_normalisation(self):
        """Its gamma is no factor."""
        state = {f"bn/{n}:0": np.full(4, i) for i, n in enumerate(
            ("gamma", "beta", "moving_mean", "moving_variance"))}  # fmt: skip
        found = from_peer(state, "edward2_tf")
        assert {k: v[0].item() for k, v in found.items()} == {
            "bn.weight": 0,
            "bn.bias": 1,
            "bn.running_mean": 2,
            "bn.running_var": 3,
        }
        back = to_peer(found, "edward2_tf")
        assert {k: v[0] for k, v in back.items()} == {k[:-2]: v[0] for k, v in state.items()}


def test_flax_models_are_nested():
    state = {
        "Dense_0": {
            "kernel": np.zeros((4, 5)),
            "bias": np.zeros((M, 5)),
            "fast_weight_alpha": np.ones((M, 4)),
            "fast_weight_gamma": np.ones((M, 5)),
        },
        "LayerNorm_0": {"scale": np.ones(5), "bias": np.zeros(5)},
    }
    found = from_peer(state, "edward2_jax")
    layer = lf.BatchEnsembleLinear(4, 5, M)
    layer.load_state_dict({k.split(".")[1]: v for k, v in found.items() if "Dense" in k})
    nn.LayerNorm(5).load_state_dict({k.split(".")[1]: v for k, v in found.items() if "Norm" in k})


class TestTorch:
    def test_layers_of_compat_load(self):
        """What our stand-ins for the two packages write, our own layers read, and back."""
        pairs = [
            (compat_tu.BatchLinear(4, 5, M), lf.BatchEnsembleLinear(4, 5, M, layout="folded")),
            (
                compat_tu.BatchConv2d(4, 5, 3, M),
                lf.BatchEnsembleConv2d(4, 5, 3, M, layout="folded"),
            ),
            (
                compat_tu.BatchConvTranspose2d(4, 5, 3, M),
                lf.BatchEnsembleConvTranspose2d(4, 5, 3, M, layout="folded"),
            ),
        ]
        for theirs, own in pairs:
            own.load_state_dict(from_peer(theirs.state_dict(), "torch_uncertainty"))
            x = torch.randn(2 * M, 4, *(3,) * (own.weight.ndim - 2))
            torch.testing.assert_close(own(x), theirs(x))
            theirs.load_state_dict(to_peer(own.state_dict(), "torch_uncertainty"))
        theirs = compat_tabm.LinearBatchEnsemble(4, 5, k=M, scaling_init="normal")
        own = lf.BatchEnsembleLinear(4, 5, M, layout="batch_major")
        own.load_state_dict(from_peer(theirs.state_dict(), "tabm"))
        x = torch.randn(2, M, 4)
        torch.testing.assert_close(own(x), theirs(x))

    def test_transposed_convolutions_that_look_like_others(self):
        state = compat_tu.BatchConvTranspose2d(4, 4, 3, M).state_dict()
        state = {f"up.{k}": v for k, v in state.items()}
        ours = from_peer(state, "torch_uncertainty")
        back = to_peer(ours, "torch_uncertainty", transposed=["up"])
        assert back.keys() == state.keys()
        assert all(torch.equal(back[k], v) for k, v in state.items())
        assert "up.conv.weight" in to_peer(ours, "torch_uncertainty")


def test_errors():
    with pytest.raises(ValueError, match="from_peer: peer must be one of"):
        from_peer({}, "keras")
    with pytest.raises(ValueError, match="to_peer: peer must be one of"):
        to_peer({}, "keras")
    with pytest.raises(ValueError, match="one value per name; got two bias"):
        twice = {"a/bias": np.ones(2), "a/ensemble_bias": np.ones(2), "a/alpha": np.ones((2, 2))}
        from_peer(twice, "edward2_tf")
