"""Which way a member product goes: y, dx and dweight each have one.

Of the library (`_subspace_linear_ways`): "bmm", "few", "outer", "wide". Of the Triton kernels,
which run all members in one launch: "fused", and for y and dx "mixed", which forms the weights of a
member inside the kernel.
"""

from typing import NamedTuple

# Outputs below which the transposed product is quicker on a CPU: for (M, B, I, O) =
# (10, 128, 64, 10) it takes 41 us for 78, at (3, 1024, 64, 10) 96 for 182, but at
# (10, 32, 128, 16) 28 for 22 and at (4, 64, 64, 32) 22 for 16 (one thread of an AMD EPYC with
# AVX-512, torch 2.13, MKL).
FEW_OUTPUTS = 16


class Plan(NamedTuple):
    """The ways of y, dx and dweight."""

    y: str
    dx: str
    dweight: str


BMM = Plan("bmm", "bmm", "bmm")
FEW = Plan("few", "bmm", "bmm")
ONE = Plan("few", "bmm", "outer")
WIDE = Plan("wide", "wide", "wide")


def composed_plan(device: str, shared: bool, B: int, O: int) -> Plan:
    """The quickest ways of the library.

    On a CPU "wide" was quicker than "bmm" in 12 of 14 shapes, by up to 3.3 times with few outputs,
    and never slower by more than 1.1 times. With one example per member the transposed product
    takes 463 us for 683 at (M, I, O) = (16, 512, 512), and a batched product for dweight is 6 times
    slower than one for each member.
    """
    if shared:
        return WIDE
    if device != "cpu":
        return BMM
    if B == 1:
        return ONE
    return FEW if O < FEW_OUTPUTS else BMM
