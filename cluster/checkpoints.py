"""Where a prompt's recurrent state is kept on the way, so that later prompts can go on from there. Pure."""

from cluster.scheduler_config import SchedulerConfig


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
