"""The compiled module `landscape_fast._C`, or the reason why it is not there.

`C` is the module or None, `error` the reason or None, `with_cuda` whether it holds CUDA kernels.
Nothing else imports `_C`.
"""
import importlib

import torch  # noqa: F401  (first: its OpenMP runtime must be the one in the process)

try:
    C = importlib.import_module("landscape_fast._C")
    error = None
except ImportError as exc:
    C = None
    error = str(exc)

with_cuda = bool(C is not None and C.with_cuda)
