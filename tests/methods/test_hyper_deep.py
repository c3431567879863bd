"""A hyper-deep search: the same with any executor, resumed anywhere, and selected as defined."""

import dataclasses
import math
import multiprocessing
import os
import pickle
import signal
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest
import torch
from methods.problem import CONFIG, rows
from torch import nn

from landscape_fast.methods import (
    TrainingInterrupted,
    fit,
    load_network,
    predict,
    select_members,
    train_hyper_deep,
)
from landscape_fast.methods import trials as trials_module
from landscape_fast.methods.deep import build_member
from landscape_fast.methods.hyper_deep import SearchInterrupted, WeightedEnsemble
from landscape_fast.methods.search_space import Choice, LogUniform
from landscape_fast.methods.splits import hold_out
from landscape_fast.methods.trials import STREAMS

SPACE = {"weight_decay": LogUniform(1e-5, 1e-1), "dropout": Choice((0.0, 0.2, 0.5))}
ONCE = dataclasses.replace(CONFIG, epochs=2)
SEARCH = {"space": SPACE, "trials": 4, "members": 2, "validation": 0.4, "progress": False}


def network(dropout=0.1):
    """At the top of the module, so that another process finds it."""
    return nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3))


def search(config=ONCE, **options):
    return train_hyper_deep(network, *rows(), config, **{**SEARCH, **options})


def assert_same(found, expected):
    def settled(row):
        return {name: value for name, value in row.items() if name not in ("seconds", "file")}

    assert [settled(row) for row in found.table] == [settled(row) for row in expected.table]
    assert (found.search, found.selection) == (expected.search, expected.selection)
    assert torch.equal(found.logits, expected.logits)
    for name, value in expected.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], value), name


@pytest.fixture(scope="module")
def expected():
    return search()


def test_is_random_search_then_selection_then_restarts_then_selection(expected):
    """Every network of the table is trained here again, by hand."""
    x, y, held_x, held_y = hold_out("", *rows(), 0.4, ONCE.seed)
    assert torch.equal(expected.targets, held_y)
    chosen = sorted(expected.search.members)
    pairs = [(n, 0) for n in range(4)] + [(n, s) for n in chosen for s in (1, 2)]
    assert [(row["trial"], row["restart"]) for row in expected.table] == pairs
    for (number, restart), row, logits in zip(pairs, expected.table, expected.logits, strict=True):
        settings = dict(row["settings"])
        assert (settings == {}) == (number == 0)
        dropout = {"dropout": settings.pop("dropout")} if settings else {}
        config = dataclasses.replace(ONCE, **settings)
        stream = number + STREAMS * restart
        model = build_member(lambda d=dropout: network(**d), config, stream, "cpu")
        fit(model, x, y, config, stream=stream, progress=False)
        assert torch.equal(predict(model, held_x)[0], logits)
        loss = nn.functional.cross_entropy(logits.double(), held_y)
        assert row["nll"] == pytest.approx(float(loss)) and row["outcome"] == "done"
    assert expected.search == select_members(expected.logits[:4], held_y, 2)
    assert expected.selection == select_members(expected.logits, held_y, 2)
    picks = expected.selection.picks
    assert [row["weight"] for row in expected.table] == [picks.count(n) for n in range(len(pairs))]
    found = predict(expected.model, held_x)
    repeated = expected.logits[expected.selection.members].repeat_interleave(
        torch.tensor(expected.selection.weights), 0
    )
    assert torch.equal(found, repeated)
    torch.testing.assert_close(
        found.softmax(-1).mean(0), expected.selection.predict(expected.logits)
    )


def test_settings_and_initial_weights_differ_between_trials(expected):
    settings = [row["settings"] for row in expected.table[1:4]]
    assert len({s["weight_decay"] for s in settings}) == 3
    logits = expected.logits
    for i in range(len(logits)):
        for j in range(i):
            assert not torch.allclose(logits[i], logits[j], atol=1e-2)


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_give_the_same_and_leave_the_random_state_alone(expected, workers):
    before, count = torch.get_rng_state(), torch.get_num_threads()
    with ThreadPoolExecutor(workers) as executor:
        assert_same(search(executor=executor), expected)
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == count


def test_processes_give_the_same(expected, tmp_path):
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(2, mp_context=context) as executor:
        assert_same(search(executor=executor), expected)
        assert_same(search(executor=executor, directory=tmp_path), expected)
    assert not list(tmp_path.glob("rows*")) and not list(tmp_path.glob(".*"))
    assert len(list(tmp_path.glob("trial-*.pt"))) == len(expected.table)


def trained(monkeypatch):
    """The labels of the trials that `fit` is called for, with its steps."""
    seen, real = [], trials_module.fit

    def counting(*arguments, on_step, **options):
        steps = []
        seen.append((options["label"], steps))

        def step(n):
            steps.append(n)
            on_step(n)

        return real(*arguments, on_step=step, **options)

    monkeypatch.setattr(trials_module, "fit", counting)
    return seen


@pytest.mark.parametrize("trial", [0, 2, 5])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, monkeypatch, expected, trial):
    seen, real = [], trials_module.fit

    def interrupted(*arguments, on_step, **options):
        seen.append(options["label"])

        def step(n):
            if len(seen) == trial + 1 and n == 3:
                signal.raise_signal(signal.SIGINT)
            on_step(n)

        return real(*arguments, on_step=step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(trials_module, "fit", interrupted)
        with pytest.raises(SearchInterrupted, match=rf"after {trial} of \d trials; saved in"):
            search(directory=tmp_path)
    steps = trained(monkeypatch)
    assert_same(search(directory=tmp_path, resume=True), expected)
    assert len(steps) == len(expected.table) - trial  # what was finished is not trained again
    assert steps[0][1][0] == 4  # and what was stopped goes on after its last step


def test_a_finished_search_is_read_and_a_longer_one_extends_it(tmp_path, monkeypatch, expected):
    search(directory=tmp_path)
    seen = trained(monkeypatch)
    assert_same(search(directory=tmp_path, resume=True), expected)
    assert seen == []
    longer = search(directory=tmp_path, resume=True, trials=6, restarts=0)
    assert [label for label, _ in seen] == ["trial 4", "trial 5"]
    assert torch.equal(longer.logits[:4], expected.logits[:4])


def test_every_network_can_be_loaded_again(tmp_path, expected):
    found = search(directory=tmp_path)
    held_x = hold_out("", *rows(), 0.4, ONCE.seed)[2]
    before = torch.get_rng_state()
    for row, logits in zip(found.table, found.logits, strict=True):
        assert torch.equal(predict(load_network(network, row), held_x)[0], logits)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="row must be of a search with a directory; got"):
        load_network(network, expected.table[0])
    with pytest.raises(ValueError, match="row must be of a trial that ended well; got diverged"):
        load_network(network, found.table[0] | {"outcome": "diverged"})


@pytest.mark.parametrize("moment", ["submit", "step"])
def test_ctrl_c_stops_threads_too(tmp_path, monkeypatch, moment):
    """The signal comes to the main thread only, at any time; trials in threads end within a step.

    While the first trial runs, the signal hits the main thread in submitting the next one, or in
    waiting. The trials would need hours; the limit on epochs is for a test that fails.
    """
    real, started = trials_module.fit, threading.Event()

    def telling(*arguments, on_step, **options):
        def step(n):
            started.set()
            on_step(n)

        return real(*arguments, on_step=step, **options)

    class Pool(ThreadPoolExecutor):
        def submit(self, *arguments):
            future = super().submit(*arguments)
            if moment == "submit":
                assert started.wait(60)
                signal.raise_signal(signal.SIGINT)
            return future

    def press():
        if started.wait(60):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(trials_module, "fit", telling)
    presser = threading.Thread(target=press if moment == "step" else started.wait, args=())
    presser.start()
    config = dataclasses.replace(ONCE, epochs=10_000)
    with Pool(2) as executor, pytest.raises(SearchInterrupted, match="after 0 of 4"):
        search(config, executor=executor, directory=tmp_path)
    presser.join()


def test_an_interruption_can_be_sent_from_another_process(tmp_path):
    stop = TrainingInterrupted("member 1", 2, 3, tmp_path)
    again = pickle.loads(pickle.dumps(stop))
    assert (str(again), again.checkpoint) == (str(stop), tmp_path)


def test_files_of_another_search_are_refused(tmp_path):
    search(directory=tmp_path, restarts=0)
    options = {"directory": tmp_path, "resume": True, "restarts": 0}
    with pytest.raises(
        ValueError, match=r"resume: checkpoint must be .* got lr 0\.02 \(now 0\.1\)"
    ):
        search(dataclasses.replace(ONCE, lr=0.1), **options)
    with pytest.raises(ValueError, match=r"got data .*held out"):
        search(**options, validation=0.2)
    with pytest.raises(ValueError, match=r"got arguments .*dropout"):
        search(**options, space={**SPACE, "dropout": Choice((0.3,))})


def test_diverging_trials_are_left_out():
    space = {"lr": Choice((0.02, 1e30))}
    config = dataclasses.replace(ONCE, optimizer="sgd")
    found = search(config, space=space, trials=6, restarts=0)
    outcomes = {row["settings"].get("lr", 0.02): row["outcome"] for row in found.table}
    assert outcomes == {0.02: "done", 1e30: "diverged"}
    for row, logits in zip(found.table, found.logits, strict=True):
        bad = row["outcome"] == "diverged"
        assert bool(logits.isnan().all()) == bad and not (bad and row["weight"])
        assert all(math.isnan(row[name]) == bad for name in ("nll", "accuracy", "brier"))
    every = dataclasses.replace(config, lr=1e30)
    with pytest.raises(RuntimeError, match="must stay finite; got none of 2; lower the learning"):
        search(every, space={"lr": Choice((1e30,))}, trials=2)


def test_the_last_selection_without_the_search(expected):
    found = search(keep_search=False)
    assert torch.equal(found.logits, expected.logits)
    assert all(row["restart"] > 0 for row in found.table if row["weight"])
    assert found.selection.picks == [
        4 + n for n in select_members(expected.logits[4:], expected.targets, 2).picks
    ]


def test_rows_given_apart_and_every_objective():
    x, y = rows()
    for objective in ("accuracy", "brier"):
        options = {"validation": (x[30:], y[30:]), "objective": objective, "restarts": 1}
        found = train_hyper_deep(network, x[:30], y[:30], ONCE, **{**SEARCH, **options})
        assert torch.equal(found.targets, y[30:])
        assert found.selection == select_members(found.logits, y[30:], 2, objective)


def test_one_line_per_trial(capsys):
    search(progress=True, restarts=0, trials=2, members=1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "trial 0 done (1 of 2): settings as given"
    assert lines[1].startswith("trial 1 done (2 of 2): weight_decay ") and ", dropout " in lines[1]


def test_a_weighted_ensemble_runs_each_network_once():
    calls = []

    class Counted(nn.Linear):
        def forward(self, x):
            calls.append(self)
            return super().forward(x)

    parts = [Counted(2, 3), Counted(2, 3)]
    model = WeightedEnsemble(parts, [1, 3])
    x = torch.randn(5, 2)
    expected = torch.stack([parts[0](x), parts[1](x), parts[1](x), parts[1](x)])
    calls.clear()
    assert torch.equal(model(x), expected) and len(calls) == 2
    loaded = WeightedEnsemble([nn.Linear(2, 3), nn.Linear(2, 3)], [1, 1])
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded(x), expected)  # weights are part of the state
    with pytest.raises(ValueError, match="weights must be 2 integers of at least 1; got"):
        WeightedEnsemble(parts, [1, 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trials": 0}, "trials must be an integer of at least 1; got 0"),
        ({"members": 0}, "members must be an integer of at least 1; got 0"),
        ({"restarts": -1}, "restarts must be an integer of at least 0; got -1"),
        ({"objective": "mse"}, "objective must be one of"),
        ({"space": {}}, "space must be a setting to search or more"),
        ({"space": {"seed": Choice((1,))}}, "space must be without the seed"),
        (
            {"space": {"lr": 0.1}},
            r"space\['lr'\] must be of Uniform, LogUniform or Choice; got 0.1",
        ),
        ({"validation": 2.0}, "validation must be a fraction"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=f"train_hyper_deep: {message}"):
        search(**options)


def test_rows_that_do_not_fit_are_refused():
    x, y = rows()
    with pytest.raises(ValueError, match=r"train_hyper_deep: y must be \[N\] with N = 40; got"):
        train_hyper_deep(network, x[:40], y, ONCE, **SEARCH)


def test_a_network_with_members_is_refused():
    class Members(nn.Linear):
        def forward(self, x):
            return super().forward(x).expand(2, -1, -1)

    with pytest.raises(ValueError, match=r"build must be .* \[B, C\]; got 2 members"):
        train_hyper_deep(lambda **_: Members(2, 3), *rows(), ONCE, **SEARCH)
