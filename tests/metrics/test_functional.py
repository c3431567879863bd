"""What holds for every measure: where it is found, what its page says, that no device is waited
for."""

import inspect
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

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


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_depends_on_values_on_the_host(name):
    """Of fake tensors there are shapes only: reading a value, as a device would have to, raises."""
    inputs = {
        "logits": torch.rand(3, 20, 4),
        "probabilities": torch.rand(20, 4),
        "targets": torch.zeros(20, dtype=torch.int64),
        "scores": torch.rand(20),
        "in_scores": torch.rand(20),
        "out_scores": torch.rand(7),
        "positive": torch.ones(20, dtype=torch.bool),
        "confidence": torch.rand(20),
        "right": torch.ones(20, dtype=torch.bool),
        "weights": torch.rand(3, 20),
        "labels": torch.zeros(3, 20, dtype=torch.int64),
        "matrix": torch.rand(3, 3),
        "risk": 0.1,
    }
    function = getattr(functional, name)
    mode = FakeTensorMode()
    fakes = {
        k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()
    }
    wanted = {k: v for k, v in fakes.items() if k in inspect.signature(function).parameters}
    with mode:
        found = function(**wanted)
    real = function(**{k: v for k, v in inputs.items() if k in wanted})
    for fake, one in zip(
        *(r if isinstance(r, tuple) else (r,) for r in (found, real)), strict=True
    ):
        assert fake.shape == one.shape and fake.dtype == one.dtype
