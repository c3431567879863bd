"""Predicted bytes saved for the backward against measured ones, and against other libraries."""

import pytest
import torch
from torch import nn

from landscape_fast.models.tabm import TabM
from landscape_fast.nn import (
    BatchEnsembleConv2d,
    BatchEnsembleLinear,
    BatchEnsembleMultiheadAttention,
    EnsembleBatchNorm2d,
    EnsembleLayerNorm,
)
from landscape_fast.nn.memory import activation_memory, saved_bytes

FLOAT = 4


class Residual(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return (x + self.layers(x)).relu()


def mlp():
    layers = [BatchEnsembleLinear(20, 64, 8, layout="batch_major"), nn.ReLU(), nn.Dropout(0.1)]
    layers += [BatchEnsembleLinear(64, 64, 8, layout="batch_major"), nn.GELU(), nn.LayerNorm(64)]
    return nn.Sequential(*layers, BatchEnsembleLinear(64, 3, 8, layout="batch_major"))


def conv():
    def layer(i, o, **options):
        return BatchEnsembleConv2d(i, o, 3, 4, padding=1, layout="folded", **options)

    return nn.Sequential(
        layer(3, 16),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Residual(layer(16, 16, bias=False), EnsembleBatchNorm2d(16, 4, layout="folded")),
        nn.MaxPool2d(2),
        layer(16, 24, stride=2, groups=8),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        BatchEnsembleLinear(24, 10, 4, layout="folded"),
    )


def transformer():
    return nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)


MODELS = {
    "mlp": (mlp, (37, 20)),
    "tabm": (lambda: TabM(n_num_features=20, d_out=3, d_block=64, k=8), (37, 20)),
    "conv": (conv, (12, 3, 17, 17)),
    "transformer": (transformer, (6, 11, 32)),
}


@pytest.mark.parametrize("mode", ["float32", "autocast", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_within_five_percent_of_what_is_measured(name, mode, device):
    make, shape = MODELS[name]
    model = make().to(device).train(mode != "eval")
    x = torch.randn(shape, device=device)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=mode == "autocast"):
        measured = saved_bytes(model, x)
        assert activation_memory(model, x) == pytest.approx(measured, rel=0.05)
        meta = torch.empty(shape, device="meta")
        assert activation_memory(model, meta) == pytest.approx(measured, rel=0.05)
    assert measured >= x.nbytes / 2


def test_predicting_changes_nothing_and_takes_no_memory():
    model = mlp()
    state = {k: t.clone() for k, t in model.state_dict().items()}
    random = torch.get_rng_state()
    huge = torch.empty(2**34, 20, device="meta")  # 32 TiB in the first layer alone
    assert activation_memory(model, huge) > 2**34 * 8 * 64 * FLOAT
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(state[k], t) for k, t in model.state_dict().items())
    assert all(p.grad is None and p.is_leaf for p in model.parameters())


def test_batch_norm_statistics_are_not_touched():
    model, (_, shape) = conv(), MODELS["conv"]
    activation_memory(model, torch.empty(shape, device="meta"))
    assert model[1].num_batches_tracked == 0 and not model[1].running_mean.any()


def test_a_layer_keeps_its_input_alone():
    M, B, I, O = 32, 256, 64, 48
    x = torch.randn(B, M, I)
    layer = BatchEnsembleLinear(I, O, M, layout="batch_major")
    assert activation_memory(layer, x) == saved_bytes(layer, x) == M * B * I * FLOAT
    assert activation_memory(layer, x[:, 0].contiguous()) == B * I * FLOAT  # shared by the members
    x = torch.randn(2 * 6, 8, 9, 9)
    layer = BatchEnsembleConv2d(8, 8, 3, 2, layout="folded")
    assert activation_memory(layer, x) == saved_bytes(layer, x) == x.nbytes


def test_a_third_of_tabm():
    tabm = pytest.importorskip("tabm")
    M, B, I, O = 32, 256, 64, 64
    x = torch.randn(B, M, I)
    theirs = tabm.LinearBatchEnsemble(I, O, k=M, scaling_init="ones")
    ours = BatchEnsembleLinear(I, O, M, layout="batch_major")
    assert activation_memory(theirs, x) == saved_bytes(theirs, x)
    assert 3 * saved_bytes(ours, x) <= saved_bytes(theirs, x)


def test_other_layers_of_this_library():
    norm, x = EnsembleLayerNorm(16, 3), torch.randn(3, 5, 16)
    assert activation_memory(norm, x) == pytest.approx(saved_bytes(norm, x), rel=0.05)
    attention = BatchEnsembleMultiheadAttention(16, 2, members=3)
    x = torch.randn(7, 6, 16)
    assert activation_memory(attention, x, x, x) == pytest.approx(
        saved_bytes(attention, x, x, x), rel=0.05
    )


def test_parameters_are_not_counted():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight  # tied
    x = torch.randn(3, 4)
    assert activation_memory(model, x) == saved_bytes(model, x) == 2 * 3 * 4 * FLOAT
    assert saved_bytes(lambda x: model(x), x) == 2 * 3 * 4 * FLOAT
    assert saved_bytes(lambda x: x * 2, x) == 0


def test_a_storage_counts_once_and_whole():
    x = torch.randn(3, 4)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))  # y of ReLU is kept twice
    assert activation_memory(model, x) == saved_bytes(model, x) == (3 * 4 + 3 * 5) * FLOAT

    layer = nn.Linear(2, 2)
    assert saved_bytes(lambda x: layer(x[:, 1:3]), x) == x.nbytes  # a view keeps what it views


class _Depends(nn.Module):
    def forward(self, x):
        return x[x > 0].sum() * x if x.sum().item() > 0 else x


def test_refuses():
    text = "activation_memory: model must be an nn.Module; got function"
    with pytest.raises(TypeError, match=text):
        activation_memory(lambda x: x, torch.ones(2))
    text = "activation_memory: model must be computable from shapes alone; got DataDependent"
    with pytest.raises(ValueError, match=text):
        activation_memory(_Depends(), torch.ones(2))
