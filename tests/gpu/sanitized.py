"""Runs every op and kernel once, small; test_sanitizer.py runs it under compute-sanitizer."""

import torch
from gpu.catalogue import ENTRIES, FLOATS

if __name__ == "__main__":
    for entry in ENTRIES:
        for dtype in FLOATS[:2]:
            for backend in entry.backends(dtype):
                inputs = entry.inputs(dtype)
                leaves = [
                    t.requires_grad_() if entry.gradients and t.is_floating_point() else t
                    for t in inputs
                ]
                got = entry.call(*leaves, backend=backend)
                outputs = [got] if isinstance(got, torch.Tensor) else list(got)
                if entry.gradients:
                    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
                torch.cuda.synchronize()
                print(entry.name, dtype, backend, flush=True)
    print("sanitized: all ops ran")
