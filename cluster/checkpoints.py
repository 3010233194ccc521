"""Where a sequence's recurrent state is kept on the way, so that later prompts can go on from there. Pure."""

from cluster.decode_run import Saves, Work
from cluster.scheduler_config import SchedulerConfig
from cluster.sequence import Sequence
from cluster.states import StatePool


def checkpoint_ends(config: SchedulerConfig, *, first: int, shared: int, length: int, blank: int) -> list[int]:
    """Block-aligned positions behind which to keep the state while a prompt is computed, in order.

    The end of the prompt (the last token is always computed anew, so not behind it), the end of what an earlier
    prompt shares with this one, and a grid the same for all prompts: as far apart as they are from the start, up to
    `state_spacing`, or more where a prompt of full length would fill over half of the checkpoint slots. The grid begins
    with the first block while more than half of them are blank, so that whatever prefix of a prompt comes again, at
    least half of it, and all but a spacing of a long one, is found the second time. Else it begins with
    `state_spacing`: what shorter prefixes spare is worth less than what would have to go for them.

    Args:
        first: positions computed already.
        shared: positions whose KV is known; an earlier prompt went on differently, or ended, there.
        length: tokens of the prompt.
        blank: slots with nothing in them.
    """
    size, least = config.block_size, config.state_spacing
    if 2 * blank > config.num_checkpoints:
        least = min(size, least)
    end = (length - 1) // size * size
    wanted = {position for position in (shared, end) if position > first}
    position = least
    while position < end:
        aligned = position // size * size
        if all(abs(aligned - other) >= least for other in (first, shared, end)) and aligned > first:
            wanted.add(aligned)
        position += _spacing_behind(config, position, least)
    return sorted(wanted)


def _spacing_behind(config: SchedulerConfig, position: int, least: int) -> int:
    """Tokens from the grid's `position` to its next: the largest power of two times the least that fits."""
    doubled = least << ((position // least).bit_length() - 1)
    slots = max(1, config.num_checkpoints // 2)
    widest = max(config.state_spacing, -(-config.max_model_len // slots))
    return min(doubled, widest)


def reserve_saves(seq: Sequence, end: int, states: StatePool, block_size: int) -> Saves:
    """The states to keep up to `end`, where its next positions end: where it pays, as far as there are slots.

    While a sequence decodes that is every block boundary, and the state kept last is given up for the new one.
    """
    wanted = [position for position in seq.checkpoint_ends if position <= end]
    del seq.checkpoint_ends[: len(wanted)]
    if end >= seq.known_len and end % block_size == 0:
        if not states.num_blank and seq.newest_state is not None:
            states.replace(seq.newest_state)
        wanted.append(end)
    slots = ((position, states.take()) for position in reversed(wanted))
    return tuple((position, slot) for position, slot in slots if slot is not None)[::-1]


def commit_saves(work: Work, states: StatePool, block_size: int, *, sound: bool) -> None:
    """Keep the states that a committed plan saved, or give up their slots.

    Args:
        sound: its tokens can be found, and all of its drafts were accepted.
    """
    seq = work.seq
    if not sound or seq.phase != "running":
        for _, slot in work.saves:
            states.give(slot)
        return
    for end, slot in work.saves:
        hashes = seq.hashes(end // block_size, block_size)
        if end >= seq.known_len:
            if seq.newest_state is not None:
                states.replace(seq.newest_state)
            seq.newest_state = hashes[-1]
        states.keep(slot, hashes, block_size)
