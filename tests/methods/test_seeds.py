import numpy as np
import pytest
import torch

from landscape_fast.methods.seeds import (
    epoch_order,
    isolated_rng,
    rng_state,
    set_rng_state,
    stream_seed,
)

CPU = torch.device("cpu")
PURPOSES = ("init", "order", "noise", "member order", "augment", "split", "search", "tune")


def test_every_argument_makes_another_stream():
    seeds = {
        stream_seed(seed, stream, purpose, index)
        for seed in (0, 1)
        for stream in range(8)
        for purpose in PURPOSES
        for index in range(4)
    }
    assert len(seeds) == 2 * 8 * len(PURPOSES) * 4
    assert len({seed % 2**32 for seed in seeds}) == len(seeds)  # torch on the CPU keeps 32 bits


def test_streams_are_the_same_on_every_machine():
    """numpy promises SeedSequence for ever; a change here would break every published seed."""
    assert stream_seed(0, 0, "init") == 4189226428916626942
    sequence = np.random.SeedSequence(9, spawn_key=(3, 1, 7))
    assert stream_seed(9, 3, "order", 7) == sequence.generate_state(1, np.uint64)[0]


def test_counters_may_be_several():
    """Every member of an epoch its own; one counter counts as it always has."""
    seeds = {stream_seed(0, 0, "member order", e, m) for e in range(4) for m in range(4)}
    assert len(seeds | {stream_seed(0, 0, "member order", e) for e in range(4)}) == 20
    assert stream_seed(0, 0, "noise") == stream_seed(0, 0, "noise", 0)


def test_an_unknown_purpose_is_refused():
    with pytest.raises(ValueError, match=r"stream_seed: purpose must be one of .*; got 'dropout'"):
        stream_seed(0, 0, "dropout")


def test_orders_are_permutations_and_differ_between_epochs_and_members():
    first = epoch_order(100, seed=0, stream=0, epoch=0)
    assert sorted(first.tolist()) == list(range(100))
    for other in (epoch_order(100, 0, 0, 1), epoch_order(100, 0, 1, 0), epoch_order(100, 1, 0, 0)):
        assert not torch.equal(first, other)


def test_the_callers_generator_is_left_as_it_was():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    with isolated_rng(123, CPU):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with isolated_rng(123, CPU):
        assert torch.equal(torch.rand(3), inside)


def test_a_state_continues_where_it_was_taken():
    with isolated_rng(5, CPU):
        torch.rand(10)
        state = rng_state(CPU)
        expected = torch.rand(4)
    with isolated_rng(6, CPU):
        set_rng_state(state, CPU)
        assert torch.equal(torch.rand(4), expected)


@pytest.mark.gpu
def test_the_callers_cuda_generator_is_left_as_it_was():
    device = torch.device("cuda")
    before = torch.cuda.get_rng_state()
    with isolated_rng(123, device):
        inside = torch.rand(3, device=device)
        state = rng_state(device)
        expected = torch.rand(3, device=device)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    with isolated_rng(123, device):
        assert torch.equal(torch.rand(3, device=device), inside)
        set_rng_state(state, device)
        assert torch.equal(torch.rand(3, device=device), expected)
