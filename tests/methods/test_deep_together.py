"""Members trained together are the members trained in turn, and end one by one."""

import dataclasses
import math

import pytest
import torch
from methods.problem import CONFIG, MEMBERS, ROWS, STEPS, plain, rows
from methods.test_resume import interrupt_after, numbers
from torch import nn

from landscape_fast.methods import TrainingInterrupted, fit, predict, train_deep_ensemble
from landscape_fast.methods.deep import build_member
from landscape_fast.methods.trainer import Diverged

WAYS = ["batched", "loop"]
PER_EPOCH = STEPS // CONFIG.epochs


def double():
    """In float64: Adam would make steps of the rounding errors of gradients that are zero."""
    return plain().double()


def pictures():
    """Convolutions, norms with statistics, a shortcut, and weights without decay."""

    class Shortcut(nn.Sequential):
        def forward(self, x):
            return x + super().forward(x)

    inner = Shortcut(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), inner, nn.Dropout(0.2)]
    layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3), nn.Dropout(0.1)]
    return nn.Sequential(*layers).double()


def problem(build):
    x, y = rows()
    x = x.double()
    return (x if build is double else x.repeat(1, 18).view(-1, 1, 6, 6)), y


def assert_close(trained, expected):
    for name, value in expected.model.state_dict().items():
        torch.testing.assert_close(trained.model.state_dict()[name], value)
    pairs = zip(trained.histories, expected.histories, strict=True)
    for got, want in pairs:
        assert [e.keys() for e in got] == [e.keys() for e in want]
        for a, b in zip(got, want, strict=True):
            for key in a.keys() - {"seconds"}:
                assert math.isclose(a[key], b[key], rel_tol=1e-9), key


def assert_same(trained, expected):
    for name, value in expected.model.state_dict().items():
        assert torch.equal(trained.model.state_dict()[name], value), name
    assert numbers(trained.histories) == numbers(expected.histories)
    assert trained.failed.keys() == expected.failed.keys()


def train(build=double, config=CONFIG, members=MEMBERS, **options):
    return train_deep_ensemble(
        build, *problem(build), config, members=members, progress=False, **options
    )


@pytest.mark.parametrize("together", [True, *WAYS])
@pytest.mark.parametrize(
    "build, changes",
    [
        (double, {}),
        (double, {"optimizer": "sgd", "label_smoothing": 0.1}),
        (pictures, {"optimizer": "adamw", "augment": "crop_flip"}),
        (pictures, {"optimizer": "sgd", "schedule": "step", "milestones": (1, 2)}),
    ],
    ids=str,
)
def test_together_is_in_turn(build, changes, together):
    """Own weights, statistics, optimiser, dropout, rows and crops; the last batch is smaller."""
    config = dataclasses.replace(CONFIG, **changes)
    expected = train(build, config)
    trained = train(build, config, together=together)
    assert_close(trained, expected)
    assert all(type(m) is type(n) for m, n in zip(trained.model.members, expected.model.members,
                                                  strict=True))  # fmt: skip
    x, _ = problem(build)
    torch.testing.assert_close(predict(trained.model, x), predict(expected.model, x))
    assert not any(module.training for module in trained.model.modules())


def test_batched_is_chosen_where_it_is_faster(monkeypatch):
    """Of small linear layers on a CPU; of convolutions there, members run one after another."""
    from landscape_fast.methods import deep_together

    chosen = []
    for kind in (deep_together.Batched, deep_together.Looped):
        monkeypatch.setattr(kind, "step", spy(kind.step, chosen, kind.way))
    train(double, together=True)
    train(pictures, together=True)
    assert chosen == ["batched"] * STEPS + ["loop"] * STEPS


def spy(step, calls, way):
    def noted(self, *args):
        calls.append(way)
        return step(self, *args)

    return noted


@pytest.mark.parametrize("together", WAYS)
def test_a_shared_order_is_that_of_the_first_stream(together):
    expected = train(order="shared")
    assert_close(train(order="shared", together=together), expected)
    own = train()
    for m in range(MEMBERS):
        equal = [torch.allclose(p, q) for p, q in zip(expected.model.members[m].parameters(),
                                                      own.model.members[m].parameters(),
                                                      strict=True)]  # fmt: skip
        assert all(equal) == (m == 0)


# -- members that end before the others ------------------------------------------------------------


class FailsLate(nn.Module):
    """Has a NaN result from a given training step on; `member` is counted by `fails`."""

    def __init__(self, step):
        super().__init__()
        self.inner = double()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("first", torch.tensor(float(step)))

    def forward(self, x):
        if self.training:
            self.calls += 1
        return self.inner(x) + torch.where(self.calls >= self.first, torch.nan, 0.0)


def fails(*steps):
    """A `build` whose member m fails at steps[m]."""
    left = iter(steps)
    return lambda: FailsLate(next(left))


NEVER = 1e9


def failing(steps, **options):
    x, y = problem(double)
    options = {"members": len(steps), "progress": False, **options}
    return train_deep_ensemble(fails(*steps), x, y, CONFIG, **options)


@pytest.mark.parametrize("together", WAYS)
def test_a_member_that_fails_is_left_out_and_the_others_go_on(together):
    steps = (NEVER, PER_EPOCH + 2, NEVER)
    text = "train_deep_ensemble: member 1 failed and is left out: loss nan in epoch 2"
    with pytest.warns(UserWarning, match=text):
        trained = failing(steps, together=together)
    with pytest.warns(UserWarning, match="member 1 failed and is left out"):
        expected = failing(steps)
    assert_close(trained, expected)
    assert expected.failed[1].epoch == 2
    assert len(trained.model.members) == 2 and list(trained.failed) == [1]
    assert [len(h) for h in trained.histories] == [3, 1, 3]
    # its network is that of the end of the first epoch
    failure = trained.failed[1]
    assert failure.epoch == 2 and failure.network.calls == PER_EPOCH
    x, y = problem(double)
    states = []
    alone = build_member(lambda: FailsLate(NEVER), CONFIG, 1, "cpu")
    keep = {PER_EPOCH: lambda: states.append({k: v.clone() for k, v in alone.state_dict().items()})}
    fit(alone, x, y, CONFIG, stream=1, progress=False,
        on_step=lambda step: keep.get(step, lambda: None)())  # fmt: skip
    for name, value in failure.network.state_dict().items():
        if name != "first":
            torch.testing.assert_close(value, states[0][name])


@pytest.mark.parametrize("together", WAYS)
def test_a_member_that_fails_at_once_keeps_its_initial_weights(together):
    with pytest.warns(UserWarning, match="member 0 failed"):
        trained = failing((1, NEVER), together=together)
    first = build_member(lambda: FailsLate(1), CONFIG, 0, "cpu")
    for name, value in trained.failed[0].network.state_dict().items():
        assert torch.equal(value, first.state_dict()[name])


@pytest.mark.parametrize("together", [False, *WAYS])
def test_weights_that_are_not_finite_are_a_failure_too(together):
    """The loss of the last step was still finite."""
    x, y = problem(double)
    changes = {"epochs": 1, "batch_size": ROWS, "optimizer": "sgd", "lr": 1e308, "warmup_epochs": 0}
    config = dataclasses.replace(CONFIG, **changes)
    text = "train_deep_ensemble: all members failed; member 0: weights not finite in epoch 1"
    with pytest.raises(Diverged, match=text):
        train_deep_ensemble(
            lambda: nn.Linear(2, 3).double(), 1000 * x, y, config, members=2, progress=False,
            together=together,
        )  # fmt: skip


EARLY_LR = {double: 0.1, pictures: 0.01}  # with which members end at different epochs


def early(build=double, patience=2, **options):
    """Few rows to learn from by heart, and validation rows with wrong classes for some."""
    x, y = problem(build)
    config = dataclasses.replace(
        CONFIG, epochs=8, lr=EARLY_LR[build], schedule="constant", batch_size=10
    )
    held = x[20:], torch.where(torch.arange(30) % 4 == 0, (y[20:] + 1) % 3, y[20:])
    options = {"members": MEMBERS, "progress": False, **options}
    return train_deep_ensemble(
        build, x[:20], y[:20], config, validation=held, patience=patience, **options
    ), (x, y, config, held)


@pytest.mark.parametrize("together", WAYS)
@pytest.mark.parametrize("build", [double, pictures])
def test_early_stopping_is_per_member(build, together):
    trained, _ = early(build, together=together)
    expected, (x, y, config, held) = early(build)
    assert_close(trained, expected)
    lengths = [len(h) for h in trained.histories]
    assert min(lengths) < max(lengths), "all members ended at once: the test shows nothing"
    assert not trained.failed
    for m, history in enumerate(trained.histories):
        losses = [e["held_loss"] for e in history]
        best = losses.index(min(losses))
        assert len(history) == min(config.epochs, best + 1 + 2)
        # a run alone without early stopping, at the end of that epoch
        states = []
        alone = build_member(build, config, m, "cpu")

        def note(step, alone=alone, states=states):
            if step % 2 == 0:  # two batches an epoch
                states.append({k: v.clone() for k, v in alone.state_dict().items()})

        fit(alone, x[:20], y[:20], config, stream=m, progress=False, on_step=note)
        for name, value in trained.model.members[m].state_dict().items():
            torch.testing.assert_close(value, states[best][name])
        loss = nn.functional.cross_entropy(trained.model.members[m](held[0]), held[1]).item()
        assert math.isclose(loss, losses[best], rel_tol=1e-9)


def test_a_fraction_is_held_out():
    x, y = problem(double)
    trained = train_deep_ensemble(
        double, x, y, CONFIG, members=2, validation=0.2, patience=5, together=True, progress=False
    )
    assert all("held_loss" in e for h in trained.histories for e in h)


# -- checkpoints -----------------------------------------------------------------------------------


CASES = {
    "plain": lambda **kw: train(**kw),
    "shared": lambda **kw: train(order="shared", **kw),
    "pictures": lambda **kw: train(pictures, **kw),
    "early": lambda **kw: early(**kw)[0],
    "failing": lambda **kw: failing((NEVER, PER_EPOCH + 2, NEVER), **kw),
}


@pytest.mark.filterwarnings("ignore:train_deep_ensemble. member 1 failed")
@pytest.mark.parametrize("together", WAYS)
@pytest.mark.parametrize(
    "case, steps",
    [("plain", 3), ("plain", 4), ("shared", 6), ("pictures", 5), ("early", 7), ("failing", 10)],
)
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, case, steps, together):
    """In an epoch, at its end, after a member has ended: bit for bit."""
    run = CASES[case]
    expected = run(together=together)
    with pytest.raises(TrainingInterrupted) as stop:
        run(together=together, directory=tmp_path, on_step=interrupt_after(steps))
    assert stop.value.checkpoint == tmp_path / "together.pt"
    torch.manual_seed(1)  # the state at the time of resuming must not matter
    done = []
    resumed = run(together=together, directory=tmp_path, resume=True, on_step=done.append)
    assert done[0] == steps + 1
    assert_same(resumed, expected)
    again = run(
        together=together, directory=tmp_path, resume=True, on_step=lambda s: pytest.fail("again")
    )
    assert_same(again, expected)


def test_a_checkpoint_of_other_members_is_refused(tmp_path):
    train(together=True, directory=tmp_path)
    with pytest.raises(ValueError, match=r"got streams \[0, 1, 2\] \(now \[0, 1\]\) in .*together"):
        train(together=True, directory=tmp_path, resume=True, members=2)
    with pytest.raises(ValueError, match=r"got way 'batched' \(now 'loop'\)"):
        train(together="loop", directory=tmp_path, resume=True)


ERRORS = [
    (
        {"together": "vmap"},
        r"together must be one of \(False, True, 'batched', 'loop'\); got 'vmap'",
    ),
    ({"order": "random"}, r"order must be one of \('own', 'shared'\); got 'random'"),
    ({"patience": 3}, "validation must be given exactly where patience is; got None"),
    ({"patience": -1}, "patience must be an integer of at least 0; got -1"),
]


@pytest.mark.parametrize("options, text", ERRORS, ids=str)
def test_errors(options, text):
    with pytest.raises(ValueError, match=f"train_deep_ensemble: {text}"):
        train(**options)


class Fast(nn.Linear):
    def fast_parameters(self):
        return [self.weight]


def test_fast_parameters_keep_their_settings():
    def build():
        return nn.Sequential(Fast(2, 8), nn.Tanh(), nn.Linear(8, 3)).double()

    def run(together, config):
        x, y = problem(double)
        options = {"members": 2, "progress": False, "together": together}
        return train_deep_ensemble(build, x[:, :2], y, config, **options)

    config = dataclasses.replace(CONFIG, fast_lr_mult=10.0)
    assert_close(run(True, config), run(False, config))
    with pytest.raises(ValueError, match="together must be True or 'loop' for networks whose"):
        run("batched", config)
    same = dataclasses.replace(CONFIG, fast_weight_decay=CONFIG.weight_decay)
    assert_close(run("batched", same), run(False, same))


def test_networks_of_several_members_are_refused():
    class Members(nn.Linear):
        def forward(self, x):
            return super().forward(x).expand(2, -1, -1)

    with pytest.raises(
        ValueError, match=r"build must be a function .* \[B, C\]; got one that make"
    ):
        train_deep_ensemble(
            lambda: Members(2, 3), *rows(), CONFIG, members=2, together=True, progress=False
        )


@pytest.mark.gpu
def test_on_a_gpu_too():
    """Dropout aside: batched masks may be others there."""

    def build():
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                             nn.Linear(64, 3)).double()  # fmt: skip

    x, y = problem(pictures)
    options = {"members": MEMBERS, "progress": False, "device": "cuda"}
    expected = train_deep_ensemble(build, x, y, CONFIG, **options)
    trained = train_deep_ensemble(build, x, y, CONFIG, together=True, **options)
    assert_close(trained, expected)
