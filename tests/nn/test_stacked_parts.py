"""StackedEnsemble: random streams, hooks and parametrisations, statistics, what it refuses."""

import copy
import pickle

import pytest
import torch
from nn.stacked_networks import SEEDS, B, M, Own, networks, separately
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

from landscape_fast.models import MLP, ResNet
from landscape_fast.nn import ReLUDropout, StackedEnsemble, recalibrate_, statistics_mode_

DROPOUTS = {
    "dropout": (nn.Dropout(0.3), (5, 6)),
    "images": (nn.Dropout(0.3), (4, 6, 6)),
    "1d": (nn.Dropout1d(0.3), (4, 6)),
    "2d": (nn.Dropout2d(0.3), (4, 3, 3)),
    "3d": (nn.Dropout3d(0.3), (4, 2, 3, 3)),
    "alpha": (nn.AlphaDropout(0.3), (5, 6)),
    "feature alpha": (nn.FeatureAlphaDropout(0.3), (4, 3, 3)),
    "relu": (ReLUDropout(0.3), (5, 6)),
    "rrelu": (nn.RReLU(), (5, 6)),
    "none": (nn.Dropout(0.0), (5,)),
    "all": (nn.Dropout(1.0), (5,)),
}


class TestStreams:
    @pytest.mark.parametrize("how", ["batched", "loop"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("kind", DROPOUTS)
    def test_masks_are_those_of_separate_runs(self, kind, dtype, how):
        """Bit for bit, also in the second step, with and without a gradient."""
        layer, shape = DROPOUTS[kind]
        stack = StackedEnsemble([layer] * M, how=how).seed_members_(SEEDS)
        x = torch.randn(B, *shape).to(dtype)
        formats = [x, x.clone().requires_grad_()]
        if len(shape) == 3:
            formats.append(x.to(memory_format=torch.channels_last))
        own = [torch.Generator().manual_seed(seed) for seed in SEEDS]
        for rows in formats:
            y = stack(rows)
            for m, generator in enumerate(own):
                torch.default_generator.set_state(generator.get_state())
                truth = layer(rows)
                generator.set_state(torch.default_generator.get_state())
                assert torch.equal(y[m], truth)

    @pytest.mark.parametrize("how", ["batched", "loop"])
    def test_streams_are_the_members_own(self, how):
        layer, x = nn.Dropout(0.5), torch.ones(B, 50)
        stack = StackedEnsemble([layer] * M, how=how).seed_members_(SEEDS)
        before = torch.get_rng_state()
        y = stack(x)
        assert torch.equal(torch.get_rng_state(), before)  # the caller's generator rests
        other = StackedEnsemble([layer] * 2, how=how).seed_members_([SEEDS[2], SEEDS[0]])
        assert torch.equal(other(x), y[[2, 0]])
        state = stack.streams.state()
        copies = [copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))]
        second = stack(x)
        assert not torch.equal(second, y)
        stack.streams.load(state)
        for one in (stack, *copies):
            assert torch.equal(one(x), second)
        stack.seed_members_([])
        torch.manual_seed(3)
        found = stack(x)
        torch.manual_seed(3)
        plain = layer(x.expand(M, B, 50)) if how == "batched" else [layer(x) for _ in SEEDS]
        assert torch.equal(found, torch.stack(list(plain)))

    @pytest.mark.parametrize("how", ["batched", "loop"])
    @pytest.mark.parametrize("layer", [nn.Dropout(0.5), ReLUDropout(0.5)], ids=repr)
    @pytest.mark.parametrize("seeds", [SEEDS, []], ids=["streams", "global"])
    def test_another_rate_holds_from_then_on(self, seeds, layer, how):
        network = nn.Sequential(layer, nn.BatchNorm1d(50))
        stack = StackedEnsemble([network] * M, how=how).seed_members_(seeds)
        x = torch.rand(B, 50)
        stack(x)
        stack.model[0].p, stack.model[1].momentum = 0.0, 0.5
        stack.model[1].reset_running_stats()
        stack(x)
        torch.testing.assert_close(stack.model[1].running_mean, x.mean(0).expand(M, 50) / 2)
        assert stack.member(1)[0].p == 0 and stack.member(1)[1].momentum == 0.5

    def test_a_device_that_is_not_there_is_left_out(self, monkeypatch):
        stack = StackedEnsemble([nn.Dropout(0.5)] * M).seed_members_(SEEDS)
        state = stack.streams.state()
        state["streams"] = {"cuda:1": [torch.zeros(16, dtype=torch.uint8)] * M}
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        stack.streams.load(state)
        assert stack.streams.state() == {"seeds": SEEDS, "streams": {}}

    def test_what_draws_inside_of_a_loop_has_its_stream(self):
        class Draws(Own):
            def forward(self, x):
                return nn.functional.dropout(super().forward(x), 0.5, self.training)

        found = networks(Draws, True)
        stack = StackedEnsemble(found, how="batched").seed_members_(SEEDS)
        x = torch.randn(B, 6).double()
        torch.testing.assert_close(stack(x), separately(found, x)[1])


def hooked():
    """Doubles what the first layer returns, and the gradient behind the second."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Sequential(nn.ReLU()))
    model[0].register_forward_hook(lambda layer, given, y: 2 * y)
    model[1].register_full_backward_hook(lambda layer, dx, dy: (3 * dx[0],))
    model[2].register_forward_pre_hook(lambda layer, given: (given[0] - given[0].mean(),))
    return model


def parametrised():
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(6, 5)),
        parametrizations.spectral_norm(nn.Linear(5, 4, bias=False)),
    )


def old_weight_norm():
    return nn.Sequential(weight_norm(nn.Linear(6, 5)), nn.Linear(5, 4))


def replaced():
    model = nn.Sequential(nn.Linear(6, 4))
    model[0].forward = Tripled(model[0])
    return model


class Tripled:
    """In place of the forward of one module."""

    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x):
        return 3 * nn.functional.linear(x, self.layer.weight)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("how", ["batched", "loop"])
@pytest.mark.parametrize("build", [hooked, parametrised, old_weight_norm, replaced])
def test_modules_with_more_than_their_class_run_one_by_one(build, how):
    found = networks(build, True)
    stack = StackedEnsemble(found, how=how)
    x = torch.randn(B, 6).double().requires_grad_()
    separate = found if build is old_weight_norm else copy.deepcopy(found)  # cannot be copied
    for network in separate if build is replaced else ():  # refers to what it was copied from
        network[0].forward = Tripled(network[0])
    truth = torch.stack([network(x) for network in separate])
    y = stack(x)
    torch.testing.assert_close(y, truth)
    torch.testing.assert_close(*[torch.autograd.grad(t.square().sum(), x)[0] for t in (y, truth)])


class TestStatistics:
    def test_recalibration_reaches_all_members(self):
        rows = torch.randn(20, 1, 6, 6)
        found = networks(lambda: ResNet((1, 6, 6), blocks=1), False, torch.float32)
        stack = StackedEnsemble(found)
        assert stack.runs(rows) == "loop"
        recalibrate_(stack, rows, batch_size=7)
        for network in found:
            recalibrate_(network, rows, batch_size=7)
        torch.testing.assert_close(stack(rows), torch.stack([network(rows) for network in found]))
        for i, network in enumerate(found):
            assert stack.member(i).norm.num_batches_tracked == network.norm.num_batches_tracked

    def test_a_guard_is_taken_over(self):
        rows = torch.randn(20, 1, 4, 4)
        found = networks(lambda: ResNet((1, 4, 4), blocks=1), False, torch.float32)
        for network in found:
            statistics_mode_(network, "recalibrate")
        stack = StackedEnsemble(found)
        assert not stack.looped
        with pytest.raises(RuntimeError, match="must be of the weights that are evaluated"):
            stack(rows)
        with pytest.raises(RuntimeError, match="must be of the weights that are evaluated"):
            stack.member(0)(rows)
        recalibrate_(stack, rows)
        torch.testing.assert_close(stack.member(1)(rows), stack(rows)[1])
        statistics_mode_(stack, "batch")
        torch.testing.assert_close(stack.member(1)(rows), stack(rows)[1])

    def test_no_norm_is_passed_by_in_silence(self):
        class Around(Own):
            def __init__(self):
                super().__init__()
                self.norm = nn.BatchNorm1d(3)

            def forward(self, x):
                return self.norm(super().forward(x))

        x = torch.randn(B, 6).double()
        stack = StackedEnsemble(networks(Around, False))
        with pytest.raises(ValueError, match="'norm' must be without forward hooks inside"):
            recalibrate_(stack, x)
        cumulative = networks(lambda: nn.BatchNorm1d(6, momentum=None), False)
        recalibrate_(recalibrated := StackedEnsemble(cumulative), x, batch_size=2)
        for network in cumulative:
            recalibrate_(network, x, batch_size=2)
        truth = torch.stack([network(x) for network in cumulative])
        torch.testing.assert_close(recalibrated(x), truth)
        looped = StackedEnsemble(networks(lambda: MLP(6, (), 3), False), how="loop")
        looped.model.layers[0].register_forward_hook(lambda *given: None)
        with pytest.raises(ValueError, match="must be without forward hooks, or run batched"):
            looped(x)


class TestRefused:
    def refuse(self, given, match, error=ValueError, **options):
        with pytest.raises(error, match=match):
            StackedEnsemble(given, **options)

    def test_networks(self):
        linear = nn.Linear(3, 2)
        self.refuse([], "networks must be at least one network; got 0")
        self.refuse([linear, 3], r"networks\[1\] must be an nn.Module; got int", TypeError)
        self.refuse([linear], "how must be one of", how="vmap")
        text = r"networks\[1\] must be of the class, settings and names of networks\[0\]"
        self.refuse([linear, nn.Linear(3, 2, bias=False)], text)
        self.refuse([linear, nn.Bilinear(3, 3, 2)], text)
        self.refuse([nn.Dropout(0.1), nn.Dropout(0.2)], text)
        powers = [Own(), Own()]
        powers[0].power, powers[1].power = 1.0, 2.0  # of which its description does not tell
        self.refuse(powers, text)
        self.refuse([nn.LazyLinear(2), nn.LazyLinear(2)], "networks must be initialised")
        kind = r"networks\[1\] must be \[2, 3\] torch.float32 on cpu in 'weight', as networks"
        self.refuse([linear, nn.Linear(3, 2).double()], kind)
        self.refuse([linear, nn.Linear(3, 2, device="meta")], kind)
        self.refuse([linear, nn.Linear(3, 2).requires_grad_(False)], "without gradient")
        apart = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        tied = copy.deepcopy(apart)
        tied[1].weight = tied[0].weight
        self.refuse([apart, tied], text)
        with pytest.raises(ValueError, match="members must be"):
            StackedEnsemble.like(linear, 0)

    def test_calls(self):
        stack = StackedEnsemble([nn.Linear(3, 2) for _ in range(M)])
        with pytest.raises(ValueError, match=r"x must be \[M, B, ...\] with M = 3, for own=True"):
            stack(torch.zeros(2, B, 3), own=True)
        with pytest.raises(ValueError, match="i must be an integer from 0 to 2; got 3"):
            stack.member(3)
        with pytest.raises(ValueError, match="seeds must be M = 3 integers"):
            stack.seed_members_([1, 2])
        with pytest.raises(ValueError, match=r"weights\['bias'\] must be of shape \[3, 2\]"):
            stack.run({"bias": torch.zeros(2, 2)}, torch.zeros(B, 3))
        with pytest.raises(ValueError, match=r"weights\['scale'\] must be a parameter's name"):
            stack.run({"scale": torch.zeros(3, 2)}, torch.zeros(B, 3))
