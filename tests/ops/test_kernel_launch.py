"""How Triton kernels are launched: which configuration, on which device."""

import contextlib

import pytest
import torch

pytest.importorskip("triton")

import triton

from landscape_fast.kernels import _launch
from landscape_fast.kernels._launch import Config, fastest

SHIPPED = Config({"BLOCK": 64}, num_warps=8)
OTHERS = [Config({"BLOCK": 16}), Config({"BLOCK": 32}), Config({"BLOCK": 128})]


def test_options_of_a_launch():
    config = Config({"BLOCK_B": 64, "GROUP": 8}, num_warps=8, num_stages=2, tma=True)
    assert config.options() == {"BLOCK_B": 64, "GROUP": 8, "num_warps": 8, "num_stages": 2}


@pytest.mark.parametrize(
    "capability, arch",
    [((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((10, 0), 100), ((10, 3), 100), ((12, 0), 80)],
)
def test_every_gpu_finds_its_configurations(capability, arch, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    _launch._arch_of_device.cache_clear()
    assert _launch._arch_of_device(0) == arch
    _launch._arch_of_device.cache_clear()


def test_without_a_gpu_the_general_configurations():
    assert _launch.arch(torch.zeros(1)) == _launch.arch(torch.zeros(1, device="meta")) == 80
    assert isinstance(_launch.on_device(torch.zeros(1)), contextlib.nullcontext)


def test_too_many_programs():
    assert _launch.grid("op", 2**31 - 1) == (2**31 - 1,)
    rule = "op: the problem must be small enough for 2147483647 programs; got 2147483648"
    with pytest.raises(ValueError, match=rule):
        _launch.grid("op", 2**31)


def test_no_search_unless_asked():
    def run(config):
        raise AssertionError("must not launch")

    assert fastest(("no search",), SHIPPED, OTHERS, run) is SHIPPED


@pytest.fixture
def searching(monkeypatch):
    """Searches as LANDSCAPE_FAST_AUTOTUNE=1 does; a block of 32 is quick and one of 128 too big."""
    tried = []

    def run(config):
        tried.append(config.tiles["BLOCK"])
        if tried[-1] == 128:
            raise triton.runtime.errors.OutOfResources(300, 227, "shared memory")

    def do_bench(launch, return_mode):
        launch()
        return {16: 3.0, 32: 1.0, 64: 2.0}[tried[-1]]

    monkeypatch.setattr(_launch, "AUTOTUNE", True)
    monkeypatch.setattr(_launch, "INTERPRETED", False)
    monkeypatch.setattr(_launch, "_found", {})
    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return run, tried


def test_search_takes_the_fastest_and_remembers(searching):
    run, tried = searching
    assert fastest(("a",), SHIPPED, OTHERS, run) == OTHERS[1]
    assert sorted(tried) == [16, 32, 64, 128]
    assert fastest(("a",), SHIPPED, OTHERS, run) == OTHERS[1] and len(tried) == 4
    fastest(("b",), SHIPPED, OTHERS, run)
    assert len(tried) == 8


def test_search_falls_back_to_what_ships(searching):
    run, _ = searching
    assert fastest(("c",), OTHERS[2], [OTHERS[2]], run) == OTHERS[2]


def test_no_search_while_a_graph_is_captured(searching, monkeypatch):
    run, tried = searching
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert fastest(("d",), SHIPPED, OTHERS, run) is SHIPPED and not tried
