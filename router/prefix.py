"""The one definition of a block's hash: chained over full blocks, salted, equal in every process."""

import struct
from collections.abc import Sequence
from hashlib import blake2b

_HASH_BYTES = 8


def block_hashes(token_ids: Sequence[int], block_size: int, salt: str = "") -> list[int]:
    """Hash each full block of a sequence together with everything before it.

    Args:
        token_ids: the sequence from its first token on; every id in 0 .. 2**32 - 1.
        block_size: tokens a block; hashes of different block sizes never agree.
        salt: sequences of different salts never agree.

    Returns:
        len(token_ids) // block_size hashes of 64 bits; equal hashes at index i mean equal tokens up to the end of
        block i.
    """
    hashes: list[int] = []
    extend_hashes(hashes, token_ids, block_size, salt)
    return hashes


def extend_hashes(
    hashes: list[int], token_ids: Sequence[int], block_size: int, salt: str = "", *, max_blocks: int | None = None
) -> None:
    """Append the hashes of full blocks that `hashes` lacks; `hashes` must come from the same tokens and salt.

    Args:
        max_blocks: append no more than this many; None: all.
    """
    parent = hashes[-1].to_bytes(_HASH_BYTES) if hashes else _root(block_size, salt)
    layout = struct.Struct(f"<{block_size}I")
    full = len(token_ids) // block_size
    end = full if max_blocks is None else min(full, len(hashes) + max_blocks)
    for start in range(len(hashes) * block_size, end * block_size, block_size):
        tokens = layout.pack(*token_ids[start : start + block_size])
        parent = blake2b(parent + tokens, digest_size=_HASH_BYTES).digest()
        hashes.append(int.from_bytes(parent))


def _root(block_size: int, salt: str) -> bytes:
    """The parent of a sequence's first block."""
    return blake2b(f"{block_size}:{salt}".encode(), digest_size=_HASH_BYTES, person=b"moefleet-prefix").digest()
