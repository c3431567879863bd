"""Compiles Triton kernels for GPUs that are not here and reports what the compiler made of them.

`record` runs a launcher on meta or CPU tensors and notes each kernel launch, specialised by
Triton's rules, in place of launching it; `build` compiles such a launch for an architecture. Works
only in a process without TRITON_INTERPRET. The report has what shows a slow kernel or one that
cannot launch: spills, stack, shared memory, and which tensor-core and copy instructions there are.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}
COUNTED = {  # instruction -> pattern in the PTX
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma.sync": r"mma\.sync",
    "cp.async": r"cp\.async\.c[ag]\.shared",
    "wide": r"(?:ld|st)\.global\S*\.v[248]\.b32",  # 8 bytes or more
    "tma": r"cp\.async\.bulk\.tensor\.\dd\.shared",
}


class Launch(NamedTuple):
    """A kernel with the types, constants and options of one launch."""

    kernel: JITFunction
    signature: dict
    constants: dict
    attributes: dict
    options: dict
    grid: tuple


class Report(NamedTuple):
    """What the compiler made of a launch."""

    registers: int  # per thread
    stack: int  # bytes per thread
    local: int  # bytes per thread
    spills: int  # loads and stores of local memory in the code
    shared: int  # bytes per block
    counts: dict  # of the instructions in `COUNTED`


def record(call: Callable[[], object]) -> list[Launch]:
    """The launches that `call` makes, without making them."""
    launches = []

    def note(kernel, *args, grid, warmup, **kwargs):
        launches.append(_specialised(kernel, args, kwargs, grid))

    with mock.patch.object(JITFunction, "run", note):
        call()
    return launches


def _specialised(kernel, args, kwargs, grid) -> Launch:
    names = [p.name for p in kernel.params]
    options = {k: v for k, v in kwargs.items() if k not in names}
    values = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
    signature, constants, attributes = {}, {}, {}
    for i, p in enumerate(kernel.params):
        v = values.get(p.name, p.default)
        kind, aligned = "constexpr", False
        if p.is_constexpr or v is None:
            constants[p.name] = v
        elif isinstance(v, torch.Tensor):
            kind, aligned = "*" + NAMES[v.dtype], v.data_ptr() % 16 == 0
        elif isinstance(v, TensorDescriptor):
            kind = f"tensordesc<{NAMES[v.base.dtype]}{list(v.block_shape)}>".replace(" ", "")
        elif isinstance(v, float):
            kind = "fp32"
        elif v == 1 and not p.do_not_specialize:
            constants[p.name] = 1
        else:
            kind = "i32" if -(2**31) <= v < 2**31 else "i64"
            aligned = v % 16 == 0 and not p.do_not_specialize
        signature[p.name] = kind
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return Launch(kernel, signature, constants, attributes, options, grid)


def build(launch: Launch, arch: int) -> Report:
    """Compiles `launch` for sm_<arch>."""
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        usage = _run(CUOBJDUMP, "--dump-resource-usage", f.name)
        sass = _run(CUOBJDUMP, "-sass", f.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    counts = {name: len(re.findall(p, compiled.asm["ptx"])) for name, p in COUNTED.items()}
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    return Report(
        int(found[1]), int(found[2]), int(found[3]), spills, compiled.metadata.shared, counts
    )


def _run(*command) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
