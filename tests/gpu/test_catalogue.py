"""The catalogue itself, without a GPU: every entry calls its op and its definition rightly."""

import re
from pathlib import Path

import pytest
import torch
from gpu.catalogue import ENTRIES
from gpu.test_sanitizer import KERNELS

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


@pytest.mark.parametrize(
    "entry",
    [e for e in ENTRIES if e.gradients and e.backends(torch.float32)[0] == "triton"],
    ids=lambda e: e.name,
)
def test_entries_keep_what_they_say(entry, device):
    """What the test of memory on a GPU allows for the backward is what autograd saves."""
    pytest.importorskip("triton")
    leaves = [t.requires_grad_() for t in entry.inputs(torch.float32, device=device)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        outputs = entry.kernel(*leaves)
    known = {t.data_ptr() for t in (*leaves, *outputs)}
    more = sum(t.untyped_storage().nbytes() for t in saved if t.data_ptr() not in known)
    assert more == entry.kept * sum(y.nbytes for y in outputs)


def test_the_sanitizer_watches_every_kernel():
    """Its filter by name lets none of ours pass unseen."""
    root = Path(__file__).resolve().parents[2]
    sources = "\n".join(path.read_text() for path in (root / "kernels").glob("*.py"))
    names = re.findall(r"^def (\w+_kernel)\(", sources, re.MULTILINE)
    assert len(names) >= 10
    assert [n for n in names if not any(part in n for part in KERNELS)] == []
