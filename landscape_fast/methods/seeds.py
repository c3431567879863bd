"""Random streams: one seed gives every member its own; the caller's generators stay as they are."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_PURPOSES = {
    "init": 0,
    "order": 1,
    "noise": 2,
    "member order": 3,
    "augment": 4,
    "split": 5,
    "search": 6,
    "tune": 7,
    "posterior": 8,
    "probe": 9,
}


def stream_seed(seed: int, stream: int, purpose: str, *index: int) -> int:
    """Seed of one random stream; streams that differ in any argument are independent.

    Args:
        seed: the run's seed.
        stream: which network of the run (the member of a deep ensemble).
        purpose: "init" (initial weights), "order" (rows of an epoch), "member order" (rows of an
            epoch for one member), "augment" (random crops), "noise" (dropout), "split" (which rows
            are held out), "search" (settings of a trial), "tune" (steps on rows held out),
            "posterior" (noise of a sampler, samples of a Gaussian) or "probe" (directions in which
            a landscape is measured).
        index: counters within the purpose, for instance the epoch; none is the same as 0.

    Returns:
        An integer in [0, 2^64), the same on every machine (`numpy.random.SeedSequence`).
    """
    if purpose not in _PURPOSES:
        raise ValueError(f"stream_seed: purpose must be one of {tuple(_PURPOSES)}; got {purpose!r}")
    key = (stream, _PURPOSES[purpose], *(index or (0,)))
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0])


def epoch_order(rows: int, seed: int, stream: int, epoch: int, members: int = 0) -> torch.Tensor:
    """The order of the training rows in one epoch, int64 on the CPU.

    It depends on its arguments only, so a resumed run needs no stored state to continue it.

    Returns:
        [rows]; with `members` M above 0 one independent order per member, [M, rows].
    """
    if members:
        keys = [("member order", epoch, member) for member in range(members)]
        return torch.stack([_permutation(rows, stream_seed(seed, stream, *key)) for key in keys])
    return _permutation(rows, stream_seed(seed, stream, "order", epoch))


def _permutation(rows: int, seed: int) -> torch.Tensor:
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))


@contextmanager
def isolated_rng(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch's global generators of the CPU and of `device`, and restores them afterwards.

    Layers draw their initial weights and dropout masks from the global generators only.
    """
    devices = [_index(device)] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        # torch.manual_seed would also reseed every other GPU, which fork_rng does not restore
        torch.default_generator.manual_seed(seed)
        for index in devices:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of the global generators that `isolated_rng` seeds, as uint8 tensors."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Sets what `rng_state` returned; a state of a device kind not in use here is left out."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
