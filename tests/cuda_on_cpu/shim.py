"""The library that build.py makes, seen from Python: addresses and numbers in, errors out.

Standard library only, so that it also runs under AddressSanitizer.
"""

import ctypes
from contextlib import contextmanager
from pathlib import Path

# Argument and result types: p address, n int64, i int, f float.
ENTRIES = {
    "divergence_workspace": ("nnni", "n"),
    "divergence": ("pi" + "nnnnnn" + "ippp", "i"),
    "disagreement_workspace": ("nn", "n"),
    "disagreement": ("pi" + "nnnn" + "ppp", "i"),
    "summary_workspace": ("nnnn", "n"),
    "summary": ("pi" + "nnnnnn" + "pnn" + "ppppp", "i"),
    "combine": ("pnipi" + "nnnnn" + "pp", "i"),
    "combine_backward_workspace": ("pninn", "n"),
    "combine_backward": ("pnipi" + "nnnnn" + "ppppp" + "n", "i"),
    "subspace_conv2d": ("ppppi" + "p", "i"),
    "subspace_conv2d_weight_parts": ("p", "n"),
    "subspace_conv2d_weight": ("pppp", "i"),
    "perturb_tiles": ("n", "n"),
    "perturb": ("pff" + "pin" + "p", "i"),
    "perturb_backward": ("pff" + "pin" + "pi" + "pi" + "p", "i"),
}
TYPES = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "i": ctypes.c_int, "f": ctypes.c_float}
ORDERS = [(0, 0), (1, 0), (2, 1), (2, 2), (2, 3)]  # forward, reverse, random by three seeds


class CudaError(RuntimeError):
    """A launcher returned an error; `code` is its cudaError_t."""

    def __init__(self, code: int, failure: str):
        super().__init__(f"CUDA error {code}: {failure}")
        self.code = code


class Kernels:
    """The launchers: `kernels.divergence(...)` and so on; a non-zero result is a CudaError."""

    def __init__(self, path: Path):
        self._library = ctypes.CDLL(str(path))
        self._library.shim_failure.restype = ctypes.c_char_p
        self._library.shim_launches.restype = ctypes.c_longlong
        for name, (arguments, result) in ENTRIES.items():
            setattr(self, name, self._entry(f"shim_{name}", arguments, result))

    def _entry(self, symbol, arguments, result):
        function = getattr(self._library, symbol)
        function.argtypes = [TYPES[letter] for letter in arguments]
        function.restype = TYPES[result]

        def call(*values):
            value = function(*values)
            if result == "i" and value:
                raise CudaError(value, self._library.shim_failure().decode())
            return value

        return call

    @contextmanager
    def order(self, order: int, seed: int):
        """In which order blocks and threads run."""
        self._library.shim_order(order, seed)
        yield
        self._library.shim_order(0, 0)

    def launches(self) -> int:
        return self._library.shim_launches()
