"""Prints what a training step keeps for its backward: ours against tabm and torch-uncertainty.

    python bench/memory.py [--device cuda] [--out rows.jsonl]

Measured in one forward each, parameters not counted; beside it, what `activation_memory` predicts.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from bench.peers import peer  # noqa: E402
from landscape_fast.models.tabm import TabM  # noqa: E402
from landscape_fast.nn import (  # noqa: E402
    BatchEnsembleConv2d,
    BatchEnsembleLinear,
    activation_memory,
    saved_bytes,
)


class Row(NamedTuple):
    """One network of one library in one setting."""

    case: str
    library: str
    dtype: str
    measured: int  # bytes
    predicted: int
    ratio: float  # to ours in the same case and dtype


Network = Callable[[], nn.Module]


def networks(M: int, B: int, D: int, C: int, H: int) -> Iterator[tuple[str, str, Network, tuple]]:
    """(case, library, how to make the network, shape of its input)."""
    tabm, tu = peer("tabm"), peer("torch_uncertainty", "layers/batch_ensemble.py")
    linear, shared = f"linear {M} x {B} x {D} -> {D}", f"first linear {B} x {D} -> {M} x {D}"
    conv, model = f"conv 3x3, {4 * B // 16} x {C} x {H} x {H}", f"TabM, 3 blocks of {D}, {B} rows"
    ours = {"layout": "batch_major"}
    yield linear, "ours", lambda: BatchEnsembleLinear(D, D, M, **ours), (B, M, D)
    yield shared, "ours", lambda: BatchEnsembleLinear(D, D, M, **ours), (B, D)
    images = (4 * B // 16, C, H, H)
    options = {"padding": 1, "layout": "folded"}
    yield conv, "ours", lambda: BatchEnsembleConv2d(C, C, 3, 4, **options), images
    size = {"n_num_features": 8, "d_out": 1, "n_blocks": 3, "d_block": D, "k": M}
    yield model, "ours", lambda: TabM(**size), (B, 8)
    if tabm is not None:

        def layer():
            return tabm.LinearBatchEnsemble(D, D, k=M, scaling_init="ones")

        yield linear, "tabm", layer, (B, M, D)
        yield shared, "tabm", lambda: nn.Sequential(tabm.EnsembleView(k=M), layer()), (B, D)
        yield model, "tabm", lambda: tabm.TabM.make(**size), (B, 8)
    if tu is not None:
        yield linear, "torch-uncertainty", lambda: tu.BatchLinear(D, D, M), (M * B, D)
        yield conv, "torch-uncertainty", lambda: tu.BatchConv2d(C, C, 3, 4, padding=1), images


def rows(device: str, M=32, B=256, D=512, C=32, H=32) -> list[Row]:
    """All networks in float32 and under autocast to bfloat16, ours first."""
    found = []
    for case, library, make, shape in networks(M, B, D, C, H):
        for dtype in ("float32", "autocast"):
            network, x = make().to(device), torch.randn(shape, device=device)
            with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "autocast"):
                measured = saved_bytes(network, x)
                predicted = activation_memory(network, x)
            same = [r.measured for r in found if (r.case, r.dtype) == (case, dtype)]
            ratio = measured / (same[0] if same else measured)
            found.append(Row(case, library, dtype, measured, predicted, ratio))
    return sorted(found, key=lambda r: (r.case, r.dtype, r.ratio))


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--out", type=Path, help="the rows are appended here as JSON lines")
    options = parser.parse_args(arguments)
    print(
        f"{'bytes saved for the backward':36}{'':20}{'':10}{'MB':>9}{'predicted':>11}{'x ours':>8}"
    )
    found = rows(options.device)
    for r in found:
        line = f"{r.case:36}{r.library:20}{r.dtype:10}{r.measured / 1e6:9.2f}"
        print(f"{line}{r.predicted / 1e6:11.2f}{r.ratio:8.2f}")
    if options.out:
        with open(options.out, "a") as file:
            for r in found:
                file.write(json.dumps({"device": options.device, **r._asdict()}) + "\n")


if __name__ == "__main__":
    main()
