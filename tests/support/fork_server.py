"""How tests start processes of ranks: forked from a server that has imported torch once, in 50 ms instead of 2 s."""

from multiprocessing import get_context
from multiprocessing.context import ForkServerContext

_PRELOADED = ["cluster.rank_process", "tests.support.stepping"]
"""What takes long, and neither starts a thread nor computes: what is forked then is as clean as what is spawned."""


def fork_server() -> ForkServerContext:
    """The context for `multiprocessing`; its server is started once a test process and ends with it."""
    context = get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context
