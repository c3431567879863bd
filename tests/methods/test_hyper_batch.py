"""Hyper-batch training is its two equations step by step, and all that every method promises."""

import copy
import dataclasses
import math
import signal
from functools import partial

import pytest
import torch
from methods.problem import CONFIG, rows
from torch import nn

from landscape_fast.methods import (
    HyperBatchEnsemble,
    TrainConfig,
    TrainingInterrupted,
    Tuning,
    ensemble_cross_entropy,
    gibbs_cross_entropy,
    predict,
    train_hyper_batch,
)
from landscape_fast.methods import hyper_batch as module
from landscape_fast.methods.splits import hold_out
from landscape_fast.metrics.diversity import diagnose
from landscape_fast.nn.hyper_batch import HyperBatchLinear, HyperBatchNetwork
from landscape_fast.nn.init import Normal

MEMBERS = 2
STEPS = 3 * 3  # of CONFIG on the 41 rows that are not held out
EXACT = {"rtol": 1e-4, "atol": 1e-6}  # float32, after several steps of two optimisers


def build(dropout=0.3, upper=10.0, members=MEMBERS):
    layer = partial(HyperBatchLinear, members=members, r_init=Normal(1, 0.5))
    layers = [layer(2, 8), nn.ReLU(), nn.Dropout(dropout), layer(8, 3)]
    return HyperBatchNetwork(nn.Sequential(*layers), 1e-2, upper, std=0.1)


def train(config=CONFIG, network=build, **options):
    options = {"validation": 0.2, "tuning": Tuning(every=2, lr=0.05), "progress": False} | options
    return train_hyper_batch(network, *rows(), config, **options)


def state(trained):
    return trained.model.state_dict()


def assert_same(found, expected):
    for name, value in state(expected).items():
        assert torch.equal(state(found)[name], value), name
    assert numbers(found) == numbers(expected)


def numbers(trained):
    """The history as text, in which nan equals nan."""
    return repr([{**epoch, "seconds": None} for epoch in trained.histories[0]])


def penalty_by_hand(model, lambdas):
    """Sum over layers of the mean over members and examples of h * |W + delta * e|^2."""
    names = model.hyperparameters
    responses = dict(zip(model.layers(), model.embedding(lambdas), strict=True))
    total = 0.0
    for name, layer in model.layers().items():
        for m in range(model.members):
            for n in range(lambdas.shape[1]):
                e, e_bias = responses[name][m, n].chunk(2)
                weight = layer.weight + layer.delta * e[:, None]
                bias = layer.bias[m] + layer.delta_bias[m] * e_bias
                for part, kind in ((weight, "weight"), (bias, "bias")):
                    h = lambdas[m, n, names.index(f"{name}.{kind}")]
                    total = total + h * part.square().sum() / lambdas.shape[1] / model.members
    return total


def test_training_is_equations_8_and_9():
    """Plain SGD on one, Adam on the other, by hand, with the same draws and the same rows."""
    config = TrainConfig(epochs=2, batch_size=16, optimizer="sgd", momentum=0.0, lr=0.05, seed=3)
    tuning = Tuning(every=2, lr=0.05, entropy=0.1, batch_size=6)
    twins, draws, batches = [], [], []
    real_prepare, real_draw = module._HyperRun.prepare, module._HyperRun._draw
    real_step, real_batch = module._HyperRun._one_step, module._HyperRun._held_batch

    class Recorded(module._HyperRun):
        def prepare(self, distribution, *rest):
            twins.extend([copy.deepcopy(self.model), copy.deepcopy(distribution)])
            real_prepare(self, distribution, *rest)

        def _draw(self, count, purpose, step):
            draws.append((count, purpose, step))
            return real_draw(self, count, purpose, step)

        def _one_step(self, x, y):
            batches.append(("train", x, y, self.optimizer.param_groups[0]["lr"]))
            real_step(self, x, y)

        def _held_batch(self):
            x, y = real_batch(self)
            batches.append(("tune", x, y, None))
            return x, y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_HyperRun", Recorded)
        trained = train(config, partial(build, dropout=0.0), tuning=tuning)
    model, distribution = twins
    adam = torch.optim.Adam(distribution.parameters(), lr=tuning.lr)
    assert [kind for kind, *_ in batches] == ["train", "train", "tune"] * 3
    assert len(set(draws)) == len(draws)  # no two steps share their random numbers
    for (kind, x, y, lr), (count, purpose, step) in zip(batches, draws, strict=True):
        assert count == len(y)
        seed = module.stream_seed(config.seed, 0, "tune", purpose, step)
        lambdas = distribution.sample(count, torch.Generator().manual_seed(seed))
        if kind == "train":
            lambdas = lambdas.detach()
            logits = model(x, lambdas)
            cross_entropy = sum(nn.functional.cross_entropy(part, y) for part in logits) / MEMBERS
            loss = cross_entropy + penalty_by_hand(model, lambdas) / 41
            parameters = list(model.parameters())
            for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                p.data -= lr * g
        else:
            mean = model(x, lambdas).softmax(-1).mean(0)
            goal = nn.functional.nll_loss(mean.log(), y) - 0.1 * distribution.entropy()
            adam.zero_grad()
            goal.backward()
            adam.step()
            distribution.clip_()
            model.zero_grad()
    torch.testing.assert_close(trained.model.network.state_dict(), model.state_dict(), **EXACT)
    torch.testing.assert_close(
        trained.model.distribution.state_dict(), distribution.state_dict(), **EXACT
    )
    record = trained.histories[0][-1]
    means = distribution.mean().mean(0).tolist()
    assert list(record["lambdas"].values()) == pytest.approx(means, rel=1e-4)
    assert tuple(record["lambdas"]) == model.hyperparameters
    assert record["entropy"] == pytest.approx(distribution.entropy().item(), rel=1e-4)
    assert 0 < record["loss"] < 3 and record["penalty"] > 0 and record["tuning_loss"] > 0


def test_the_two_losses():
    logits, y = torch.randn(3, 5, 4, dtype=torch.float64), torch.tensor([0, 3, 1, 1, 2])
    expected = nn.functional.nll_loss(logits.softmax(-1).mean(0).log(), y)
    torch.testing.assert_close(ensemble_cross_entropy(logits, y), expected)
    assert ensemble_cross_entropy(logits, y) < gibbs_cross_entropy(logits, y)
    sure = torch.tensor([[[-2000.0, 0.0]], [[0.0, -2000.0]]])  # e^-2000 is 0
    assert float(ensemble_cross_entropy(sure, y[:1])) == pytest.approx(math.log(2))


def test_tuning_is_in_evaluation_mode_and_moves_the_bounds_only(monkeypatch):
    seen = []
    real = module._HyperRun._tune

    def observed(self):
        before = copy.deepcopy(self.model.state_dict())
        bounds = copy.deepcopy(self.distribution.state_dict())
        modes = []
        handle = self.model.register_forward_pre_hook(lambda m, _: modes.append(m.training))
        real(self)
        handle.remove()
        assert modes == [False] and self.model.training
        for name, value in before.items():
            assert torch.equal(self.model.state_dict()[name], value), name
        assert not torch.equal(self.distribution.state_dict()["log_lower"], bounds["log_lower"])
        low, high = self.distribution.log_lower, self.distribution.log_upper
        assert (low < high).all() and (low >= math.log(1e-2) - 1e-6).all()
        assert (high <= math.log(10.0) + 1e-6).all()
        seen.append(self.step + 1)

    monkeypatch.setattr(module._HyperRun, "_tune", observed)
    train(tuning=Tuning(every=2, lr=3.0))
    assert seen == [2, 4, 6, 8]
    seen.clear()
    found = train(tuning=Tuning(every=1, first_epoch=2, lr=0.05))
    assert seen == [7, 8, 9]
    losses = [epoch["tuning_loss"] for epoch in found.histories[0]]
    assert math.isnan(losses[0]) and math.isnan(losses[1]) and losses[2] > 0


def test_penalties_that_are_too_strong_are_tuned_down():
    """On these rows the loss held out is the smaller, the weaker the penalty; 0.01 is the least.

    From penalties drawn from nearly the whole range, so that the network learns what they do; a
    narrow start can be tuned into the wrong direction.
    """
    settings = {"epochs": 60, "seed": 7, "schedule": "constant", "weight_decay": 0.0}
    config = dataclasses.replace(CONFIG, **settings)
    wide = Tuning(every=1, lr=0.05, entropy=0.0, width=9.0, first_epoch=10)

    def network():
        return HyperBatchNetwork(build(dropout=0.0).network, 1e-2, 10.0, std=0.1, body=(8,))

    tuned = train(config, network, tuning=wide)
    fixed = train(config, network, tuning=dataclasses.replace(wide, first_epoch=60))
    start = fixed.histories[0][0]["lambdas"]
    assert fixed.histories[0][-1]["lambdas"] == start and min(start.values()) > 1
    end = tuned.histories[0][-1]["lambdas"]
    for name in ("0.weight", "3.weight"):  # a bias of so few rows matters little
        assert end[name] < 0.5 * start[name]
    _, _, held_x, held_y = hold_out("", *rows(), 0.2, config.seed)
    losses = [
        float(ensemble_cross_entropy(predict(run.model, held_x), held_y)) for run in (tuned, fixed)
    ]
    assert losses[0] < 0.5 * losses[1]


def interrupt_after(steps):
    def on_step(step):
        if step == steps:
            signal.raise_signal(signal.SIGINT)

    return on_step


@pytest.mark.parametrize("steps", [1, 2, 3, 5, STEPS])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, steps):
    expected = train()
    with pytest.raises(TrainingInterrupted, match="hyper-batch ensemble of 2 stopped"):
        train(directory=tmp_path, on_step=interrupt_after(steps))
    torch.manual_seed(1)
    done = []
    assert_same(train(directory=tmp_path, resume=True, on_step=done.append), expected)
    assert done == list(range(steps + 1, STEPS + 1))


def test_same_seed_same_bits_and_the_callers_generator_untouched():
    before = torch.get_rng_state()
    first = train()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(17)
    assert_same(train(), first)
    other = train(dataclasses.replace(CONFIG, seed=6))
    for name, value in state(other).items():
        if value.requires_grad or "log_lower" in name:
            assert name.endswith("embedding.log_lower") or not torch.equal(
                value, state(first)[name]
            ), name


def test_files_of_another_run_are_refused(tmp_path):
    train(directory=tmp_path)
    for options, difference in (
        ({"tuning": Tuning(every=3, lr=0.05)}, r"tuning every 2 \(now 3\)"),
        ({"tuning": Tuning(every=2, lr=0.05, entropy=0.5)}, r"tuning entropy 0\.001 \(now 0\.5\)"),
        ({"validation": 0.4}, r"data .*held out"),
    ):
        with pytest.raises(ValueError, match=rf"resume: checkpoint must be .* got {difference}"):
            train(directory=tmp_path, resume=True, **options)


def test_predictions_at_the_means_and_at_samples():
    trained = train()
    x, model = rows()[0], trained.model
    means = predict(model, x)
    assert means.shape == (MEMBERS, 50, 3) and not model.training
    mean = model.distribution.mean()
    for m in range(MEMBERS):  # as plain networks
        plain = model.network.member(m, mean[m].detach())
        assert {type(layer) for layer in plain} == {nn.Linear, nn.ReLU, nn.Dropout}
        torch.testing.assert_close(plain(x), means[m], **EXACT)
    more = model.with_samples(3, seed=4)
    found = predict(more, x)
    assert found.shape == (4 * MEMBERS, 50, 3) and torch.equal(found[:MEMBERS], means)
    assert torch.equal(found, predict(more, x))
    torch.testing.assert_close(predict(more, x, batch_size=7), found, **EXACT)
    lambdas = more.lambdas()
    low, high = (b.exp() for b in (model.distribution.log_lower, model.distribution.log_upper))
    assert ((low <= lambdas) & (lambdas <= high)).all() and len(lambdas.unique(dim=0)) == 4
    for s in range(4):
        rows_of = found[s * MEMBERS : (s + 1) * MEMBERS]
        expected = model.network(x, lambdas[s].unsqueeze(1).expand(-1, 50, -1))
        torch.testing.assert_close(rows_of, expected, **EXACT)
    other = predict(model.with_samples(3, seed=5), x)
    assert not torch.equal(other[MEMBERS:], found[MEMBERS:])
    assert more.network is model.network  # nothing is copied


def test_how_the_members_differ_is_measured_on_the_rows_held_out(capsys):
    trained = train()
    _, _, held_x, held_y = hold_out("", *rows(), 0.2, CONFIG.seed)
    assert trained.diversity == diagnose(predict(trained.model, held_x), held_y)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "hyper-batch ensemble of 2, on 9 rows held out:"
    assert lines[1:] == [f"- {line}" for line in trained.diversity.lines]
    assert train(report=False).diversity is None
    assert train(network=partial(build, members=1)).diversity is None
    assert capsys.readouterr().err == ""


def test_the_state_of_a_trained_ensemble_can_be_saved():
    trained = train()
    network = build()
    empty = HyperBatchEnsemble(network, network.distribution()).eval()
    empty.load_state_dict(trained.model.state_dict())
    x = rows()[0]
    assert torch.equal(predict(empty, x), predict(trained.model, x))


def test_one_member_is_a_self_tuning_network():
    layer = partial(HyperBatchLinear, members=1, r=False, s=False)

    def network():
        return HyperBatchNetwork(nn.Sequential(layer(2, 8), nn.ReLU(), layer(8, 3)), 1e-3, 1.0)

    trained = train(dataclasses.replace(CONFIG, epochs=15), network)
    x, y = rows()
    assert (predict(trained.model, x)[0].argmax(-1) == y).float().mean() > 0.9


def test_errors():
    with pytest.raises(ValueError, match=r"build must be .* a HyperBatchNetwork; got Linear; wrap"):
        train(network=lambda: nn.Linear(2, 3))
    with pytest.raises(ValueError, match=r"config.member_batches must be 'shared': .*; got 'own'"):
        train(dataclasses.replace(CONFIG, member_batches="own"))
    with pytest.raises(ValueError, match="train_hyper_batch: validation must be a fraction"):
        train(validation=3)
    x, y = rows()
    with pytest.raises(ValueError, match=r"train_hyper_batch: y must be int64; got torch.int32"):
        train_hyper_batch(build, x, y.int(), CONFIG, progress=False)
    with pytest.raises(ValueError, match="samples must be an integer of at least 0; got -1"):
        network = build()
        HyperBatchEnsemble(network, network.distribution(), samples=-1)


@pytest.mark.parametrize(
    ("setting", "rule"),
    [
        ({"every": 0}, "every must be an integer of at least 1; got 0"),
        ({"first_epoch": -1}, "first_epoch must be an integer of at least 0; got -1"),
        ({"batch_size": 0}, "batch_size must be None or an integer of at least 1; got 0"),
        ({"batch_size": True}, "batch_size must be None or an integer of at least 1; got True"),
        ({"lr": 0.0}, "lr must be a finite number above 0; got 0.0"),
        ({"width": math.inf}, "width must be a finite number above 0; got inf"),
        ({"entropy": -1.0}, "entropy must be a finite number of at least 0; got -1.0"),
    ],
)
def test_tuning_settings(setting, rule):
    with pytest.raises(ValueError, match=f"Tuning: {rule}"):
        Tuning(**setting)


@pytest.mark.gpu
def test_on_a_gpu_too(tmp_path):
    expected = train(device="cuda")
    with pytest.raises(TrainingInterrupted):
        train(device="cuda", directory=tmp_path, on_step=interrupt_after(4))
    assert_same(train(device="cuda", directory=tmp_path, resume=True), expected)
    assert predict(expected.model.with_samples(2), rows()[0]).is_cuda
