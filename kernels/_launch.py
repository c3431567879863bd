"""How kernels are launched: on which device, and with which tile sizes.

Rules for every module of this folder:
- A launcher takes `config: Config | None`; None means the shipped one for this GPU and shape.
- Shipped configurations are data that a test reads: `SHIPPED[arch, bucket] -> Config`.
- Searching for a better one happens only with LANDSCAPE_FAST_AUTOTUNE=1 (`fastest`).
"""

import contextlib
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import triton
from triton.runtime.errors import OutOfResources, PTXASError

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
AUTOTUNE = os.environ.get("LANDSCAPE_FAST_AUTOTUNE", "0") == "1"

ARCHS = (80, 90, 100)  # architectures with configurations of their own: Ampere, Hopper, Blackwell
# Bytes one block may use; on sm_80 it would be 163 KB, but others run its configurations, too.
SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MAX_GRID_X = 2**31 - 1  # the y and z limits are 65535, so launchers fold their grid into x


class Config(NamedTuple):
    """One way to launch a kernel: its constexpr tile sizes and the compiler options."""

    tiles: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 3
    tma: bool = False  # load through tensor descriptors (sm_90 and later)

    def options(self) -> dict:
        """Keyword arguments of the launch."""
        return {**self.tiles, "num_warps": self.num_warps, "num_stages": self.num_stages}


@functools.cache
def _arch_of_device(index: int) -> int:
    major = torch.cuda.get_device_capability(index)[0]
    # sm_86, sm_89 and sm_120 have neither wgmma nor tcgen05: they run the Ampere configurations
    return {9: 90, 10: 100}.get(major, 80)


def arch(tensor: torch.Tensor) -> int:
    """The member of `ARCHS` that the device of `tensor` takes its configurations from."""
    return _arch_of_device(tensor.device.index) if tensor.is_cuda else 80


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. (`triton.cdiv` takes microseconds: it is made for use in kernels.)"""
    return -(-a // b)


def grid(op: str, programs: int) -> tuple[int]:
    """A one-dimensional grid, checked against what the hardware takes."""
    if programs > MAX_GRID_X:
        rule = f"small enough for {MAX_GRID_X} programs"
        raise ValueError(f"{op}: the problem must be {rule}; got {programs}")
    return (programs,)


@functools.cache
def multiprocessors(index: int) -> int:
    """Streaming multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(index).multi_processor_count


def on_device(tensor: torch.Tensor):
    """Context in which a launch goes to the device of `tensor`; free when it is already current."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


_found: dict[tuple, Config] = {}


def fastest(
    key: tuple, shipped: Config, candidates: Sequence[Config], run: Callable[[Config], object]
) -> Config:
    """`shipped`; with LANDSCAPE_FAST_AUTOTUNE=1 the fastest of it and `candidates`.

    `key` names the op, the GPU and all that the time depends on; it is timed once per process.
    `run` launches with a configuration; one that the compiler or the device refuses is left out.
    Nothing is timed while a CUDA graph is being captured.
    A search may end differently in another process, and results then differ in their last bits.
    """
    if not AUTOTUNE or INTERPRETED:
        return shipped
    if key in _found or torch.cuda.is_current_stream_capturing():
        return _found.get(key, shipped)
    times = []
    for config in (shipped, *candidates):
        try:
            ms = triton.testing.do_bench(lambda c=config: run(c), return_mode="median")
        except (OutOfResources, PTXASError, triton.CompilationError):
            continue
        times.append((ms, len(times), config))
    _found[key] = min(times)[2] if times else shipped
    return _found[key]
