"""Which way a BatchEnsemble convolution goes."""

from typing import NamedTuple

# Multiply-adds of one member's forward from which a convolution for each member is quicker than one
# for all, with its passes over the activations. Measured on two cores of an AMD EPYC (Zen 5).
MERGED_FORWARD_FROM = 30e6
MERGED_BACKWARD_FROM = 8e6


class Plan(NamedTuple):
    """How to run the forward and the backward: "once" or "merged"."""

    forward: str
    backward: str


def composed_plan(members: int, products: int, alone: bool) -> Plan:
    """The quicker library path.

    Args:
        members: M.
        products: multiply-adds of one member's forward.
        alone: whether one convolution serves all members (x shared, no r).
    """
    if alone and members > 1:
        return Plan("once", "once")
    forward = members == 1 or products >= MERGED_FORWARD_FROM
    backward = members == 1 or products >= MERGED_BACKWARD_FROM
    return Plan("merged" if forward else "once", "merged" if backward else "once")
