"""What the ops of shared weights and rank-one factors have in common: graphs, and transforms."""

import sys

import pytest
import torch
from torch import nn
from torch.fx.experimental import symbolic_shapes

from landscape_fast import ops
from landscape_fast.ops._batch_ensemble_conv_nd import prepare, run_by_library

M, B, I, O = 3, 40, 8, 16
FACTORS = ((M, I), (M, O))
OPS = {  # op -> shapes of its arguments, how many of them are activations, and options
    "batch_ensemble_linear": (((M, B, I), (O, I), *FACTORS), 1, {}),
    "batch_ensemble_conv2d": (((M, B, I, 5, 5), (O, I, 3, 3), *FACTORS), 1, {"padding": 1}),
    "hyper_batch_linear": (((M, B, I), (M, B, O), (O, I), (O, I), *FACTORS), 2, {}),
    "hyper_batch_conv2d": (
        ((M, B, I, 5, 5), (M, B, O), (O, I, 3, 3), (O, I, 3, 3), *FACTORS),
        2,
        {"padding": 1},
    ),
}
STRICT = pytest.param(True, marks=pytest.mark.skipif(
    not hasattr(symbolic_shapes, "has_static_value"), reason="torch 2.8 can tell which size is free"
))  # fmt: skip


def conv1d(x, weight, r, s):
    options = (1, 0, 1, 1, "zeros", (0,), False)
    arguments = prepare("conv1d", (x, weight, r, s, None), options, "member_major", None)
    return run_by_library(*arguments, None)


class Layer(nn.Module):
    """An op with parameters of its own."""

    def __init__(self, name, function=None):
        super().__init__()
        shapes, self.inputs, self.options = OPS[name]
        self.function = function or getattr(ops, name)
        self.parts = nn.ParameterList([torch.randn(shape) for shape in shapes[self.inputs :]])

    def forward(self, x, *e):
        parts = list(self.parts)
        order = (x, *parts) if not e else (x, *parts[:2], *e, *parts[2:])
        return self.function(*order, **self.options)


def activations(name, examples):
    """x, and e where there is one."""
    shapes, inputs, _ = OPS[name]
    return [torch.randn(M, examples, *shape[2:]) for shape in shapes[:inputs]]


@pytest.mark.parametrize("strict", [False, STRICT])
@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_an_exported_graph_holds_for_every_free_size(name, gpu, strict, monkeypatch):
    """No estimate compares it, so none of them becomes a bound; on a GPU there are more of them."""
    layer = Layer(name)
    if gpu:
        page = sys.modules[layer.function.__module__]
        monkeypatch.setattr(page, "pick", lambda op, backend, tensor: "triton")
    size = {1: torch.export.Dim("examples", min=2, max=4096)}
    free = {"x": size} | ({"e": (size,)} if layer.inputs == 2 else {})
    arguments = tuple(activations(name, B))
    program = torch.export.export(layer, arguments, dynamic_shapes=free, strict=strict).module()
    reference = Layer(name, getattr(ops, name + "_reference"))
    reference.load_state_dict(layer.state_dict())
    for examples in (2, B, 300):
        arguments = activations(name, examples)
        torch.testing.assert_close(program(*arguments), reference(*arguments), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", [*OPS, "conv1d"])
def test_autocast_rounds_no_gradient_under_a_transform(name):
    """Those of float32 parameters are float32 sums of exact products, there too."""
    if name == "conv1d":
        function, inputs, options = conv1d, 1, {}
        shapes = ((M, B, I, 5), (O, I, 3), *FACTORS)
    else:
        function, (shapes, inputs, options) = getattr(ops, name), OPS[name]
    tensors = [torch.randn(shape) for shape in shapes]
    if inputs == 2:
        tensors = [tensors[0], *tensors[2:4], tensors[1], *tensors[4:]]
    weights = (1,) if inputs == 1 else (1, 2)

    def loss(*tensors):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return function(*tensors, **options).float().sum()

    found = torch.func.grad(loss, weights)(*tensors)
    for i in weights:
        tensors[i].requires_grad_()
    expected = torch.autograd.grad(loss(*tensors), [tensors[i] for i in weights])
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()  # rounding to bfloat16 leaves 1e-3
