"""The catalogue itself, without a GPU: every entry calls its op and its definition rightly."""

import pytest
import torch
from gpu.catalogue import ENTRIES

from landscape_fast.ops import _dispatch
from landscape_fast.testing import check_op


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
def test_entries_are_valid_calls(entry):
    """In plain PyTorch, for inputs small enough for a CPU."""
    check_op(
        entry.call,
        entry.reference,
        entry.inputs(torch.float32, device="cpu"),
        backend="torch",
        gradients=entry.gradients,
    )
    assert entry.backends(torch.float32), "no kernel of this entry would be tested on a GPU"


def test_every_op_has_an_entry():
    """An op that is declared is tested on GPUs."""
    with_kernels = {
        op for op, backends in _dispatch.OPS.items() if {"triton", "cuda"} & set(backends)
    }
    assert {entry.op for entry in ENTRIES} == with_kernels
