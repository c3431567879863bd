"""Which parameter gets which learning rate and weight decay, and what the optimiser makes of it."""

import pytest
import torch
from methods.problem import batch_ensemble, plain
from torch import nn

from landscape_fast.methods import TrainConfig, make_optimizer, param_groups
from landscape_fast.nn import BatchEnsembleConv2d, BatchEnsembleLinear

SETTINGS = {"lr": 0.1, "weight_decay": 0.01, "fast_lr_mult": 0.5, "fast_weight_decay": 0.002}


def network():
    """A convolution with r only, a norm, a layer with a shared bias, and one module used twice."""
    torch.manual_seed(0)
    twice = BatchEnsembleLinear(4, 4, members=3)
    return nn.ModuleDict(
        {
            "conv": BatchEnsembleConv2d(2, 4, 3, members=3, s=False, bias=False),
            "norm": nn.BatchNorm2d(4),
            "shared": BatchEnsembleLinear(4, 4, members=3, bias="shared"),
            "twice": nn.Sequential(twice, twice),
        }
    )


def placed(model, groups):
    """{name of a parameter: (lr, weight decay) of its group}; every parameter exactly once."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for group in groups:
        for p in group["params"]:
            assert names[id(p)] not in found
            found[names[id(p)]] = (group["lr"], group["weight_decay"])
    assert set(found) == set(names.values())
    return found


@pytest.mark.parametrize("member_bias", ["slow", "fast"])
def test_every_parameter_is_in_its_group(member_bias):
    model = network()
    found = placed(model, param_groups(model, **SETTINGS, member_bias=member_bias))
    fast, shared = (0.05, 0.002), (0.1, 0.01)
    factors = ["conv.r", "shared.r", "shared.s", "twice.0.r", "twice.0.s"]
    assert [name for name, where in found.items() if where == fast] == factors
    # decays like the shared parameters, whatever its learning rate; a shared bias is shared
    assert found["twice.0.bias"] == ((0.05, 0.01) if member_bias == "fast" else shared)
    rest = set(found) - {*factors, "twice.0.bias"}
    assert {found[name] for name in rest} == {shared} and "shared.bias" in rest


def test_a_plain_network_has_one_group():
    assert len(param_groups(plain(), lr=0.1, member_bias="fast")) == 1


def test_defaults_leave_the_factors_without_weight_decay():
    shared, fast = param_groups(batch_ensemble(), 0.1, 0.01)
    assert (shared["lr"], shared["weight_decay"]) == (0.1, 0.01)
    assert (fast["lr"], fast["weight_decay"]) == (0.1, 0.0)


class Foreign(nn.Module):
    """A module of somebody else that follows the protocol."""

    def __init__(self):
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3, 2))

    def fast_parameters(self):
        return [self.scale]


def test_any_module_can_name_its_fast_parameters():
    model = nn.Sequential(Foreign(), nn.Linear(2, 2))
    found = placed(model, param_groups(model, 0.1, fast_lr_mult=3.0))
    assert [name for name, (lr, _) in found.items() if lr == pytest.approx(0.3)] == ["0.scale"]


def test_what_is_no_parameter_of_the_model_is_refused():
    layer = Foreign()
    layer.fast_parameters = lambda: [nn.Parameter(torch.ones(1))]
    rule = r"param_groups: fast_parameters\(\) must be parameters of the model; got 1 others"
    with pytest.raises(ValueError, match=rule):
        param_groups(layer, 0.1)
    with pytest.raises(ValueError, match=r"param_groups: member_bias must be one of .*; got 'no'"):
        param_groups(plain(), 0.1, member_bias="no")


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("member_bias", ["slow", "fast"])
def test_one_step_moves_each_parameter_by_its_own_rate(kind, member_bias):
    """Against a single-group optimiser per parameter: the multiplier is no gradient scale."""
    config = TrainConfig(optimizer=kind, momentum=0.9, member_bias=member_bias, **SETTINGS)
    model, twin = network().double(), network().double()
    make = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[kind]
    extra = {"momentum": 0.9, "nesterov": True} if kind == "sgd" else {}
    rates = placed(twin, param_groups(twin, **SETTINGS, member_bias=member_bias))
    alone = [make([p], *rates[n][:1], weight_decay=rates[n][1], **extra)
             for n, p in twin.named_parameters()]  # fmt: skip
    together = make_optimizer(model, config)
    for _ in range(2):
        for net in (model, twin):
            for p in net.parameters():
                p.grad = p.detach().cos()
        together.step()
        for optimizer in alone:
            optimizer.step()
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


def test_the_keras_regulariser_is_twice_the_weight_decay():
    """One SGD step on loss + c * |w|^2 equals one with weight_decay = 2 c."""
    c, lr = 3e-2, 0.1
    model = nn.Linear(3, 2, bias=False).double()
    w = model.weight.detach().clone()
    x = torch.randn(5, 3, dtype=torch.float64)
    optimizer = torch.optim.SGD(param_groups(model, lr, weight_decay=2 * c))
    model(x).square().mean().backward()
    optimizer.step()
    v = w.clone().requires_grad_()
    ((x @ v.T).square().mean() + c * v.square().sum()).backward()
    torch.testing.assert_close(model.weight.detach(), w - lr * v.grad)
