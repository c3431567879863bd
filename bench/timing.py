"""Timing of contestants that take turns, on the host clock or as CUDA graph replays.

Every contestant becomes a sampler: a function that runs it some number of times and returns
milliseconds per call. `interleave` gives all of them a turn in every round (forwards, then
backwards, so that drift cancels), and ratios are taken within a round.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

CALLS = 20  # per graph, and at least as many as there are input sets
WALL_CALLS = 200  # on a GPU, where the host runs ahead and one synchronisation ends them
SAMPLE_MS = 50.0  # one sample of a slow contestant may take this long before calls are dropped
MAX_SETS = 64
MAX_SET_BYTES = 16 << 30


class Settings(NamedTuple):
    """How long to measure: rounds, and milliseconds per contestant, before and in each round."""

    rounds: int = 5
    warmup_ms: float = 50.0
    rep_ms: float = 200.0


QUICK = Settings(rounds=2, warmup_ms=1.0, rep_ms=2.0)


class Sampler(NamedTuple):
    """`sample()` gives milliseconds per call, averaged over `calls` calls."""

    sample: Callable[[], float]
    calls: int


def sets_for(bytes_per_set: int, device: str) -> int:
    """How many input sets keep the L2 cache cold: four times its size, at most MAX_SETS."""
    if device != "cuda" or not bytes_per_set:
        return 1
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    wanted = math.ceil(4 * l2 / bytes_per_set)
    return max(1, min(wanted, MAX_SETS, MAX_SET_BYTES // bytes_per_set))


def once(call: Callable[[], object], device: str) -> float:
    """Milliseconds of one call, synchronised."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def warm(call: Callable[[], object], device: str, ms: float) -> float:
    """Calls for `ms` milliseconds, after two that may compile; returns the fastest one."""
    for _ in range(2):  # the second may compile anew, as a step does that trains after evaluating
        call()
    best, spent = math.inf, 0.0
    while spent < ms or best == math.inf:
        took = once(call, device)
        best, spent = min(best, took), spent + took
    return best


def wall_sampler(call: Callable[[], object], device: str, warmup_ms: float) -> Sampler:
    """Host time per call; on a GPU of many calls with one synchronisation at the end."""
    estimate = warm(call, device, warmup_ms)
    if device == "cuda":
        calls = max(1, min(WALL_CALLS, int(SAMPLE_MS / estimate)))
    else:  # single calls, unless they are too short for the clock
        calls = max(1, min(WALL_CALLS, math.ceil(0.2 / max(estimate, 1e-3))))

    def many():
        for _ in range(calls):
            call()

    return Sampler(lambda: once(many, device) / calls, calls)


def graph_sampler(calls: Sequence[Callable[[], object]], warmup_ms: float) -> Sampler:
    """GPU time per call: replays of one CUDA graph of at least CALLS calls, over all input sets.

    Raises:
        RuntimeError: if the contestant cannot be captured (it synchronises, or graphs by itself).
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        estimate = warm(calls[0], "cuda", warmup_ms)
        count = max(CALLS, len(calls))
        if count * estimate > SAMPLE_MS:  # long kernels leave no launch gaps to hide
            count = max(1, int(SAMPLE_MS / estimate))
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(count):
                calls[i % len(calls)]()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample():
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / count

    warm(graph.replay, "cuda", warmup_ms)
    return Sampler(sample, count)


def interleave(samplers: dict[str, Sampler], settings: Settings) -> dict[str, list[list[float]]]:
    """Samples in milliseconds per call: name -> round -> samples. All take turns in every round."""
    samples = {name: [] for name in samplers}
    for round_ in range(settings.rounds):
        names = list(samplers) if round_ % 2 == 0 else list(reversed(samplers))
        for name in names:
            sampler, got, spent = samplers[name], [], 0.0
            while spent < settings.rep_ms or not got:
                got.append(sampler.sample())
                spent += max(got[-1] * sampler.calls, 1e-3)
            samples[name].append(got)
    return samples


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile, linear between neighbours."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def summary(rounds: list[list[float]]) -> dict[str, float]:
    """p50 is the median of the rounds' medians, min and max their range; p20 and p80 of all."""
    medians = [statistics.median(r) for r in rounds]
    every = [ms for r in rounds for ms in r]
    return {
        "p20": quantile(every, 0.2),
        "p50": statistics.median(medians),
        "p80": quantile(every, 0.8),
        "min": min(medians),
        "max": max(medians),
    }


def ratios(peer: list[list[float]], ours: list[list[float]]) -> dict[str, float]:
    """How many times slower the peer is: per round, then the median and the range."""
    per_round = [
        statistics.median(p) / statistics.median(o) for p, o in zip(peer, ours, strict=True)
    ]
    return {"p50": statistics.median(per_round), "min": min(per_round), "max": max(per_round)}
