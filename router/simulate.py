"""Routing policies side by side on a recorded trace: python -m router.simulate --trace FILE [--members 16 256]."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from router.admission import AdmissionConfig
from router.choosers import POLICIES, PolicyName, policy_names
from router.errors import ConfigError
from router.scaling import ScalingConfig
from router.simulated_fleet import Fleet, Growth
from router.simulated_member import MemberSpec
from router.simulation import Objective, Result, simulate, split_by_room, work_s
from router.step_time import StepTime
from router.trace import TraceRequest, read_trace, scale_trace

_LINES_TOLD = 10
_COLUMNS = (
    ("mean_ttft_s", "mean TTFT s", "9.2f"),
    ("p50_ttft_s", "p50", "7.2f"),
    ("p99_ttft_s", "p99", "7.2f"),
    ("p50_itl_s", "p50 ITL s", "9.3f"),
    ("p99_itl_s", "p99", "7.3f"),
    ("hit_rate", "hits", "6.3f"),
    ("goodput", "good/s", "8.2f"),
    ("good_share", "good", "6.3f"),
    ("refused", "refused", "7d"),
    ("imbalance", "max/mean load", "7.2f"),
)
_SIZES = (("mean_members", "members", "7.1f"), ("most_members", "at most", "7d"))
"""Of fleets that grow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulateOptions:
    """What to simulate. The step times are those of a member on server GPUs; take the ones that yours report."""

    trace: Path
    members: tuple[int, ...] = (16,)
    policies: tuple[PolicyName, ...] = POLICIES
    utilisation: float = 0.8
    """Share of the fleet's time that the arrivals need if each finds what one cache of the fleet's size would hold."""
    requests: int = 12_000
    """About how many to simulate; a larger fleet gets a shorter time."""
    block_size: int = 512
    """Prompt tokens that one hash id of the trace stands for."""
    kv_tokens: int = 4_000_000
    """Tokens whose KV a member has room for."""
    max_rows: int = 128
    step_tokens: int = 2048
    base_s: float = 0.008
    prefill_token_s: float = 1e-4
    decode_row_s: float = 1e-4
    context_token_s: float = 2e-8
    prompt_s: float = 0.0
    experts_s: float = 0.0
    expert_share: float = 0.0
    ttft_slo_s: float = 5.0
    itl_slo_s: float = 0.1
    admission: bool = False
    """Requests wait for their turn at the gateways, and are refused there when too many wait."""
    gateways: int = 1
    """Requests come to them in turn; each knows of the others' by the members' reports alone."""
    max_members: int | None = None
    """Members are started as they are needed, from `members` on; the load is a share of what so many can do."""
    start_s: float = 30.0
    """That a new member takes to come up."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and field.name not in _MAY_BE_ZERO
            if number and not value > 0:
                raise ConfigError(f"simulate.{field.name} must be positive, got {value}")
        if not self.members or min(self.members) < 1:
            raise ConfigError(f"simulate.members must be sizes from 1 on, got {self.members}")
        if self.max_members is not None and self.max_members < max(self.members):
            raise ConfigError(
                f"simulate.max_members must be no less than members, got {self.max_members} and {max(self.members)}"
            )
        if not self.policies:
            raise ConfigError(f"simulate.policies must be some of {', '.join(POLICIES)}, got none")

    @property
    def spec(self) -> MemberSpec:
        """One member."""
        step = StepTime(
            base_s=self.base_s,
            prefill_token_s=self.prefill_token_s,
            decode_row_s=self.decode_row_s,
            context_token_s=self.context_token_s,
            prompt_s=self.prompt_s,
            experts_s=self.experts_s,
            expert_share=self.expert_share,
        )
        return MemberSpec(
            step_time=step,
            block_size=self.block_size,
            kv_tokens=self.kv_tokens,
            max_rows=self.max_rows,
            step_tokens=self.step_tokens,
        )


_QUEUE_PER_MEMBER = 16
_MAY_BE_ZERO = frozenset({"base_s", "decode_row_s", "context_token_s", "prompt_s", "experts_s", "expert_share"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All policies on one fleet size."""

    members: int
    factor: float
    """Arrivals a second over those of the trace."""
    length_s: float
    utilisation: float
    """As asked for, and met."""
    left_out: tuple[int, ...]
    """Lines of the trace whose requests no member has room for."""
    results: tuple[Result, ...]


def load_trace(options: SimulateOptions) -> list[TraceRequest]:
    """The trace file.

    Raises:
        ConfigError: it cannot be read, or a line makes no sense.
    """
    try:
        text = options.trace.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"trace {options.trace} cannot be read: {error}; name a file of JSON lines") from error
    return read_trace(text.splitlines(), options.block_size, name=f"trace {options.trace}")


def compare(options: SimulateOptions) -> Iterator[Comparison]:
    """Run every policy at every fleet size, one size after the other.

    Raises:
        ConfigError: as `load_trace`; or the trace is too short to tell a rate from.
    """
    recorded = load_trace(options)
    fitting, left_out = split_by_room(recorded, options.spec)
    if not fitting or fitting[-1].arrival_s <= fitting[0].arrival_s:
        raise ConfigError(f"trace {options.trace} spans no time or nothing in it fits kv_tokens={options.kv_tokens}")
    for members in options.members:
        trace, factor, utilisation = load_fleet(fitting, options.max_members or members, options)
        fleet = _fleet(members, options)
        objective = Objective(ttft_s=options.ttft_slo_s, itl_s=options.itl_slo_s)
        results = tuple(simulate(trace, fleet, policy, objective) for policy in options.policies)
        length_s = trace[-1].arrival_s - trace[0].arrival_s
        yield Comparison(
            members=members,
            factor=factor,
            length_s=length_s,
            utilisation=utilisation,
            left_out=tuple(each.line for each in left_out),
            results=results,
        )


def _fleet(members: int, options: SimulateOptions) -> Fleet:
    most = options.max_members or members
    scaling = ScalingConfig(min_members=members, max_members=most)
    return Fleet(
        members=members,
        spec=options.spec,
        admission=_admission(most, options) if options.admission else None,
        gateways=options.gateways,
        growth=Growth(scaling=scaling, start_s=options.start_s) if most > members else None,
    )


def _admission(members: int, options: SimulateOptions) -> AdmissionConfig:
    """Of one of the gateways before a fleet of this size: together their bounds are for that many members."""
    queue = -(-_QUEUE_PER_MEMBER * members // options.gateways)
    rows = -(-members * options.max_rows // options.gateways)
    return AdmissionConfig(max_in_flight=rows + queue, max_queue=queue, gateways=options.gateways)


def load_fleet(
    recorded: Sequence[TraceRequest], members: int, options: SimulateOptions
) -> tuple[list[TraceRequest], float, float]:
    """Scale the trace until it asks for the wanted share of the fleet: hits depend on how much runs side by side."""
    factor = options.utilisation * members / (work_s(recorded, options.spec, members) / _length_s(recorded))
    for _ in range(4):
        trace = scale_trace(recorded, factor, requests=options.requests)
        found = work_s(trace, options.spec, members) / _length_s(trace) / members
        if abs(found / options.utilisation - 1) < 0.02:
            break
        factor *= options.utilisation / found
    return trace, factor, found


def _length_s(trace: Sequence[TraceRequest]) -> float:
    return max(trace[-1].arrival_s - trace[0].arrival_s, 1e-9)


def table(comparison: Comparison) -> str:
    """A comparison as text."""
    first = comparison.results[0]
    columns = (*_COLUMNS, *_SIZES) if any(each.most_members > each.members for each in comparison.results) else _COLUMNS
    lines = [
        f"{comparison.members} members, {first.requests} requests in {comparison.length_s:.0f} s "
        f"({comparison.factor:.2f} x the trace's rate), {comparison.utilisation:.0%} of capacity at best; hits of a "
        f"cache without bounds {first.hit_bound:.3f}, of one of the fleet's size {first.hit_bound_in_room:.3f}",
        f"each alone, with the latter's hits: mean TTFT {first.alone_ttft_s:.2f} s, good {first.alone_good_share:.3f}; "
        f"one queue before all: {first.one_queue_ttft_s:.2f} s, in time {first.one_queue_good_share:.3f}",
    ]
    if comparison.left_out:
        lines.append(f"left out, as no member has room for them: {_lines_text(comparison.left_out)} of the trace")
    widths = [max(len(title), int(form.rstrip("df").split(".")[0])) for _, title, form in columns]
    titles = [title.rjust(width) for (_, title, _), width in zip(columns, widths, strict=True)]
    lines.append("  ".join(["policy".ljust(12), *titles]))
    for result in comparison.results:
        cells = [
            format(getattr(result, name), form).rjust(width)
            for (name, _, form), width in zip(columns, widths, strict=True)
        ]
        lines.append("  ".join([result.policy.ljust(12), *cells]))
    return "\n".join(lines)


def _lines_text(numbers: Sequence[int]) -> str:
    more = ", ..." if len(numbers) > _LINES_TOLD else ""
    told = ", ".join(map(str, numbers[:_LINES_TOLD]))
    return f"{len(numbers)} requests, lines {told}{more}"


def as_json(comparison: Comparison) -> str:
    """A comparison as one JSON line."""
    return json.dumps(asdict(comparison))


def _options(arguments: Sequence[str]) -> tuple[SimulateOptions, bool]:
    parser = argparse.ArgumentParser(prog="router.simulate", description=__doc__)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--members", type=int, nargs="+", default=[16])
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--json", action="store_true", help="one JSON line a fleet size")
    parser.add_argument("--admission", action="store_true", help="requests wait at a gateway, and may be refused")
    parser.add_argument("--max-members", type=int, help="members are started up to so many, as they are needed")
    plain = [each for each in fields(SimulateOptions) if type(each.default) in (int, float)]
    for each in plain:
        parser.add_argument(f"--{each.name.replace('_', '-')}", type=type(each.default), default=each.default)
    given = parser.parse_args(arguments)
    numbers = {each.name: getattr(given, each.name) for each in plain}
    options = SimulateOptions(
        trace=given.trace,
        members=tuple(given.members),
        policies=policy_names(given.policies),
        admission=given.admission,
        max_members=given.max_members,
        **numbers,
    )
    return options, given.json


def main(arguments: Sequence[str]) -> int:
    """Print a table, or JSON, for each fleet size; returns the exit status."""
    try:
        options, wants_json = _options(arguments)
        for comparison in compare(options):
            print(as_json(comparison) if wants_json else table(comparison), flush=True)  # noqa: T201 (its purpose)
    except ConfigError as error:
        print(error, file=sys.stderr)  # noqa: T201 (its purpose)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
