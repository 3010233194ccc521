"""What an engine counts, for metrics."""

from dataclasses import dataclass

from router.load import MemberCounts


@dataclass(slots=True, kw_only=True)
class EngineStats:
    """Counters since the start, for metrics. The engine's thread writes its own; others get copies."""

    steps: int = 0
    computed_tokens: int = 0
    """Prompt and output positions that went through the model."""
    sampled_tokens: int = 0
    drafted_tokens: int = 0
    """Drafts verified."""
    accepted_tokens: int = 0
    """Drafts that were right."""
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache."""
    requests: int = 0
    rejected: int = 0
    admissions: int = 0
    """Times a request got room."""
    preemptions: int = 0
    """Times a running request had to give up its room for another, and was computed again."""
    pulls: int = 0
    failed_pulls: int = 0
    pulled_bytes: int = 0
    """Of pulls that succeeded: of others the time tells of timeouts and not of a bandwidth."""
    pull_s: float = 0.0
    """Seconds from the start to the end of each of them on its slowest rank, summed."""
    refetched_frames: int = 0
    """Damaged on their way and asked for again."""
    schedule_s: float = 0.0
    """Seconds that steps were decided in."""
    launch_s: float = 0.0
    """Seconds that plans were handed to ranks in."""
    commit_s: float = 0.0
    """Seconds that results were taken in and made events of."""
    compute_s: float = 0.0
    """Seconds that ranks computed (the slowest lane of each step)."""
    wait_s: float = 0.0
    """Seconds the engine waited for ranks."""
    idle_s: float = 0.0
    """Seconds without work."""

    def counts(self) -> MemberCounts:
        """What goes into the member's load reports."""
        return MemberCounts(
            preemptions=self.preemptions,
            drafted_tokens=self.drafted_tokens,
            accepted_tokens=self.accepted_tokens,
            pulls=self.pulls,
            failed_pulls=self.failed_pulls,
            refetched_frames=self.refetched_frames,
            pulled_bytes=self.pulled_bytes,
            pull_s=self.pull_s,
        )
