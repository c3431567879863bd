"""Init against shuffle, and cycles against runs, on a problem that two streams can tell apart."""

import re
from dataclasses import replace

import pytest
import torch
from methods.problem import CONFIG, plain, rows

from landscape_fast.landscape import origins
from landscape_fast.landscape.origins import cycle_diversity, init_or_shuffle
from landscape_fast.methods import fit, predict
from landscape_fast.methods.deep import build_member

HARD = replace(CONFIG, lr=0.1, batch_size=4)  # ends far enough apart for the order to matter


def compared(**options):
    x, y = rows()
    test = torch.randn(400, 2, generator=torch.Generator().manual_seed(2)), torch.arange(400) % 3
    return init_or_shuffle(plain, x, y, *test, HARD, progress=False, **options)


def test_the_same_run_twice_is_the_same_function():
    found = compared(lrs=[0.05, 0.1], repeats=2)
    assert torch.equal(found.same, torch.zeros(2, 2, dtype=torch.float64))
    assert (found.both > 0).all() and (found.init > 0).all()
    assert found.lr.tolist() == [0.05, 0.1]


def test_a_run_that_is_not_repeatable_shows(monkeypatch):
    """With weights that nothing determines, `same` is no longer 0."""
    noise = torch.Generator().manual_seed(0)

    def unrepeatable(build, config, stream, device):
        network = build_member(build, config, stream, device)
        with torch.no_grad():
            for p in network.parameters():
                p.add_(torch.randn(p.shape, generator=noise))
        return network

    monkeypatch.setattr(origins, "build_member", unrepeatable)
    assert compared(lrs=[0.02]).same.item() > 0


def test_numbers_are_those_of_four_runs_made_by_hand():
    """Stream 2, 3 are those of the second repeat."""
    x, y = rows()
    test = torch.randn(400, 2, generator=torch.Generator().manual_seed(2))
    labels = {}
    for init in (2, 3):
        for order in (2, 3):
            network = build_member(plain, HARD, init, "cpu")
            fit(network, x, y, HARD, stream=order, progress=False)
            labels[init, order] = predict(network, test)[0].argmax(-1)
    first = labels[2, 2]
    found = compared(lrs=[HARD.lr], repeats=2)
    for name, case in (("shuffle", (2, 3)), ("init", (3, 2)), ("both", (3, 3))):
        expected = (labels[case] != first).double().mean()
        assert getattr(found, name)[0, 1] == expected, name
    assert found.accuracy[0, 1] == (first == torch.arange(400) % 3).double().mean()
    assert len({tuple(v.tolist()) for v in labels.values()}) == 4


def test_finished_runs_are_read_not_trained(tmp_path, monkeypatch):
    options = {"lrs": [0.02], "directory": tmp_path, "resume": True}
    before = compared(**options)
    assert len(list(tmp_path.glob("*.pt"))) == 5
    monkeypatch.setattr("landscape_fast.methods.trainer.Run._one_step", None)  # not callable
    assert all(torch.equal(a, b) for a, b in zip(before, compared(**options), strict=True))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lrs": []}, r"init_or_shuffle: lrs must be at least one learning rate; got \[\]"),
        ({"lrs": [0.1], "repeats": 0}, "repeats must be an integer of at least 1; got 0"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        compared(**options)


def test_cycles_are_compared_within_their_run():
    runs = torch.tensor([[[0, 0, 0, 0], [0, 0, 0, 1]], [[2, 2, 2, 2], [0, 0, 2, 2]]])
    found = cycle_diversity(torch.nn.functional.one_hot(runs, 3).float())
    assert found.between_cycles.tolist() == [0.25, 0.5]
    assert found.between_runs.tolist() == [0.5, 1.0]  # (0, 0) with (1, 1), (0, 1) with (1, 0)


@pytest.mark.parametrize("shape", [(2, 4, 3), (1, 2, 4, 3), (2, 1, 4, 3)])
def test_cycles_that_do_not_fit(shape):
    message = re.escape("logits must be [R, K, N, C] with R and K at least 2; got " + str([*shape]))
    with pytest.raises(ValueError, match=message):
        cycle_diversity(torch.zeros(shape))
