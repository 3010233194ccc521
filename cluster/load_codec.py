"""Load reports and cache events to and from the messages of the member stream."""

from typing import get_args

from cluster.protos import member_pb2 as pb
from router.errors import ConfigError, CorruptDataError
from router.load import CacheEvents, MemberCounts, MemberLoad
from router.request import MemberId, Role
from router.step_time import StepTime

_ROLES: dict[str, Role] = {role: role for role in get_args(Role)}


def load_message(load: MemberLoad) -> pb.MemberMessage:
    """A load report."""
    step = load.step_time
    return pb.MemberMessage(
        load=pb.Load(
            sequence=load.sequence,
            role=load.role,
            waiting_requests=load.waiting_requests,
            waiting_tokens=load.waiting_tokens,
            running_requests=load.running_requests,
            context_tokens=load.context_tokens,
            max_requests=load.max_requests,
            step_tokens=load.step_tokens,
            step_time=pb.StepTime(
                base_s=step.base_s,
                prefill_token_s=step.prefill_token_s,
                decode_row_s=step.decode_row_s,
                context_token_s=step.context_token_s,
                prompt_s=step.prompt_s,
                experts_s=step.experts_s,
                expert_share=step.expert_share,
            ),
            free_blocks=load.free_blocks,
            total_blocks=load.total_blocks,
            block_size=load.block_size,
            token_bytes=load.token_bytes,
            state_bytes=load.state_bytes,
            checkpoint_bytes=load.checkpoint_bytes,
            free_state_slots=load.free_state_slots,
            total_state_slots=load.total_state_slots,
            state_checkpoints=load.state_checkpoints,
            evicted_checkpoints=load.evicted_checkpoints,
            prefix_cache=load.prefix_cache,
            handoff_requests=load.handoff_requests,
            counts=_counts_message(load.counts),
            draining=load.draining,
        )
    )


def read_load(message: pb.Load, *, member_id: MemberId) -> MemberLoad:
    """A load report.

    Raises:
        CorruptDataError: its role or step times cannot be.
    """
    return MemberLoad(
        member_id=member_id,
        role=read_role(message.role),
        sequence=message.sequence,
        waiting_requests=message.waiting_requests,
        waiting_tokens=message.waiting_tokens,
        running_requests=message.running_requests,
        context_tokens=message.context_tokens,
        max_requests=message.max_requests,
        step_tokens=message.step_tokens,
        step_time=_read_step_time(message.step_time),
        free_blocks=message.free_blocks,
        total_blocks=message.total_blocks,
        block_size=message.block_size,
        token_bytes=message.token_bytes,
        state_bytes=message.state_bytes,
        checkpoint_bytes=message.checkpoint_bytes,
        free_state_slots=message.free_state_slots,
        total_state_slots=message.total_state_slots,
        state_checkpoints=message.state_checkpoints,
        evicted_checkpoints=message.evicted_checkpoints,
        prefix_cache=message.prefix_cache,
        handoff_requests=message.handoff_requests,
        counts=_read_counts(message.counts),
        draining=message.draining,
    )


def _counts_message(counts: MemberCounts) -> pb.Counts:
    return pb.Counts(
        preemptions=counts.preemptions,
        drafted_tokens=counts.drafted_tokens,
        accepted_tokens=counts.accepted_tokens,
        pulls=counts.pulls,
        failed_pulls=counts.failed_pulls,
        refetched_frames=counts.refetched_frames,
        pulled_bytes=counts.pulled_bytes,
        pull_s=counts.pull_s,
    )


def _read_counts(message: pb.Counts) -> MemberCounts:
    return MemberCounts(
        preemptions=message.preemptions,
        drafted_tokens=message.drafted_tokens,
        accepted_tokens=message.accepted_tokens,
        pulls=message.pulls,
        failed_pulls=message.failed_pulls,
        refetched_frames=message.refetched_frames,
        pulled_bytes=message.pulled_bytes,
        pull_s=message.pull_s,
    )


def _read_step_time(message: pb.StepTime) -> StepTime:
    try:
        return StepTime(
            base_s=message.base_s,
            prefill_token_s=message.prefill_token_s,
            decode_row_s=message.decode_row_s,
            context_token_s=message.context_token_s,
            prompt_s=message.prompt_s,
            experts_s=message.experts_s,
            expert_share=message.expert_share,
        )
    except ConfigError as error:
        raise CorruptDataError(f"member stream: {error}; run one release everywhere") from error


def cache_message(events: CacheEvents) -> pb.MemberMessage:
    """Changes of a member's prefix cache."""
    return pb.MemberMessage(
        cache=pb.CacheEvents(
            after=events.after,
            sequence=events.sequence,
            cleared=events.cleared,
            stored=events.stored,
            removed=events.removed,
            stored_states=events.stored_states,
            removed_states=events.removed_states,
        )
    )


def read_cache(message: pb.CacheEvents) -> CacheEvents:
    """Changes of a member's prefix cache."""
    return CacheEvents(
        after=message.after,
        sequence=message.sequence,
        cleared=message.cleared,
        stored=tuple(message.stored),
        removed=tuple(message.removed),
        stored_states=tuple(message.stored_states),
        removed_states=tuple(message.removed_states),
    )


def read_role(text: str) -> Role:
    """A role from its name.

    Raises:
        CorruptDataError: it is none of ours.
    """
    if text not in _ROLES:
        raise CorruptDataError(
            f"member stream: role {text!r} is none of {', '.join(_ROLES)}; run one release everywhere"
        )
    return _ROLES[text]
