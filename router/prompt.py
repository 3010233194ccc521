"""What the router needs of a request: its size and the hashes of its blocks, made once however often it is routed."""

from collections.abc import Mapping, Sequence

from router.prefix import block_hashes
from router.request import Request


class Prompt:
    """One request as the router sees it.

    Args:
        key: decides among equal members; the request's id.
        num_tokens: tokens whose KV must be there before the next one can be sampled.
        max_output: tokens it may still produce.
        hashes: block hashes by block size, where they are known already (a recorded trace).
        source: the request to hash for other block sizes.
    """

    __slots__ = ("_hashes", "_source", "key", "max_output", "num_tokens")

    def __init__(
        self,
        key: str,
        *,
        num_tokens: int,
        max_output: int,
        hashes: Mapping[int, Sequence[int]] | None = None,
        source: Request | None = None,
    ) -> None:
        self.key = key
        self.num_tokens = num_tokens
        self.max_output = max_output
        self._hashes = dict(hashes or {})
        self._source = source

    def hashes(self, block_size: int) -> Sequence[int]:
        """Hashes of the full blocks that can be found: never the one with the last token."""
        found = self._hashes.get(block_size)
        if found is None:
            found = [] if self._source is None else _hash_all(self._source, block_size)
            self._hashes[block_size] = found
        return found


def prompt_of(request: Request) -> Prompt:
    """A request to route; tokens emitted so far are part of what must be computed."""
    num_tokens = len(request.prompt_ids) + len(request.output_ids)
    max_output = max(request.sampling.max_tokens - len(request.output_ids), 1)
    return Prompt(request.id, num_tokens=num_tokens, max_output=max_output, source=request)


def _hash_all(request: Request, block_size: int) -> list[int]:
    tokens = request.prompt_ids + request.output_ids
    return block_hashes(tokens[:-1], block_size, request.cache_salt)
