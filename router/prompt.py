"""What the router needs of a request: its size and the hashes of its blocks, made once however often it is routed."""

from collections.abc import Mapping, Sequence

from router.prefix import extend_hashes
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

    __slots__ = ("_hashes", "_source", "_tokens", "_under_way", "key", "max_output", "num_tokens")

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
        self._tokens: tuple[int, ...] = ()
        self._under_way: dict[int, list[int]] = {}

    def hashes(self, block_size: int) -> Sequence[int]:
        """Hashes of the full blocks that can be found: never the one with the last token."""
        known = self._hashes.get(block_size)
        if known is None:
            self.hash_some(block_size, None)
            known = self._hashes[block_size]
        return known

    def hash_some(self, block_size: int, max_blocks: int | None) -> bool:
        """Hash at most `max_blocks` more blocks (None: all), so that a long prompt holds up nobody.

        Returns:
            whether all are hashed, and `hashes` will cost nothing.
        """
        if block_size in self._hashes:
            return True
        hashes = self._under_way.setdefault(block_size, [])
        full = 0
        if self._source is not None:
            self._tokens = self._tokens or (self._source.prompt_ids + self._source.output_ids)[:-1]
            full = len(self._tokens) // block_size
            extend_hashes(hashes, self._tokens, block_size, self._source.cache_salt, max_blocks=max_blocks)
        if len(hashes) < full:
            return False
        # A tuple of numbers, unlike a list, is nothing to Python's garbage collector.
        self._hashes[block_size] = tuple(self._under_way.pop(block_size))
        return True


def prompt_of(request: Request) -> Prompt:
    """A request to route; tokens emitted so far are part of what must be computed."""
    num_tokens = len(request.prompt_ids) + len(request.output_ids)
    max_output = max(request.sampling.max_tokens - len(request.output_ids), 1)
    return Prompt(request.id, num_tokens=num_tokens, max_output=max_output, source=request)
