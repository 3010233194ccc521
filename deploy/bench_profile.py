"""A profile of steps as `moefleet bench engine --profile` shows it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from cluster.engine_stats import EngineStats
from shards.step_profile import StepKind, StepProfile

OTHER: Final = "other"
"""Between parts: Python and small operations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpan:
    """What the engine's thread did within a part of a run."""

    begin: EngineStats
    end: EngineStats
    seconds: float

    def parts(self) -> dict[str, float]:
        """Seconds by part; together the time that passed."""
        parts = {
            "scheduling": self.end.schedule_s - self.begin.schedule_s,
            "plan": self.end.launch_s - self.begin.launch_s,
            "commit": self.end.commit_s - self.begin.commit_s,
            "waiting": self.end.wait_s - self.begin.wait_s,
            "idle": self.end.idle_s - self.begin.idle_s,
        }
        return parts | {OTHER: max(self.seconds - sum(parts.values()), 0.0)}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileTable:
    """Microseconds of one step by thread and part; the engine's thread and rank 0's run side by side.

    The parts of either add up to the step.
    """

    steps: int
    step_us: float
    """From one step's begin to the next's."""
    rank_us: dict[str, float]
    operators_us: dict[str, float]
    """What `rank_us` is made of, such as "attention/linear"; "attention" is what lies between its operators."""
    engine_us: dict[str, float]

    def as_json(self) -> dict[str, object]:
        """For programs."""
        return {
            "steps": self.steps,
            "step_us": self.step_us,
            "rank_us": self.rank_us,
            "operators_us": self.operators_us,
            "engine_us": self.engine_us,
        }

    def lines(self) -> Iterator[str]:
        """For people: a line a part, the longest first, and below it those of its operators."""
        yield f"  a step of {self.steps}: {self.step_us:.0f} us"
        for name, micros in _longest_first(self.rank_us):
            yield self._line("rank 0", name, micros)
            inside = {path: us for path, us in self.operators_us.items() if path.startswith(f"{name}/")}
            for path, us in _longest_first(inside):
                yield self._line("", f"  {path.removeprefix(f'{name}/')}", us)
        for name, micros in _longest_first(self.engine_us):
            yield self._line("engine", name, micros)

    def _line(self, thread: str, name: str, micros: float) -> str:
        return f"    {thread:7} {name:22} {micros:9.1f} us {100 * micros / self.step_us:5.1f} %"


def _longest_first(parts: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(parts.items(), key=lambda item: -item[1])


def profile_table(profile: StepProfile, span: EngineSpan, kind: StepKind) -> ProfileTable | None:
    """What `kind` steps of a run took on average; None where the run had none.

    Args:
        span: the engine's thread while it ran steps of that kind.
    """
    steps = profile.steps.get(kind, 0)
    if not steps:
        return None
    found = {label: 1e6 * seconds / steps for (of, label), seconds in profile.seconds.items() if of == kind}
    parts: dict[str, float] = {}
    for label, micros in found.items():
        name = label[0] if label else OTHER
        parts[name] = parts.get(name, 0.0) + micros
    return ProfileTable(
        steps=steps,
        step_us=round(sum(found.values()), 1),
        rank_us={name: round(micros, 1) for name, micros in parts.items()},
        operators_us={"/".join(label): round(micros, 1) for label, micros in found.items() if label},
        engine_us={name: round(1e6 * seconds / steps, 1) for name, seconds in span.parts().items()},
    )
