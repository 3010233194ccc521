"""Rank arithmetic: which tensor-, data- and expert-parallel place a global rank has.

Ranks are numbered lane by lane: rank = dp_rank * tp + tp_rank. Experts are either sliced over all ranks (ep 1) or
held whole, spread over all ranks (ep = tp x dp).
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How one replica of a model is cut over its ranks."""

    tp: int = 1
    """Ranks that share one sequence's attention heads."""
    dp: int = 1
    """Lanes: groups of tp ranks with sequences of their own."""
    ep: int = 1
    """1: every rank holds a slice of every expert. tp x dp: whole experts spread over all ranks."""

    def __post_init__(self) -> None:
        for name in ("tp", "dp", "ep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.ep not in (1, self.world):
            raise ValueError(f"ep={self.ep} with tp={self.tp} dp={self.dp}: ep must be 1 or tp x dp = {self.world}")

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.tp * self.dp


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One rank's place in a layout."""

    layout: Layout
    rank: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.layout.world:
            raise ValueError(f"rank must be in 0..{self.layout.world - 1}, got {self.rank}")

    @property
    def tp_rank(self) -> int:
        """Place within the lane."""
        return self.rank % self.layout.tp

    @property
    def dp_rank(self) -> int:
        """Which lane."""
        return self.rank // self.layout.tp

    @property
    def is_lane_leader(self) -> bool:
        """The lane's first TP rank samples and answers."""
        return self.tp_rank == 0


def tp_groups(layout: Layout) -> list[list[int]]:
    """Ranks of each lane: [[0, 1], [2, 3]] for tp 2, dp 2."""
    return [list(range(d * layout.tp, (d + 1) * layout.tp)) for d in range(layout.dp)]


def dp_groups(layout: Layout) -> list[list[int]]:
    """Ranks of equal tp_rank over the lanes: [[0, 2], [1, 3]] for tp 2, dp 2."""
    return [list(range(t, layout.world, layout.tp)) for t in range(layout.tp)]
