"""A profile of steps as `moefleet bench engine --profile` shows it."""

from collections.abc import Iterator
from dataclasses import dataclass

from cluster.engine_stats import EngineStats
from shards.step_profile import StepKind, StepProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileTable:
    """Microseconds of one step, by thread and part; the engine's thread and rank 0's run side by side."""

    steps: int
    step_us: float
    """From one step's begin to the next's."""
    engine_us: dict[str, float]
    rank_us: dict[str, float]

    def as_json(self) -> dict[str, object]:
        """For programs."""
        return {"steps": self.steps, "step_us": self.step_us, "engine_us": self.engine_us, "rank_us": self.rank_us}

    def lines(self) -> Iterator[str]:
        """For people: a line a part, the longest first."""
        yield f"  a step of {self.steps}: {self.step_us:.0f} us"
        for thread, parts in (("rank 0", self.rank_us), ("engine", self.engine_us)):
            for name, micros in sorted(parts.items(), key=lambda item: -item[1]):
                yield f"    {thread:7} {name:16} {micros:9.1f} us {100 * micros / self.step_us:5.1f} %"


def profile_table(profile: StepProfile, stats: EngineStats, kind: StepKind) -> ProfileTable | None:
    """What `kind` steps of a run took on average; None where the run had none.

    The engine's thread does not tell kinds apart: its times are those of an average step.
    """
    steps = profile.steps.get(kind, 0)
    if not steps:
        return None
    parts = {name: 1e6 * seconds / steps for (of, name), seconds in profile.seconds.items() if of == kind}
    per_step = 1e6 / max(stats.steps, 1)
    engine = {
        "scheduling": stats.schedule_s * per_step,
        "plan": stats.launch_s * per_step,
        "commit": stats.commit_s * per_step,
        "waiting": stats.wait_s * per_step,
    }
    return ProfileTable(
        steps=steps,
        step_us=round(sum(parts.values()), 1),
        engine_us={name: round(micros, 1) for name, micros in engine.items()},
        rank_us={name: round(micros, 1) for name, micros in parts.items()},
    )
