"""StackedEnsemble against M separate networks: results, gradients, buffers, training steps."""

import copy
import pickle
import warnings

import pytest
import torch
from nn.stacked_networks import NETWORKS, SEEDS, B, M, Own, Tied, image, networks, separately
from torch import nn

from landscape_fast.models import MLP, SmallCNN
from landscape_fast.nn import StackedEnsemble, extract_member
from landscape_fast.testing import assert_as_exact

# Batched, what a module returns in memory of another order than row by row (attention) is folded
# in that order, so that the same random numbers fall on other elements.
OTHER_MASKS = {("transformer", "batched")}


def gradients_of(stack, separate):
    """Pairs of stacked gradients, and those of separate networks, by name."""
    named = [dict(network.named_parameters()) for network in separate]
    for name, own in stack.model.named_parameters():
        yield name, own.grad, torch.stack([one[name].grad for one in named])


def check_state(stack, separate):
    """Parameters and buffers, also of single members taken out."""
    for i, network in enumerate(separate):
        taken = stack.member(i).state_dict()
        assert list(taken) == list(network.state_dict())
        for name, value in network.state_dict().items():
            torch.testing.assert_close(taken[name], value, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("how", ["batched", "loop"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_separate_networks(name, train, how):
    build, rows = NETWORKS[name]
    x = rows()
    found = networks(build, train)
    stack = StackedEnsemble(found, how=how).seed_members_(SEEDS)
    if train and (name, how) in OTHER_MASKS:
        for name, module in list(found[0].named_modules()):
            if isinstance(module, nn.Dropout):
                for network in [*found, stack.model]:
                    network.get_submodule(name).eval()
    separate, truth = separately(found, x)
    y = stack(x)
    torch.testing.assert_close(y, truth)
    incoming = torch.randn_like(y)
    y.backward(incoming)
    truth.backward(incoming)
    for key, got, want in gradients_of(stack, separate):
        torch.testing.assert_close(got, want, msg=lambda text, k=key: f"{k}: {text}")
    check_state(stack, separate)


@pytest.mark.parametrize("name", ["resnet", "sequence", "transformer", "words"])
def test_a_member_that_is_not_finite_touches_no_other(name):
    """Bit for bit: results, gradients, statistics."""
    build, rows = NETWORKS[name]
    x = rows()
    x = x.float() if x.is_floating_point() else x
    stack = StackedEnsemble(networks(build, True, torch.float32), how="batched")
    stack(x)
    broken = copy.deepcopy(stack)
    with torch.no_grad():
        for t in broken.state_dict().values():
            if t.is_floating_point():
                t[1] = torch.nan
    found = []
    for one in (stack, broken):
        y = one.seed_members_(SEEDS)(x)
        y.flatten(1).sum(1).sum().backward()
        found.append([y, *[p.grad for p in one.parameters()], *one.buffers()])
    assert found[1][0][1].isnan().all()
    for got, want in zip(*found, strict=True):
        assert torch.equal(got[[0, 2]], want[[0, 2]])


@pytest.mark.parametrize("name", ["mlp", "resnet", "tied"])
def test_own_rows_for_every_member(name):
    build, _ = NETWORKS[name]
    x = torch.stack([NETWORKS[name][1]() for _ in range(M)])
    found = networks(build, False)
    for how in ("batched", "loop"):
        torch.testing.assert_close(
            StackedEnsemble(found, how=how)(x, own=True), separately(found, x, own=True)[1]
        )


@pytest.mark.parametrize("how", ["batched", "loop"])
def test_trains_as_separate_networks_do(how):
    """Three steps of two optimisers: one over the stack, one per network."""
    for kind, options in ((torch.optim.SGD, {"momentum": 0.9}), (torch.optim.Adam, {})):
        found = networks(NETWORKS["resnet"][0], True)
        stack = StackedEnsemble(found, how=how).seed_members_(SEEDS)
        steps = [(NETWORKS["resnet"][1](), torch.randn(B, 10).double()) for _ in range(3)]
        optimizer = kind(stack.parameters(), lr=0.01, weight_decay=0.1, **options)
        for x, target in steps:
            optimizer.zero_grad()
            (stack(x) - target).square().mean((1, 2)).sum().backward()
            optimizer.step()
        for m, network in enumerate(found):
            torch.manual_seed(SEEDS[m])
            optimizer = kind(network.parameters(), lr=0.01, weight_decay=0.1, **options)
            for x, target in steps:
                optimizer.zero_grad()
                (network(x) - target).square().mean().backward()
                optimizer.step()
        check_state(stack, found)


def test_names_ties_and_state_dicts():
    found = networks(Tied, False)
    stack = StackedEnsemble(found)
    names = [name for name, _ in found[0].named_parameters()]
    assert [name for name, _ in stack.model.named_parameters()] == names
    assert stack.model.a.weight is stack.model.b.weight and stack.model.a.weight.shape == (M, 6, 6)
    plain = stack.member(1)
    assert plain.a.weight is plain.b.weight and plain.c is plain.again
    other = StackedEnsemble(networks(Tied, False))
    other.load_state_dict(stack.state_dict())
    x = image(6)
    assert torch.equal(other(x), stack(x))
    again = StackedEnsemble(stack.networks())
    assert torch.equal(again(x), stack(x))
    plain.a.weight.data.zero_()  # a copy
    assert torch.equal(again(x), stack(x))


def test_persistence_of_buffers_is_kept():
    class Buffers(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("kept", torch.randn(6).double())
            self.register_buffer("made", torch.randn(6).double(), persistent=False)

        def forward(self, x):
            self.kept = self.kept + 1  # set anew, not changed in place
            return x * self.kept + self.made

    found = [Buffers() for _ in range(M)]
    x = image(6)
    for how in ("batched", "loop"):
        stack = StackedEnsemble(found, how=how)
        assert [key for key in stack.state_dict() if "model" in key] == ["model.kept"]
        separate, truth = separately(found, x)
        torch.testing.assert_close(stack(x), truth)
        check_state(stack, separate)


@pytest.mark.parametrize("how", ["batched", "loop"])
def test_modes_are_those_of_the_modules(how):
    found = networks(NETWORKS["resnet"][0], True)
    for network in found:
        network.norm.eval()
    stack = StackedEnsemble(found, how=how).seed_members_(SEEDS)
    x = NETWORKS["resnet"][1]()
    separate, truth = separately(found, x)
    torch.testing.assert_close(stack(x), truth)
    check_state(stack, separate)
    plain = stack.eval().member(0)
    assert not any(module.training for module in plain.modules())
    stack.model.norm.train()
    assert stack.member(2).norm.training and not stack.member(2).stem.training


@pytest.mark.parametrize("how", ["batched", "loop"])
def test_frozen_parameters_stay_frozen(how):
    found = networks(NETWORKS["mlp"][0], False)
    for network in found:
        network.layers[1].requires_grad_(False)
    stack = StackedEnsemble(found, how=how)
    stack(image(6)).sum().backward()
    assert stack.model.layers[1].weight.grad is None and stack.model.layers[0].weight.grad.any()
    assert not stack.member(0).layers[1].weight.requires_grad


@pytest.mark.parametrize("how", ["batched", "loop"])
def test_other_weights(how):
    found = networks(NETWORKS["resnet"][0], False)
    stack = StackedEnsemble(networks(NETWORKS["resnet"][0], False), how=how)
    stack.load_state_dict(StackedEnsemble(found).state_dict())
    weights = {name: (1.1 * p).detach() for name, p in stack.model.named_parameters()}
    weights = {name: w.requires_grad_() for name, w in weights.items() if "norm1" not in name}
    x = NETWORKS["resnet"][1]()
    with torch.no_grad():
        for network in found:
            for name, p in network.named_parameters():
                p.mul_(1.1 if name in weights else 1)
    separate, truth = separately(found, x)
    y = stack.run(weights, x)
    torch.testing.assert_close(y, truth)
    y.sum().backward()
    truth.sum().backward()
    assert stack.model.stem.weight.grad is None
    for name, w in weights.items():
        want = torch.stack([dict(network.named_parameters())[name].grad for network in separate])
        torch.testing.assert_close(w.grad, want)


class Several(nn.Module):
    """A dictionary in; a tuple, numbers and a list out."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(5, 4)

    def forward(self, x):
        y = self.a(x["left"]) + self.b(x["right"][0])
        return y, {"rows": [y.tanh()], "name": "several"}


def test_nested_inputs_and_results():
    found = networks(Several, False)
    x = {"left": image(6), "right": (image(5),)}
    for how in ("batched", "loop"):
        y, more = StackedEnsemble(found, how=how)(x)
        truth = [network(x) for network in found]
        torch.testing.assert_close(y, torch.stack([one[0] for one in truth]))
        rows = torch.stack([one[1]["rows"][0] for one in truth])
        torch.testing.assert_close(more["rows"][0], rows)
        assert more["name"] == "several"


def small():
    layers = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)
    return nn.Sequential(*layers)


@pytest.mark.parametrize("how", ["batched", "loop"])
def test_compiles(how):
    torch._dynamo.reset()
    stack = StackedEnsemble(networks(small, True), how=how)
    other = copy.deepcopy(stack)
    x = image(1, 4, 4)
    y = torch.compile(stack, backend="aot_eager", fullgraph=True)(x)
    truth = other(x)
    torch.testing.assert_close(y, truth)
    y.square().sum().backward()
    truth.square().sum().backward()
    for own, want in zip(stack.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(own.grad, want.grad)
    for own, want in zip(stack.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(own, want)


@pytest.mark.parametrize("how", ["batched", "loop"])
def test_autocast_and_memory_formats(how):
    found = networks(lambda: SmallCNN((1, 8, 8), dropout=0), True, torch.float32)
    stack = StackedEnsemble(found, how=how)
    x = torch.randn(B, 1, 8, 8)
    truth = torch.stack([copy.deepcopy(network).double()(x.double()) for network in found])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, plain = stack(x), torch.stack([network(x) for network in found])
    assert y.dtype == plain.dtype
    assert_as_exact("autocast", y, plain, truth)
    plain = torch.stack([network(x) for network in found])
    strided = torch.empty(*x.shape, 2)[..., 0].copy_(x)
    for rows in (x.to(memory_format=torch.channels_last), strided, x.expand(B, 1, 8, 8)):
        assert_as_exact("memory format", stack(rows), plain, truth)
    assert stack(x[:0]).shape == (M, 0, 10)


def test_copies_and_pickles():
    stack = StackedEnsemble(networks(NETWORKS["part"][0], False))
    x = image(6)
    for other in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):  # our own bytes
        assert torch.equal(other(x), stack(x))
        with torch.no_grad():
            other.model.layers[1].scale.zero_()
        assert not torch.equal(other(x), stack(x))


def test_members_can_be_taken_out_as_of_any_ensemble():
    stack = StackedEnsemble(networks(Own, False))
    x = image(6)
    torch.testing.assert_close(extract_member(stack, 1)(x), stack(x)[1])


def test_copies_of_one_network():
    network = MLP(6, (5,), 3)
    x = torch.randn(B, 6)
    stack = StackedEnsemble.like(network, M)
    torch.testing.assert_close(stack(x), network(x).expand(M, B, 3))
    stack.model.layers[0].weight.data.zero_()
    assert network.layers[0].weight.any()


class TestAuto:
    def test_chooses_by_device_layers_and_rows(self):
        linear = StackedEnsemble(networks(NETWORKS["mlp"][0], False, torch.float32))
        rows = torch.randn(2000, 6)
        assert linear.runs(rows[:300]) == "batched" and linear.runs(rows) == "loop"
        with torch.no_grad():
            assert linear.runs(rows[:300]) == "loop"
        assert StackedEnsemble.like(MLP(6, (5,), 3), 1).runs(rows[:4]) == "loop"
        convolutions = StackedEnsemble(networks(NETWORKS["vgg"][0], False))
        assert convolutions.runs(NETWORKS["vgg"][1]()) == "loop"
        assert StackedEnsemble(networks(Own, False)).looped == [""]
        part = StackedEnsemble(networks(NETWORKS["part"][0], False), how="batched")
        assert part.looped == ["layers.1"] and part.runs(image(6)) == "batched"

    @pytest.mark.parametrize("kind", ["rows", "noise", "reader"])
    def test_what_cannot_be_batched_is_found_out(self, kind):
        class Unfit(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(6, 6)

            def forward(self, x):
                if kind == "rows":  # mixes the rows of a batch
                    return x - self.layer(x).mean(0)
                if kind == "noise":  # draws, where no layer tells
                    return nn.functional.dropout(self.layer(x))
                return x @ self.layer.weight  # reads what it could call

        found = networks(Unfit, True)
        x = image(6)
        with pytest.warns(UserWarning, match="a loop"):
            stack = StackedEnsemble(found).seed_members_(SEEDS)
            torch.testing.assert_close(stack(x), separately(found, x)[1])
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # once
            stack(x)
        with pytest.raises(ValueError, match="networks must be one whose rows can be batched"):
            StackedEnsemble(found, how="batched")(x)
        state = torch.get_rng_state()
        with pytest.warns(UserWarning, match="a loop"):
            assert StackedEnsemble(found).runs(x) == "loop"
        assert torch.equal(torch.get_rng_state(), state)  # trying draws for itself

    def test_numbers_without_rows_are_of_all_members(self):
        class Scaled(nn.Sequential):
            def forward(self, x):
                return super().forward(x["rows"]) * x["by"]

        found = [Scaled(nn.Linear(6, 2)).double() for _ in range(M)]
        x = {"by": torch.tensor(2.0), "rows": image(6)}
        with pytest.warns(UserWarning, match="a loop"):
            y = StackedEnsemble(found)(x)
        torch.testing.assert_close(y, torch.stack([network(x) for network in found]))
        own = {"by": torch.arange(1.0, M + 1), "rows": x["rows"].expand(M, B, 6)}
        with pytest.warns(UserWarning, match="a loop"):
            z = StackedEnsemble(found)(own, own=True)
        torch.testing.assert_close(z, y / 2 * own["by"].view(M, 1, 1))
