"""What a rank tells rank 0: that it is up, its answers, its pulls, its end; and these as wire messages."""

from dataclasses import dataclass
from typing import assert_never

from cluster.plan import PullDone, SourceRank
from cluster.plan_codec import (
    as_list,
    as_typed,
    decode_output,
    decode_pull_done,
    decode_source_rank,
    encode_output,
    encode_pull_done,
    encode_source_rank,
)
from router.errors import CorruptDataError
from shards.batch import LaneOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProgress:
    """How much of its weights a rank has read."""

    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReady:
    """The rank is loaded and waits for work."""

    source: SourceRank | None = None
    """Where its cache can be read; None when it serves no pulls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepAnswer:
    """A lane leader's output of one step."""

    step: int
    output: LaneOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class RankEnded:
    """The rank has failed, or its connection has ended: nothing comes after this."""

    error: str
    refused: bool = False
    """It never began: model, layout or checkpoint cannot be served, and `error` says what would do."""


Report = LoadProgress | RankReady | StepAnswer | PullDone | RankEnded


def encode_report(report: Report) -> list[object]:
    """A report as a wire message."""
    match report:
        case StepAnswer():
            return encode_output(report.step, report.output)
        case PullDone():
            return encode_pull_done(report)
        case LoadProgress():
            return ["loading", report.done_bytes, report.total_bytes]
        case RankReady():
            return ["ready", None if report.source is None else encode_source_rank(report.source)]
        case RankEnded():
            return ["ended", report.error, report.refused]
        case _:
            assert_never(report)


def decode_report(message: list[object]) -> Report:
    """The inverse of `encode_report`.

    Raises:
        CorruptDataError: the message is no report.
    """
    match message[0]:
        case "output":
            step, output = decode_output(message)
            return StepAnswer(step=step, output=output)
        case "pulled":
            return decode_pull_done(message)
        case "loading":
            _, done, total = as_list(message, 3)
            return LoadProgress(done_bytes=as_typed(done, int), total_bytes=as_typed(total, int))
        case "ready":
            _, source = as_list(message, 2)
            return RankReady(source=None if source is None else decode_source_rank(source))
        case "ended":
            _, error, refused = as_list(message, 3)
            return RankEnded(error=as_typed(error, str), refused=as_typed(refused, bool))
        case kind:
            raise CorruptDataError(f"unknown report {kind!r}")
