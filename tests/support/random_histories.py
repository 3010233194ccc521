"""Two members on real ranks for random histories: float32, the native kernels, one process or one a rank."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from hypothesis import strategies as st

from cluster.scheduler_config import SchedulerConfig
from shards.mesh import Layout
from tests.support.history_machine import World
from tests.support.history_members import MemberRanks, open_members, spoil
from tests.support.history_ranks import MOST_BLOCKS, MOST_DRAFTS, MOST_ROWS, MOST_SLOTS, Answers, limits


def configs(vocab_size: int, lanes: int) -> st.SearchStrategy[SchedulerConfig]:
    """Limits of one member: any room that its ranks have, from little more than one request takes."""
    return st.builds(
        replace,
        st.just(limits(vocab_size, lanes)),
        num_blocks=st.sampled_from((13, 13, 16, MOST_BLOCKS)),
        num_slots=st.sampled_from((2, 4, 6, MOST_SLOTS)),
        max_rows=st.sampled_from((2, 3, MOST_ROWS)),
        chunk_tokens=st.sampled_from((5, 16, 64)),
        max_step_tokens=st.sampled_from((12, 24, 64)),
        state_spacing=st.sampled_from((1, 8, 24)),
        prefix_cache=st.sampled_from((True, True, True, False)),
        draft_tokens=st.integers(0, MOST_DRAFTS),
        draft_adaptive=st.sampled_from((False, False, True)),
        early_tokens=st.sampled_from((4, 8, 1000)),
        offers_layers=st.booleans(),
    )


@contextmanager
def open_world(model: Path, layout: Layout | None = None, *, one_host: bool = True) -> Iterator[World]:
    """Members of a Qwen3-Next checkpoint with a multi-token prediction head, for any number of histories.

    Args:
        layout: of each of them; None: one rank.
        one_host: as in `open_members`.
    """
    answers, layout = Answers(model), layout or Layout()
    member = configs(answers.vocab_size, layout.dp)
    ids = range(answers.vocab_size)
    with open_members(model, layout, one_host=one_host) as ranks:

        def make_ranks(*_: SchedulerConfig) -> tuple[MemberRanks, MemberRanks]:
            for own in ranks:
                spoil(own, layout.dp)
            return ranks

        yield World(
            configs=st.tuples(member, member),
            make_ranks=make_ranks,
            answer=answers.of,
            beginnings=tuple(tuple(random.Random(i).choices(ids, k=40)) for i in range(3)),
            own=tuple(tuple(random.Random(10 + i).choices(ids, k=9)) for i in range(6)),
            tp=layout.tp,
        )
    answers.close()
