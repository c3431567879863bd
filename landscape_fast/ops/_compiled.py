"""How tensors are handed to the compiled module: pointers, sizes, strides, streams."""

import torch
from torch import Tensor

from landscape_fast import _extension

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # Dtype of csrc/api.h


def logits_arguments(logits: Tensor) -> tuple[int, ...]:
    """What describes logits [M, N, C], of any strides, to an entry of `landscape_fast._C`."""
    return logits.data_ptr(), DTYPE_CODES[logits.dtype], *logits.shape, *logits.stride()


def launch_cuda(entry: str, like: Tensor, sizes: tuple, arguments: tuple, outputs: tuple) -> None:
    """Launches `entry`_cuda on the current stream of the device of `like`, without waiting for it.

    Args:
        sizes: what `entry`_cuda_workspace takes.
        arguments: come before the workspace; `outputs`, tensors or None, come after it.
    """
    module = _extension.C
    size = getattr(module, f"{entry}_cuda_workspace")(*sizes)
    workspace = like.new_empty(max(size, 1), dtype=torch.uint8)
    pointers = [0 if t is None else t.data_ptr() for t in outputs]
    call_cuda(f"{entry}_cuda", like, *arguments, workspace.data_ptr(), *pointers)


def call_cuda(entry: str, like: Tensor, *arguments) -> None:
    """Calls `entry` of the compiled module, its last argument the current stream of `like`."""
    with torch.cuda.device(like.device):
        stream = torch.cuda.current_stream(like.device).cuda_stream
        getattr(_extension.C, entry)(*arguments, stream)
