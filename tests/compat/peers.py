"""The packages that the compat classes stand in for, where they are installed."""

import importlib.metadata
import importlib.util
import sys
import types

import pytest
import torch
from torch import nn

TU_LAYERS = "torch_uncertainty.layers.batch_ensemble"


def tabm():
    """The package `tabm`, or a skip."""
    return pytest.importorskip("tabm")


def torch_uncertainty_layers():
    """Its module of BatchEnsemble layers alone, or a skip.

    Importing the package itself would need torchvision, lightning and more; this file needs einops.
    """
    pytest.importorskip("einops")
    if TU_LAYERS in sys.modules:
        return sys.modules[TU_LAYERS]
    try:
        package = importlib.metadata.distribution("torch_uncertainty")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("torch_uncertainty is not installed")
    path = package.locate_file("torch_uncertainty/layers/batch_ensemble.py")
    for name in ("torch_uncertainty", "torch_uncertainty.layers"):  # pickle asks for the parents
        sys.modules.setdefault(name, types.ModuleType(name))
    spec = importlib.util.spec_from_file_location(TU_LAYERS, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[TU_LAYERS] = module  # under its own name, by which accelerate_ knows its classes
    spec.loader.exec_module(module)
    return module


def run(model: nn.Module, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of all floating inputs and parameters."""
    own = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    torch.manual_seed(11)  # the same dropout masks
    y = model(*own)
    wanted = [x for x in own if x.requires_grad] + list(model.parameters())
    return [y, *torch.autograd.grad(y.sin().sum(), wanted)]


def assert_equal_runs(one, two, *inputs: torch.Tensor, rtol=1e-12, atol=1e-13) -> None:
    """What two models compute and all their gradients agree to rounding."""
    for a, b in zip(run(one, *inputs), run(two, *inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
