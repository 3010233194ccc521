"""Sampling noise as a function of (seed, position): the same number on every rank, layout, replay and version."""

_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15
"""2^64 / golden ratio: successive counters land far apart before they are mixed."""


def _mix(x: int) -> int:
    """A bijection of 64 bits in which every input bit changes every output bit half of the time."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def uniform(seed: int, position: int) -> float:
    """The uniform number in [0, 1) that chooses the token at an absolute position of a sequence.

    With mix(x) the finaliser of splitmix64 and all sums modulo 2^64: mix(mix(seed + s) + (position + 1) * s) for
    s = 0x9E3779B97F4A7C15; its upper 53 bits are the float's mantissa. This is a wire contract: a request may go on
    at a member of another version, so that the values never change.

    Args:
        seed: 64 bits; taken modulo 2^64, so that a negative seed is one too.
        position: 0 is the sequence's first token, prompt included.
    """
    key = _mix((seed + _STEP) & _MASK)
    return (_mix((key + (position + 1) * _STEP) & _MASK) >> 11) * 2.0**-53
