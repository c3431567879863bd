"""What holds for every measure: where it is found, what its page says, that no device is waited
for."""

import inspect
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from landscape_fast import metrics
from landscape_fast.metrics import functional

SECTIONS = ["Args:", "Returns:", "Raises:", "Cost:", "Source:", "Example:"]
FUNCTIONS = [name for name in functional.__all__ if inspect.isfunction(getattr(functional, name))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_pages_are_complete(name):
    function = getattr(functional, name)
    assert getattr(metrics, name) is function and name in metrics.__all__
    text = inspect.getdoc(function)
    found = [line for line in re.findall(r"^\w+:", text, re.MULTILINE) if line in SECTIONS]
    assert found == SECTIONS
    for argument in inspect.signature(function).parameters:
        assert re.search(rf"^ +{argument}: ", text, re.MULTILINE), argument


def arguments(name):
    """Of the function with this name; random ones without ties where all classes occur."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    every = {
        "logits": normal(3, 20, 4),
        "probabilities": normal(20, 4).softmax(1),
        "targets": torch.arange(20) % 4,
        "scores": normal(20),
        "in_scores": normal(20),
        "out_scores": normal(7),
        "positive": normal(20) > 0,
        "confidence": normal(20),
        "right": normal(20) > 0,
        "weights": normal(3, 20),
        "labels": torch.arange(60).view(3, 20) % 7,
        "matrix": normal(3, 3),
        "risk": 0.1,
    }
    wanted = inspect.signature(getattr(functional, name)).parameters
    return {key: value for key, value in every.items() if key in wanted}


def outputs(name, inputs):
    found = getattr(functional, name)(**inputs)
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_depends_on_values_on_the_host(name):
    """Of fake tensors there are shapes only: reading a value, as a device would have to, raises."""
    mode, inputs = FakeTensorMode(), arguments(name)
    with mode:
        found = outputs(name, tree_map_only(torch.Tensor, mode.from_tensor, inputs))
    for fake, real in zip(found, outputs(name, inputs), strict=True):
        assert fake.shape == real.shape and fake.dtype == real.dtype


@pytest.mark.gpu
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_gpu_agrees_and_is_not_waited_for(name):
    inputs = arguments(name)
    there = tree_map_only(torch.Tensor, lambda t: t.cuda(), inputs)
    found = outputs(name, there)  # the first call may compile
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs(name, there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for got, expected in zip(found, outputs(name, inputs), strict=True):
        # float32 sums of some hundred terms, in another order
        torch.testing.assert_close(got.cpu(), expected, equal_nan=True, rtol=1e-5, atol=1e-6)
